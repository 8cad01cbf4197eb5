"""The key of ``swift rollout --api_key``: swift's client for rollout servers sends none, and gets 401."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requests import Session

API_KEY_ENV = 'TREEPO_API_KEY'
"""Environment variable of the trainer. It is a secret and so no setting: it is in no config, note or log."""


def add_api_key(sessions: list[Session]) -> None:
    """Let these HTTP sessions send the key, where there is one."""
    key = os.environ.get(API_KEY_ENV)
    if key:
        for session in sessions:
            session.headers['Authorization'] = f'Bearer {key}'


def send_api_key() -> None:
    """Let every `VLLMClient` made from now on send the key; nothing is touched where there is none.

    Teachers' clients are another class and do not get it.
    """
    if not os.environ.get(API_KEY_ENV):
        return
    from swift.rlhf_trainers import VLLMClient

    plain = VLLMClient.__init__
    if hasattr(plain, '__wrapped__'):
        return

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        add_api_key(self.sessions)

    VLLMClient.__init__ = init
