"""Small asyncio helpers: nothing that is started here outlives who started it."""
from __future__ import annotations

import asyncio
from typing import Any, Sequence


async def all_or_cancel(coroutines: Sequence[Any]) -> None:
    """Await all; when one raises or we are cancelled, cancel the others and wait until they are gone."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
