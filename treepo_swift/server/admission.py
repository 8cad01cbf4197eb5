"""Which trees grow now, and on which data-parallel rank: as many as fit the KV cache, the first come first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .engine import Placement

KV_SHARE = 0.5
"""Of a tree's final tokens, what is set aside for it: it is small for most of its life. Simulated with too little KV
cache, setting all of them aside was slower in each of four cases."""


class Admission:
    """Lets the trees of a batch grow, in the order in which they ask.

    A tree is pinned to the rank with the fewest tokens on it, so that its forks find their prefix in that rank's KV
    cache. It waits while its expected tokens do not fit beside those of the trees that grow there: past that point
    vLLM preempts requests and evicts prefixes, and computes them again.
    """

    def __init__(self, *, ranks: int, kv_tokens: int) -> None:
        """`kv_tokens` of one rank; 0: not known, everything fits."""
        self._capacity = kv_tokens
        self._load = [0] * ranks
        self._trees = [0] * ranks
        self._waiting: deque[tuple[Callable[[], int], asyncio.Future[tuple[int, int]]]] = deque()
        self._entered = 0

    @property
    def waiting(self) -> int:
        """Trees that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def admitted(self, expected_tokens: Callable[[], int]) -> AsyncIterator[Placement]:
        """Wait until a tree may grow, and where; older trees have the lower priority number.

        `expected_tokens` is asked when the tree's turn comes: what was learned of trees that are done counts.
        """
        future: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((expected_tokens, future))
        self._admit()
        try:
            rank, tokens = await future
        except asyncio.CancelledError:
            self._waiting = deque(entry for entry in self._waiting if entry[1] is not future)
            if future.done() and not future.cancelled():
                self._release(*future.result())
            raise
        self._entered += 1
        try:
            yield Placement(rank, self._entered)
        finally:
            self._release(rank, tokens)

    def _release(self, rank: int, tokens: int) -> None:
        self._load[rank] -= tokens
        self._trees[rank] -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            expected_tokens, future = self._waiting[0]
            tokens = expected_tokens()
            rank = min(range(len(self._load)), key=lambda r: (self._load[r], self._trees[r]))
            # A tree that is larger than the cache gets a rank of its own: vLLM will preempt, but it goes on.
            if self._capacity and self._load[rank] and self._load[rank] + tokens > self._capacity:
                return
            self._waiting.popleft()
            self._load[rank] += tokens
            self._trees[rank] += 1
            future.set_result((rank, tokens))


class Forecast:
    """What the next tree will decode, learned from those that are done. Lengths drift slowly while a policy trains."""

    WEIGHT = 0.1
    """Of a new tree in the running mean."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def learn(self, decoded_tokens: int) -> None:
        """A tree has decoded so many."""
        old = decoded_tokens if self._mean is None else self._mean
        self._mean = old + self.WEIGHT * (decoded_tokens - old)

    def decoded_tokens(self, unknown: int) -> int:
        """Expected of the next tree; `unknown` before any was seen."""
        return unknown if self._mean is None else round(self._mean)
