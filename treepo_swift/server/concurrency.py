"""Small asyncio helpers: nothing that is started here outlives who started it."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

T = TypeVar('T')

COUNTS_ITS_OWN_CANCEL = sys.version_info < (3, 13)
"""A `TaskGroup` whose task fails cancels the task that waits for it, and before Python 3.13 left that counted. swift's
worker serves every rollout in one task: after a failed one it would look cancelled for good."""
CALM = (50_000, 50, 1000)
"""Garbage collection thresholds while trees grow."""


@contextmanager
def calm_garbage_collection(*, freeze: bool = True) -> Iterator[None]:
    """Collect less often: growing trees are many objects without cycles, and looking through them again and again
    takes as long as growing them. With `freeze`, what is there at the first call is never collected at all."""
    if freeze and not gc.get_freeze_count():
        # A full collection over what swift and vLLM have loaded stops the event loop for 0.4 s; none of it is garbage.
        gc.collect()
        gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*CALM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises the exception of its first task that failed, instead of a group of them."""
    task = asyncio.current_task()
    cancelled = task.cancelling()
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        if COUNTS_ITS_OWN_CANCEL and task.cancelling() > cancelled:
            task.uncancel()
        error = errors.exceptions[0]
        raise error from error.__cause__


async def all_or_cancel(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all; when one raises or we are cancelled, cancel the others and wait until they are gone."""
    async with task_group() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)


@asynccontextmanager
async def closed_for_good(stream: AsyncGenerator[T, None]) -> AsyncIterator[AsyncGenerator[T, None]]:
    """As `contextlib.aclosing`, but who is cancelled while the stream closes waits until it has: an engine's request
    whose abort is interrupted would go on."""
    try:
        yield stream
    finally:
        closing = asyncio.ensure_future(stream.aclose())
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.wait({closing})
            except asyncio.CancelledError as e:
                cancelled = e
        closing.result()
        if cancelled is not None:
            raise cancelled


class BackgroundTasks:
    """Tasks that nobody waits for until `finish`. They must not raise."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for all; who is cancelled here cancels them, and waits until they are gone."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


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
