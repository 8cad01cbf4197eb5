"""Lets swift's rollout server hear several clients at a time.

The server has one pipe to each worker, which answers commands in the order in which they came. Most of its handlers
send and receive at once; the one behind `process_weights_after_loading` lets a thread receive and serves others
meanwhile. Where another client asks for a rollout then, or our own trainer whether the worker lives, two threads read
the same pipe: each gets the other's answer, or half of one.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
from typing import Any

DEPLOY = 'swift.pipelines.infer.rollout'


class OrderedPipe:
    """A `Connection` on which whoever receives gets the answer to its own command.

    swift looks up `recv` right after it has sent, before anybody else can send: that is when an answer finds its owner.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._sent = 0
        """Commands that will be answered."""
        self._unclaimed: deque[int] = deque()
        """Which of them nobody receives yet."""
        self._received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def send(self, command: Any) -> None:
        self._connection.send(command)
        if isinstance(command, dict) and command.get('type') == 'call':
            self._unclaimed.append(self._sent)
            self._sent += 1

    @property
    def recv(self) -> Callable[[], Any]:
        """Waits for the answer to the oldest command that nobody has asked about; without one, for what comes."""
        if not self._unclaimed:
            return self._connection.recv
        turn = self._unclaimed.popleft()

        def receive() -> Any:
            with self._changed:
                self._changed.wait_for(lambda: self._received == turn)
            try:
                return self._connection.recv()
            finally:
                with self._changed:
                    self._received += 1
                    self._changed.notify_all()

        return receive


def order_answers() -> None:
    """Give the rollout server of this process, if it is to be one, ordered pipes. Idempotent."""
    if DEPLOY not in sys.modules:
        return
    deploy = sys.modules[DEPLOY].SwiftRolloutDeploy
    start = getattr(deploy, '_start_data_parallel_workers', None)
    if start is None or hasattr(start, '__wrapped__'):
        return

    @wraps(start)
    def started(self: Any) -> None:
        start(self)
        self.connections = [OrderedPipe(connection) for connection in self.connections]

    deploy._start_data_parallel_workers = started
