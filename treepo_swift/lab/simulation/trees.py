"""Trees that the real `TreeSearch` grows from tokens that nobody sampled: only how many there are is simulated."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from treepo_swift.core.messages import Segment, SegmentRequest
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Node, StopReason
from treepo_swift.lab.lengths import LengthDistribution


@lru_cache(maxsize=1024)
def _zeros(count: int) -> tuple[Any, Any]:
    """Token ids and log-probs of a segment, the same for all trees: arrays, where an engine gives lists."""
    return array('i', bytes(4 * count)), array('f', bytes(4 * count))


@dataclass(slots=True, eq=False)
class Kept:
    """The tokens of a node in an engine's KV cache."""

    tokens: int
    holders: int = 0
    """Running requests that use them."""


@dataclass(slots=True, eq=False)
class Request:
    """An engine request. Its counts are of the engine step `since`, and those of running ones lag behind."""

    tree: GrowingTree
    path_id: int
    prefix: Node
    """The path's last complete segment."""
    segment_tokens: int
    left: int
    """Tokens still to sample."""
    eos: bool
    """Whether the response then ends by itself."""
    context: int
    """Tokens of prompt and response so far."""
    unreported: int = 0
    """Those of them that are in no node yet."""
    order: tuple[int, int] = (0, 0)
    """Lower goes first."""
    since: int = 0
    due: int = 0
    """Engine step after which it has something to report."""
    held: list[Kept] = field(default_factory=list)
    """What it uses of the KV cache beside its unreported tokens, while it runs."""

    @property
    def to_report(self) -> int:
        """Tokens until it reports: the end, or the token that tells that a segment before it is complete."""
        return min(self.left, self.segment_tokens + 1 - self.unreported)


Keep = Callable[[Request, Node], None]


class GrowingTree:
    """One tree: requests that have something to report go in, new requests come out.

    Each path draws its length when it starts, given that it is longer than its prefix, by a generator of its own:
    all schedules, engines and orders grow the same tree. A response whose length is at the limit was cut there;
    a shorter one ends with EOS. Log-probs are all zero, so policies that weigh by them see ties.
    """

    def __init__(self, search: TreeSearch, lengths: LengthDistribution, *, age: int, rank: int) -> None:
        """`age`: how many trees started before it; `rank`: the engine of its server where it grows."""
        self.search = search
        self.age = age
        self.rank = rank
        self.segments = 0
        self.kept = {search.tree.root: Kept(len(search.tree.prompt_ids))}
        """Of the nodes that an engine has heard of."""
        self._lengths = lengths
        self._length_of: dict[int, int] = {}

    def start(self, allowance: int | None) -> list[Request]:
        return self._requests(self.search.start(allowance))

    def resume(self, allowance: int) -> list[Request]:
        return self._requests(self.search.resume(allowance))

    def report(self, request: Request, keep: Keep) -> list[Request]:
        """Put the complete segments of `request` into the tree; `keep` hears of each node."""
        requests = []
        while request.unreported > request.segment_tokens:
            requests += self._extend(request, request.segment_tokens, None, keep)
        if not request.left:
            requests += self._extend(request, request.unreported, StopReason.EOS if request.eos else None, keep)
        return requests

    def _extend(self, request: Request, count: int, stop: StopReason | None, keep: Keep) -> list[Request]:
        self.segments += 1
        tokens, logprobs = _zeros(count)
        path = self.search.extend(request.path_id, Segment(tokens, logprobs, stop, logprobs))
        path.leaf.token_ids, path.leaf.logprobs = tokens, logprobs  # The node's own copies would fill the memory.
        request.prefix = path.leaf
        request.unreported -= count
        keep(request, path.leaf)
        return self._requests(self.search.settle(request.path_id))

    def _requests(self, asked: list[SegmentRequest]) -> list[Request]:
        return [self._request(ask) for ask in asked]

    def _request(self, ask: SegmentRequest) -> Request:
        done = ask.prefix.length
        if ask.path_id not in self._length_of:
            self._length_of[ask.path_id] = self._lengths.draw(random.Random(ask.seed), longer_than=done)
        length = self._length_of[ask.path_id]
        return Request(
            self,
            ask.path_id,
            ask.prefix,
            ask.segment_tokens,
            left=min(ask.max_tokens, length - done),
            eos=length - done <= ask.max_tokens and length < self.search.limits.max_response,
            context=len(self.search.tree.prompt_ids) + done,
        )
