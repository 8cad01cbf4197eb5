"""The deadline of nodes that wait for the engine: it passes where the engine says nothing to anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar('T')


class EngineSilent(Exception):
    """The engine said nothing to anybody for too long."""


LOOKS = 10
"""How often silence is looked for within the time that is allowed."""


class Silence:
    """Ends what has waited for `seconds` in which no request of the batch had an answer.

    A clock for each request would also end healthy ones: a request may wait for its turn behind hundreds of others for
    as long as these need. An engine that works on them answers somebody, though. So a request that was lost fails when
    the others are done, and an engine that hangs fails all of them.
    """

    def __init__(self, seconds: float, answers: Callable[[], int]) -> None:
        """`answers` is a number that grows with whatever the engine says, also to those who have not waited here."""
        self._seconds = seconds
        self._answers = answers
        self._waiting: dict[asyncio.Timeout, float] = {}
        """Since when each of those waits that wait now."""

    async def next_of(self, stream: AsyncGenerator[T, None]) -> T | None:
        """The next item; None at the end. Raises `EngineSilent`."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._waiting[limit] = asyncio.get_running_loop().time()
                return await anext(stream, None)
        except TimeoutError:
            if limit.expired():
                raise EngineSilent from None
            raise  # of the engine's own
        finally:
            self._waiting.pop(limit, None)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Within the block silence is looked for."""
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})

    async def _watch(self) -> None:
        loop: Any = asyncio.get_running_loop()
        seen, since = self._answers(), loop.time()
        while True:
            await asyncio.sleep(self._seconds / LOOKS)
            now = loop.time()
            if (answers := self._answers()) != seen:
                seen, since = answers, now
                continue
            for limit, began in list(self._waiting.items()):
                if now - max(since, began) > self._seconds:
                    del self._waiting[limit]
                    limit.reschedule(now)
