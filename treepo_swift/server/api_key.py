"""An API key that the trainer's client can send.

swift's server wants ``Authorization: Bearer KEY``, and the client of ``swift rlhf`` sends no header. It asks for the
first time while arguments are parsed, before plugins are loaded, so no plugin can give it one. But it asks by requests,
which reads netrc files: that sends ``Basic``, which is taken here. The client needs no change.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import wraps
from typing import Any

from treepo_swift.compat.versions import UnsupportedVersion

DEPLOY = 'swift.pipelines.infer.rollout'
KEY_ENV = 'ROLLOUT_API_KEY'
"""swift prints its command line, and with it ``--api_key``. It is none of the `TREEPO_` ones, which are settings."""
OPEN = ('/health', '/health/')
"""As in swift: what the client asks without its sessions."""
REFUSED = (
    "This rollout server wants its API key. Name a netrc file by NETRC in the trainer's environment, with the line "
    '`machine HOST login rollout password KEY`, HOST as in --vllm_server_host.'
)

Scope = MutableMapping[str, Any]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Callable[[], Awaitable[Scope]], Send], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: lets through who has the key, and hands it to swift's own guard in the form that this knows."""

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._key = key.encode('ascii')

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Send) -> None:
        if scope['type'] == 'lifespan' or scope.get('path') in OPEN:
            return await self._app(scope, receive, send)
        given = [value for name, value in scope['headers'] if name == b'authorization']
        if len(given) != 1 or not secrets.compare_digest(key_in(given[0]), self._key):
            return await _refuse(scope, send)
        others = [(name, value) for name, value in scope['headers'] if name != b'authorization']
        header = (b'authorization', b'Bearer ' + self._key)
        return await self._app({**scope, 'headers': [*others, header]}, receive, send)


def key_in(header: bytes) -> bytes:
    """The key in an Authorization header, the password where it is ``Basic``; empty where there is none."""
    scheme, _, value = header.partition(b' ')
    if scheme.lower() == b'bearer':
        return value
    if scheme.lower() != b'basic':
        return b''
    try:
        return base64.b64decode(value, validate=True).partition(b':')[2]
    except binascii.Error:
        return b''


async def _refuse(scope: Scope, send: Send) -> None:
    if scope['type'] != 'http':
        return await send({'type': 'websocket.close', 'code': 1008})
    headers = [(b'content-type', b'application/json'), (b'www-authenticate', b'Bearer')]
    await send({'type': 'http.response.start', 'status': 401, 'headers': headers})
    await send({'type': 'http.response.body', 'body': b'{"detail": "%s"}' % REFUSED.encode()})


def guard_server() -> None:
    """Let the rollout server of this process, if it is to be one, take its key so. Idempotent.

    Raises:
        UnsupportedVersion: a key is asked for, and this ms-swift has no place to look for it.
    """
    if DEPLOY not in sys.modules:
        return
    deploy = sys.modules[DEPLOY].SwiftRolloutDeploy
    routes = getattr(deploy, '_register_rl_rollout_app', None)
    if routes is None and os.environ.get(KEY_ENV):
        raise UnsupportedVersion(f'{KEY_ENV} is set, and this ms-swift has no place for a guard. 4.5.3 and 4.6.0 do.')
    if routes is None or hasattr(routes, '__wrapped__'):
        return

    @wraps(routes)
    def registered(self: Any) -> None:
        routes(self)
        # Not for its workers, in which tools of the model may run.
        key = os.environ.pop(KEY_ENV, None) or self.args.api_key
        if not key:
            return
        if not (key.isascii() and key.isprintable()) or ' ' in key:
            raise ValueError(f'{KEY_ENV}, or --api_key, may have printable ASCII characters only, and no blanks.')
        self.args.api_key = key
        self.app.add_middleware(KeyGuard, key=key)

    deploy._register_rl_rollout_app = registered
