"""`SyncWatch`: a weight sync whose other side has died ends with an error instead of waiting for good.

A broadcast between GPUs waits for a peer that is gone, in a call that nothing can interrupt. swift's ``/health`` is no
help: it says ok when the worker behind it has died.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from requests import Response
from swift.rlhf_trainers import VLLMInferClient

from .servers import ServerError, death

QUIET_SECONDS = 20.0
"""Without an answer of any server in a weight sync, after which they are asked whether they live."""
LIMIT_SECONDS = 600.0
"""Without an answer, after which a sync counts as hung although nobody is known to be dead."""
EXIT_STATUS = 70
"""Of a process that could only be ended."""


class SyncWatch:
    """Watches one weight sync at a time, as a context manager of the main process.

    Every HTTP answer is progress: swift sends one request for each bucket of weights. A server that is busy with a
    broadcast answers the question whether it lives when it is done, so a slow sync is not mistaken for a dead one.
    """

    def __init__(self, client: VLLMInferClient, end: Callable[[str], None] | None = None) -> None:
        """`end` gets the message and ends the process; tests give another."""
        self._client = client
        self._end = end or _end_process
        self._beat = 0.0
        self._done = threading.Event()
        for session in client.sessions:
            session.hooks['response'].append(self._went_on)

    def _went_on(self, response: Response, *args: object, **kwargs: object) -> None:
        if not response.url.endswith('/infer/'):  # our own questions
            self._beat = time.monotonic()

    def __enter__(self) -> SyncWatch:
        self._done.clear()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name='treepo-sync-watch', daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if isinstance(error, Exception):
            dead = self._dead()
            if dead:
                raise ServerError(f'The weights could not be sent. {" ".join(map(str, dead))}') from error

    def _watch(self) -> None:
        asked = self._beat
        while not self._done.wait(min(1.0, QUIET_SECONDS / 4)):
            quiet = time.monotonic() - max(asked, self._beat)
            if quiet < QUIET_SECONDS:
                continue
            dead, asked = self._dead(), time.monotonic()
            if self._done.is_set():
                return
            if dead:
                self._end(f'A weight sync waits for a rollout server that is dead. {" ".join(map(str, dead))}')
                return
            if asked - self._beat > LIMIT_SECONDS:
                urls = ', '.join(self._client.base_urls)
                self._end(f'A weight sync has stood still for {LIMIT_SECONDS:g} s. The rollout servers: {urls}.')
                return

    def _dead(self) -> list[ServerError]:
        """Servers that are dead for certain: they refuse or can't be reached, where a busy one is silent."""
        causes = [death(self._client, server) for server in range(self._client.num_servers)]
        return [cause for cause in causes if cause is not None and not cause.silent]


def _end_process(message: str) -> None:
    print(
        f'treepo: {message} Nothing can interrupt the broadcast, so this process ends now. Start the servers again, '
        'and the training from its last checkpoint (--resume_from_checkpoint).',
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_STATUS)
