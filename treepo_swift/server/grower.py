"""Drives one tree over an engine: requests go out, segments come in, checks are asked, failures are grown around.

What is asked of the engine next: `TreeGrower._take` hands a segment to `TreeSearch.settle`, which returns the requests
that `_send` sends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from inspect import isawaitable

from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.messages import Segment, SegmentRequest
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import StopReason, response_ids

from .concurrency import Rendezvous, closed_for_good, task_group
from .conversation import Conversation
from .engine import Placement, Prompt, SegmentEngine
from .failures import FailurePolicy
from .replies import data_of
from .segment_check import SegmentCheck
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


@dataclass(frozen=True, slots=True)
class Services:
    """What all trees of a batch grow with."""

    engine: SegmentEngine
    reader: PathReader
    check: SegmentCheck
    clock: CpuClock
    seeded: bool
    """Whether the engine is asked to sample reproducibly."""
    failures: FailurePolicy
    """Asks the engine again, and hears why a path failed; may raise to end the batch."""
    progress: Callable[[int], object]
    """Hears how many trajectories were added."""


class TreeGrower:
    """Grows one tree to its end. Whatever happens, no task and no engine request of it outlives `run`."""

    def __init__(
        self, search: TreeSearch, prompt: Prompt, conversation: Conversation | None, services: Services
    ) -> None:
        """Without a `conversation` a path ends with its turn."""
        self.search = search
        self.prompt = prompt
        self._conversation = conversation
        self._services = services
        self._clock = services.clock
        self._reported = 0
        self._placement = Placement()
        self._meeting: Rendezvous | None = None
        self._resuming = False
        self._tasks: asyncio.TaskGroup
        self._requests: dict[int, asyncio.Task[None]] = {}
        """What reads the request of each path that has not ended, by the path's id."""

    async def run(self, placement: Placement, meeting: Rendezvous | None = None) -> None:
        """`meeting` is where the trees that share a token budget wait for each other."""
        self._placement, self._meeting = placement, meeting
        try:
            async with task_group() as self._tasks:
                if not self.search.done:
                    self._send(self.search.start(self._allowance(meeting.members) if meeting else None))
        finally:
            if meeting:
                meeting.leave()

    async def _grow(self, request: SegmentRequest) -> None:
        """Take the segments of one request until it or its path's turn ends."""
        try:
            async with closed_for_good(self._sample(request)) as segments:
                async for segment in segments:
                    stop = await self._take(request, segment)
                    if stop is not None:
                        break
                else:
                    return
            # The engine samples no further for this path while its hooks think.
            if self._conversation is not None and request.path_id in self._requests:
                await self._end_turn(self._conversation, request, stop, segment.ahead)
        except NodeFailure as e:
            self._fail(request, e)

    async def _take(self, request: SegmentRequest, segment: Segment) -> StopReason | None:
        """Put a segment into the tree and send what may start then; returns why its path's turn has ended."""
        search, path_id = self.search, request.path_id
        with self._clock:
            if search.leaf(path_id) is request.prefix:
                search.tree.stats.evicted_tokens += self._evicted(request, segment)
            segment = self._services.reader.cut_at_stop_string(search.leaf(path_id), segment)
            path = search.extend(path_id, segment)
            verdict = self._services.check.verdict(search, path)
        if isawaitable(verdict):
            verdict = await verdict
        if path_id not in self._requests:
            return verdict or StopReason.HOOK  # The tree gave up while a hook was asked.
        with self._clock:
            stop = search.stop_of(path_id, verdict)
            if stop is StopReason.ANSWER and search.config.stop.answer.after == 'cut' and segment.stop is None:
                search.cut(path_id, self._services.reader.answer_length(path.leaf))
            if stop is None:
                self._send(search.settle(path_id))
            elif self._conversation is None:
                self._end_path(path_id, stop, segment.ahead)
        return stop

    def _send(self, requests: list[SegmentRequest]) -> None:
        """Start what the search wants next, and end what it wants no more."""
        # Forks of one node leave together: the first computes what is not in the cache, the others find it there.
        for request in requests:
            self._requests[request.path_id] = self._tasks.create_task(self._grow(request))
        if self.search.waiting and not self._resuming:
            self._resuming = True
            self._tasks.create_task(self._resume())
        if len(self.search.tree.trajectories) > self._reported:
            self._services.progress(len(self.search.tree.trajectories) - self._reported)
            self._reported = len(self.search.tree.trajectories)
        if self.search.done:
            # Where the tree has given up, paths still grow. Those that have ended may be aborting their requests.
            for task in self._requests.values():
                task.cancel()
            self._requests.clear()

    # How a path goes on, or ends.

    async def _end_turn(
        self, conversation: Conversation, request: SegmentRequest, stop: StopReason, ahead: int
    ) -> None:
        """Ask the hooks whether the path goes on, and let it."""
        path = self.search.path(request.path_id)
        async with conversation.ended_turn(path, stop) as following:
            if request.path_id not in self._requests:
                return  # The tree gave up meanwhile.
            with self._clock:
                if isinstance(following, StopReason):
                    self._end_path(request.path_id, following, ahead)
                    return
                self.search.discard(ahead)
                requests = self.search.begin_turn(request.path_id, following)
                # Where a budget ends the next turn before its first token, the trajectory ends with this one.
                data_of(path.leaf.parent).ended = data_of(path.leaf).begins
                self._send(requests)

    def _end_path(self, path_id: int, stop: StopReason, ahead: int) -> None:
        requests = self.search.end(path_id, stop)
        del self._requests[path_id]
        self.search.discard(ahead)
        self._send(requests)

    def _fail(self, request: SegmentRequest, error: NodeFailure) -> None:
        self._services.failures.path_failed(error)
        if self._requests.pop(request.path_id, None) is None:
            return
        with self._clock:
            self._send(self.search.fail(request.path_id, str(error)))
        if self._conversation is not None:
            self._conversation.states.release_unneeded()

    async def _resume(self) -> None:
        """Where trees share a budget: go on when all of them have come to their boundary."""
        growing = await self._meeting.wait()
        self._resuming = False
        with self._clock:
            self._send(self.search.resume(self._allowance(growing)))

    def _allowance(self, members: int) -> int:
        return self.search.config.budget.tokens // members

    # The engine.

    def _sample(self, request: SegmentRequest) -> AsyncGenerator[Segment, None]:
        """What is left of a request after an engine error is asked for again, from where its path stands."""
        return self._services.failures.segments(lambda left: self._generate(request, left), request.max_tokens)

    def _generate(self, request: SegmentRequest, max_tokens: int) -> AsyncGenerator[Segment, None]:
        begins = data_of(request.prefix.turn_start).begins
        return self._services.engine.generate(
            self.prompt if begins is None else begins.prompt,
            response_ids(self.search.leaf(request.path_id)),
            max_tokens=max_tokens,
            segment_tokens=request.segment_tokens,
            seed=request.seed if self._services.seeded else None,
            placement=self._placement,
        )

    def _evicted(self, request: SegmentRequest, segment: Segment) -> int:
        """Tokens of full KV blocks that a request's prefix had filled and that were gone when it came."""
        if request.prefix.parent is None:
            return 0
        # The engine samples from the last token, which therefore is never in the cache; nor is what is new to it.
        computed = request.prefix if request.prefix.sampled else request.prefix.parent
        known = len(self.prompt.token_ids) + computed.length - 1
        block = self._services.engine.info.block_size
        return max(known // block * block - segment.cached_tokens, 0)
