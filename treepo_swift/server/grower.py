"""Drives one tree over an engine: requests go out, segments come in, checks are asked, failures are grown around."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from inspect import isawaitable

from treepo_swift.core.messages import NextTurn, Segment, SegmentRequest
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Path, StopReason, response_ids

from .engine import EngineError, Place, Prompt, SegmentEngine
from .hooks import HookError
from .replies import data_of
from .tasks import Nursery, Rendezvous
from .text import PathReader


class CpuClock:
    """CPU time of this thread that was spent inside ``with clock:``, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.thread_time() - self._started


Verdict = StopReason | None
Check = Callable[[Path], Verdict | Awaitable[Verdict]]
"""Why a path should stop at this boundary, by its text; may raise `HookError`."""
EndTurn = Callable[[Path, StopReason], Awaitable[NextTurn | StopReason]]
"""Says how a path goes on whose turn has ended, or why it ends; may raise `HookError`."""


class TreeGrower:
    """Grows one tree to its end. Whatever happens, no task and no engine request of it outlives `run`."""

    def __init__(
        self,
        search: TreeSearch,
        prompt: Prompt,
        *,
        engine: SegmentEngine,
        reader: PathReader,
        check: Check,
        end_turn: EndTurn | None,
        clock: CpuClock,
        seeded: bool,
        warn: Callable[[str], None],
        progress: Callable[[int], None],
    ) -> None:
        """Without `end_turn` a path ends with its turn. `seeded` asks the engine to sample reproducibly; `progress`
        hears how many trajectories were added."""
        self.search = search
        self.prompt = prompt
        self._engine = engine
        self._reader = reader
        self._check = check
        self._end_turn = end_turn
        self._clock = clock
        self._seeded = seeded
        self._warn = warn
        self._progress = progress
        self._reported = 0
        self._place = Place()
        self._meeting: Rendezvous | None = None
        self._resuming = False
        self._paths: Nursery
        self._growing: dict[int, asyncio.Task] = {}
        """Of the paths that have not ended, by their ids."""

    async def run(self, place: Place, meeting: Rendezvous | None = None) -> None:
        """`meeting` is where the trees that share a token budget wait for each other."""
        self._place, self._meeting = place, meeting
        try:
            async with Nursery() as self._paths:
                planted = not self.search.done
                self._go_on(self.search.start(self._allowance(meeting.members) if meeting else None) if planted else [])
        finally:
            if meeting:
                meeting.leave()

    def _allowance(self, members: int) -> int:
        return self.search.config.budget.tokens // members

    def _go_on(self, requests: list[SegmentRequest]) -> None:
        # Forks of one node leave together: the first computes what is not in the cache, the others find it there.
        for request in requests:
            self._growing[request.path_id] = self._paths.start(self._grow(request))
        if self.search.waiting and not self._resuming:
            self._resuming = True
            self._paths.start(self._resume())
        if len(self.search.tree.trajectories) > self._reported:
            self._progress(len(self.search.tree.trajectories) - self._reported)
            self._reported = len(self.search.tree.trajectories)
        if self.search.done:
            # Where the tree has given up, paths still grow. Those that have ended may be aborting their requests.
            for task in self._growing.values():
                task.cancel()
            self._growing.clear()

    async def _resume(self) -> None:
        growing = await self._meeting.wait()
        self._resuming = False
        with self._clock:
            self._go_on(self.search.resume(self._allowance(growing)))

    async def _grow(self, request: SegmentRequest) -> None:
        """Take the segments of one request until it or its path's turn ends."""
        try:
            async with aclosing(self._segments(request)) as segments:
                async for segment in segments:
                    stop = await self._take(request, segment)
                    if stop is not None:
                        break
                else:
                    return
            # The engine samples no further for this path while its hooks think.
            if self._end_turn is not None and request.path_id in self._growing:
                await self._finish_turn(request, stop, segment.ahead)
        except (EngineError, HookError) as e:
            self._fail(request, e)

    async def _segments(self, request: SegmentRequest) -> AsyncIterator[Segment]:
        """After an engine error, what is left of a request is asked for again, from where its path stands."""
        left, errors = request.max_tokens, 0
        while left:
            try:
                async with aclosing(
                    self._engine.generate(
                        self._prompt_of(request),
                        response_ids(self.search.leaf(request.path_id)),
                        max_tokens=left,
                        segment_tokens=request.segment_tokens,
                        seed=request.seed if self._seeded else None,
                        place=self._place,
                    )
                ) as segments:
                    async for segment in segments:
                        errors = 0
                        left -= len(segment.token_ids)
                        yield segment
                if left:
                    raise EngineError('the engine ended a request before its path had ended')
            except Exception as e:
                errors += 1
                if errors > self.search.config.faults.max_retries:
                    raise EngineError(f'{type(e).__name__}: {e} (after {errors} attempts)') from e

    def _prompt_of(self, request: SegmentRequest) -> Prompt:
        begins = data_of(request.prefix.turn_start).begins
        return self.prompt if begins is None else begins.prompt

    async def _take(self, request: SegmentRequest, segment: Segment) -> StopReason | None:
        """Put a segment into the tree and start what may start then; returns why its path's turn has ended."""
        search, path_id = self.search, request.path_id
        with self._clock:
            if search.leaf(path_id) is request.prefix:
                search.tree.stats.evicted_tokens += self._evicted(request, segment)
            segment = self._reader.cut_at_stop_string(search.leaf(path_id), segment)
            path = search.extend(path_id, segment)
            verdict = self._check(path)
        if isawaitable(verdict):
            verdict = await verdict
        if path_id not in self._growing:
            return verdict or StopReason.HOOK  # The tree gave up while a hook was asked.
        with self._clock:
            stop = search.stop_of(path_id, verdict)
            if stop is StopReason.ANSWER and search.config.stop.answer.after == 'cut' and segment.stop is None:
                search.cut(path_id, self._reader.answer_length(path.leaf))
            if stop is None:
                self._go_on(search.settle(path_id))
            elif self._end_turn is None:
                self._end_path(path_id, stop, segment.ahead)
        return stop

    def _end_path(self, path_id: int, stop: StopReason, ahead: int) -> None:
        requests = self.search.end(path_id, stop)
        del self._growing[path_id]
        self.search.discard(ahead)
        self._go_on(requests)

    async def _finish_turn(self, request: SegmentRequest, stop: StopReason, ahead: int) -> None:
        """Ask the hooks whether the path goes on, and let it."""
        path = self.search.path(request.path_id)
        following = await self._end_turn(path, stop)
        if request.path_id not in self._growing:
            return  # The tree gave up meanwhile; `wait_for` may swallow the cancellation.
        with self._clock:
            if isinstance(following, StopReason):
                self._end_path(request.path_id, following, ahead)
                return
            self.search.discard(ahead)
            requests = self.search.begin_turn(request.path_id, following)
            # Where a budget ends the next turn before its first token, the trajectory ends with this one.
            data_of(path.leaf.parent).ended = data_of(path.leaf).begins
            self._go_on(requests)

    def _evicted(self, request: SegmentRequest, segment: Segment) -> int:
        """Tokens of full KV blocks that a request's prefix had filled and that were gone when it came."""
        if request.prefix.parent is None:
            return 0
        # The engine samples from the last token, which therefore is never in the cache; nor is what is new to it.
        computed = request.prefix if request.prefix.sampled else request.prefix.parent
        known = len(self.prompt.token_ids) + computed.length - 1
        block = self._engine.info.block_size
        return max(known // block * block - segment.cached_tokens, 0)

    def _fail(self, request: SegmentRequest, error: Exception) -> None:
        self._warn(f'{type(error).__name__}: {error}')
        if self._growing.pop(request.path_id, None) is None:
            return
        with self._clock:
            self._go_on(self.search.fail(request.path_id, str(error)))
