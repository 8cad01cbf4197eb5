"""One engine: running and waiting requests, step time and KV cache, many steps at a time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from heapq import heappop, heappush
from operator import attrgetter

from treepo_swift.core.tree import Node

from .model import EngineModel
from .trees import GrowingTree, Kept, Request


class SimulatedEngine:
    """Continuous batching as vLLM does it, in events: between two of them the same sequences run.

    A request joins at the next step, its uncached tokens are computed in that step, and every step samples one token
    of each. The step after an event starts before anybody has reacted to it, so that the reaction joins one step later.

    The KV cache holds the tokens of running requests, shared ones once (blocks are not rounded up). Requests wait until
    they fit, and where the running ones outgrow it, the last of them in the order of the queue is preempted: it waits
    again and computes its tokens anew. What nobody uses stays until its tree is done or, the longest unused first,
    somebody needs the room. Which blocks of it are there is decided by node.

    Use::

        engine.submit(requests, now)
        # until engine.next_time is inf; whoever has several engines takes the one that is next:
        reports = engine.advance()     # at engine.time
        for request in reports: ...    # request.tree.report(request, engine.keep) gives new requests
        engine.schedule()
        engine.submit(new requests, engine.time)
    """

    def __init__(self, model: EngineModel, *, by_age: bool) -> None:
        """`by_age`: requests of the oldest tree go first, otherwise the request that came first."""
        self.model = model
        self.time = 0.0
        self.next_time = math.inf
        self.peak_kv_tokens = 0
        self.prefill_tokens = 0
        self.preemptions = 0
        self.batches: list[tuple[float, int]] = [(0.0, 0)]
        """From when on how many sequences ran."""
        self._by_age = by_age
        self._step = 0
        self._ahead = 0
        """Steps until the next event."""
        self._prefill = 0
        """Tokens to compute in the next step."""
        self._running: set[Request] = set()
        self._due: list[tuple[int, tuple[int, int], Request]] = []
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._arrived: list[Request] = []
        self._arrivals = 0
        self._held = 0
        """Tokens of nodes that running requests use."""
        self._unused: OrderedDict[Kept, None] = OrderedDict()
        """Of the other nodes those that are still in the cache, the longest unused first."""
        self._unused_tokens = 0
        # Sums over the running requests, each less the step number as it was then: they stay as they are while
        # all of them grow by a token a step.
        self._contexts = 0
        self._unreported = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens of running requests in the KV cache."""
        return self._held + self._unreported + len(self._running) * self._step

    def submit(self, requests: list[Request], now: float) -> None:
        """Take requests that come at `now`, no earlier than `time` and before `next_time`."""
        for request in requests:
            self._arrivals += 1
            request.order = (request.tree.age if self._by_age else 0, self._arrivals)
        self._arrived += requests
        if self._running:
            self._ahead = 1 + bisect_right(range(1, self._ahead), now - self.time, key=self._seconds)
            self.next_time = self.time + self._seconds(self._ahead)
        else:
            self.time = now
            self._queue_arrived()
            self.schedule()

    def advance(self) -> list[Request]:
        """Go on to the next event; returns the requests that have something to report, the ended ones removed."""
        self.time = self.next_time
        self._step += self._ahead
        self._prefill = 0
        self.peak_kv_tokens = max(self.peak_kv_tokens, self.kv_tokens)
        self._evict()
        reports = []
        while self._due and self._due[0][0] == self._step:
            request = heappop(self._due)[-1]
            if request.due != self._step:
                continue  # It was preempted, and is due later.
            self._catch_up(request)
            reports.append(request)
            if not request.left:
                self._remove(request)
        self._queue_arrived()
        return reports

    def keep(self, request: Request, node: Node) -> None:
        """Other requests may share the tokens of `node`, until now unreported ones of `request`."""
        kept = request.tree.kept[node] = Kept(len(node.token_ids))
        if not request.left:
            self._put_aside(kept)
            return
        self._unreported -= kept.tokens
        self._hold(request, kept)
        self._await(request)

    def forget(self, tree: GrowingTree) -> None:
        """Drop what the cache has of a tree that is done."""
        for kept in tree.kept.values():
            self._take_up(kept)

    def schedule(self) -> None:
        """Choose who runs from now on, and until when nothing changes."""
        preempted = self._make_room()
        if not preempted:
            self._admit()
        running = len(self._running)
        if running != self.batches[-1][1]:
            self.batches.append((self.time, running))
        if not running:
            self.next_time = math.inf
            return
        # Nobody is admitted in the step of a preemption, and whoever is next in the queue may fit in the one after it.
        self._ahead = 1 if preempted else self._due[0][0] - self._step
        if self.model.kv_tokens:
            self._ahead = max(min(self._ahead, (self.model.kv_tokens - self.kv_tokens) // running), 1)
        self.next_time = self.time + self._seconds(self._ahead)

    # Steps and queues.

    def _seconds(self, steps: int) -> float:
        running = len(self._running)
        return self.model.seconds(
            steps,
            sequences=running,
            context=self._contexts + running * self._step,
            kv=self.kv_tokens,
            prefill=self._prefill,
        )

    def _queue_arrived(self) -> None:
        for request in self._arrived:
            heappush(self._waiting, (request.order, request))
        self._arrived = []

    def _await(self, request: Request) -> None:
        request.due = self._step + request.to_report
        heappush(self._due, (request.due, request.order, request))

    def _catch_up(self, request: Request) -> None:
        steps = self._step - request.since
        request.since = self._step
        request.left -= steps
        request.unreported += steps
        request.context += steps

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.model.max_sequences:
            request = self._waiting[0][-1]
            prefix = self._prefix(request)
            if not self._fits(request, prefix):
                return
            heappop(self._waiting)
            self._start(request, prefix)

    def _start(self, request: Request, prefix: list[Kept]) -> None:
        cached = self._cached(prefix)
        uncached = request.context - min(cached, request.context - 1) // self.model.block_size * self.model.block_size
        self._prefill += uncached
        self.prefill_tokens += uncached
        for kept in prefix:
            self._hold(request, kept)
        self._running.add(request)
        request.since = self._step
        self._contexts += request.context - self._step
        self._unreported += request.unreported - self._step
        self._evict()
        self._await(request)

    def _remove(self, request: Request) -> None:
        self._running.remove(request)
        self._contexts -= request.context - self._step
        self._unreported -= request.unreported - self._step
        # The end of a path is of less use than its beginning.
        for kept in reversed(request.held):
            kept.holders -= 1
            if not kept.holders:
                self._held -= kept.tokens
                self._put_aside(kept)
        request.held = []

    # KV cache.

    def _prefix(self, request: Request) -> list[Kept]:
        """What the cache knows of the request's nodes, prompt first."""
        nodes = request.tree.kept
        prefix = [nodes[request.tree.search.tree.root]]
        for node in request.prefix.lineage():
            kept = nodes.get(node)
            if kept is None:
                kept = self._split(nodes, node)
            prefix.append(kept)
        return prefix

    def _split(self, nodes: dict[Node, Kept], node: Node) -> Kept:
        """Take `node` for the upper part of a segment: it was computed with the lower one, and is used and kept as
        that is."""
        lower = next(known for known in nodes if _upper_parts(known, nodes, node))
        below, kept = nodes[lower], Kept(len(node.token_ids))
        nodes[node] = kept
        self._shrink(below, len(lower.token_ids))
        if below in self._unused:
            self._put_aside(kept)
        for request in self._running if below.holders else ():
            if below in request.held:
                self._hold(request, kept)
                request.held.insert(request.held.index(below), request.held.pop())
        return kept

    def _cached(self, prefix: list[Kept]) -> int:
        """Tokens from the beginning of the prompt that need not be computed."""
        tokens = 0
        for kept in prefix:
            if not kept.holders and kept not in self._unused:
                break
            tokens += kept.tokens
        return tokens

    def _fits(self, request: Request, prefix: list[Kept]) -> bool:
        """Whether there is room for `request` and then for a step of everybody."""
        needed = request.unreported + sum(kept.tokens for kept in prefix if not kept.holders)
        room = self.model.kv_tokens - self.kv_tokens - len(self._running) - 1
        return not self.model.kv_tokens or needed <= room

    def _hold(self, request: Request, kept: Kept) -> None:
        if not kept.holders:
            self._take_up(kept)
            self._held += kept.tokens
        kept.holders += 1
        request.held.append(kept)

    def _put_aside(self, kept: Kept) -> None:
        self._unused[kept] = None
        self._unused_tokens += kept.tokens

    def _take_up(self, kept: Kept) -> None:
        if kept in self._unused:
            del self._unused[kept]
            self._unused_tokens -= kept.tokens

    def _shrink(self, kept: Kept, tokens: int) -> None:
        """The rest of them are those of a node above it now."""
        if kept.holders:
            self._held += tokens - kept.tokens
        elif kept in self._unused:
            self._unused_tokens += tokens - kept.tokens
        kept.tokens = tokens

    def _make_room(self) -> bool:
        """Preempt requests until the others fit for another step; returns whether there were any."""
        capacity, before = self.model.kv_tokens, self.preemptions
        while capacity and len(self._running) > 1 and self.kv_tokens + len(self._running) > capacity:
            request = max(self._running, key=_order)
            self._catch_up(request)
            self._remove(request)
            request.due = 0
            heappush(self._waiting, (request.order, request))
            self.preemptions += 1
        return self.preemptions > before

    def _evict(self) -> None:
        while self.model.kv_tokens and self._unused and self.kv_tokens + self._unused_tokens > self.model.kv_tokens:
            kept, _ = self._unused.popitem(last=False)
            self._unused_tokens -= kept.tokens


def _upper_parts(lower: Node, nodes: dict[Node, Kept], node: Node) -> bool:
    """Whether `node` stands above `lower` with nothing between the two that the cache knows of."""
    above = lower.parent
    while above is not None and above is not node and above not in nodes:
        above = above.parent
    return above is node


_order = attrgetter('order')
