"""Small asyncio helpers: nothing that is started here outlives who started it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

CALM = (50_000, 50, 1000)
"""Garbage collection thresholds while trees grow."""


@contextmanager
def calm_garbage_collection() -> Iterator[None]:
    """Collect less often: growing trees are many objects without cycles, and looking through them again and again
    takes as long as growing them."""
    if not gc.get_freeze_count():
        # A full collection over what swift and vLLM have loaded stops the event loop for 0.4 s; none of it is garbage.
        gc.collect()
        gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*CALM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Nursery:
    """Tasks that end together: leaving the block waits for all of them, also those that they start themselves.

    When one raises, or the block is left by an exception, the others are cancelled and waited for. (Python 3.11 has
    `asyncio.TaskGroup`; we run on 3.10, and want the task's own exception instead of a group of them.)
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task] = set()
        self._over = asyncio.Event()
        self._error: BaseException | None = None

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._error = self._error or task.exception()
        if self._error is not None or not self._tasks:
            self._over.set()

    async def __aenter__(self) -> Nursery:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._tasks:
                await self._over.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if error is None and self._error is not None:
            raise self._error


async def all_or_cancel(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all; when one raises or we are cancelled, cancel the others and wait until they are gone."""
    async with Nursery() as nursery:
        for coroutine in coroutines:
            nursery.start(coroutine)


class Rendezvous:
    """Lets a changing number of members wait until all of them do."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._waiting: list[asyncio.Future[int]] = []

    async def wait(self) -> int:
        """Return, when every member waits here or has left, how many there were."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._release()
        return await future

    def leave(self) -> None:
        """The others need not wait for this member any more."""
        self.members -= 1
        self._release()

    def _release(self) -> None:
        if len(self._waiting) == self.members:
            for future in self._waiting:
                if not future.done():
                    future.set_result(self.members)
            self._waiting.clear()
