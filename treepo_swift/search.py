"""The tree search as a pure state machine: segment results go in, segment requests come out.

It does no I/O and knows no clock. Whoever drives it (the async scheduler, a test, a synchronous engine) hands every
request to an engine and reports what came back, in any order.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .config import TreeConfig
from .policies import branching, fallback
from .tree import Node, Path, StopReason, Tree

MAX_FAILURES_PER_WIDTH = 2
"""A tree gives up and fills itself with placeholders after this many failed segments per wanted trajectory."""


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """Ask of the engine: continue ``prompt + tokens up to prefix`` by at most `max_tokens`."""

    id: int
    prefix: Node
    max_tokens: int
    seed: int
    """For engines that are asked to sample reproducibly: no two requests of a tree share it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What the engine sampled for a request."""

    token_ids: list[int]
    logprobs: list[float]
    stop: StopReason | None = None
    """EOS or STOP_STRING where the engine saw the response end, None where it used up its `max_tokens`."""
    text: str = ''


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits of a response, in tokens."""

    max_response: int
    max_context: int
    """Prompt and response together (the engine's model length)."""


class TreeSearch:
    """Grows one tree of `width` trajectories in lockstep (TreePO, arXiv 2508.17445).

    All live paths of a tree advance by one segment; when the last of them is back, the boundary decides how the
    live ones branch. When none is live and trajectories are missing, fallback starts new branches from prefixes of
    finished ones. Trees do not wait for each other. ``width == 1`` is plain sampling, still in segments.

    Use::

        requests = search.start()
        # for each request, when its answer is there (or else: requests += search.fail(request.id, 'why')):
        path = search.extend(request.id, segment)
        requests += search.settle(request.id, verdict)
        # until search.done; then read search.tree.trajectories, always exactly `width` of them.
    """
    def __init__(self, config: TreeConfig, *, tree_id: str, prompt_ids: list[int], width: int, limits: Limits,
                 rng: random.Random) -> None:
        if width < 1:
            raise ValueError(f'width={width}: a tree has at least one trajectory.')
        self.config = config
        self.width = width
        self.limits = limits
        self.tree = Tree(tree_id, prompt_ids)
        self._rng = rng
        self._branch = branching.branching_policies['even']
        self._pending: dict[int, Path] = {}
        self._survivors: list[Path] = []
        self._ended = 0
        self._started = False
        self.last_error = ''

    # What a driver calls.

    @property
    def done(self) -> bool:
        return len(self.tree.trajectories) == self.width

    def start(self) -> list[SegmentRequest]:
        """The first requests, all from the prompt."""
        if self._started:
            raise RuntimeError(f'Tree {self.tree.id} was started before.')
        self._started = True
        room = self.limits.max_context - len(self.tree.prompt_ids)
        if room < 1:
            self.give_up(f'the prompt has {len(self.tree.prompt_ids)} tokens and the engine takes '
                         f'{self.limits.max_context} in all, so that no room is left for a response')
            return []
        first = self.config.root_divergence
        if isinstance(first, tuple):
            first = self._rng.randint(*first)
        count = min(first, self.width)
        self.tree.stats.forks += count - 1
        return [self._request(Path(self.tree.root)) for _ in range(count)]

    def extend(self, request_id: int, segment: Segment) -> Path:
        """Append what was sampled for a request to its path and return the path, for hooks to look at."""
        path = self._pending[request_id]
        self.tree.stats.decoded_tokens += len(segment.token_ids)
        path.leaf = self.tree.add_node(path.leaf, segment.token_ids, segment.logprobs, segment.text)
        path.stop = segment.stop
        return path

    def stop_of(self, request_id: int, verdict: StopReason | None) -> StopReason | None:
        """Why the path of an extended request ends here, or None; `verdict` is what the checks of its text said.

        An answer comes first: it is what fallback looks for, whether or not EOS follows it.
        """
        path = self._pending[request_id]
        if verdict is StopReason.ANSWER:
            return verdict
        return path.stop or verdict or self._limit_reached(path.leaf)

    def settle(self, request_id: int, verdict: StopReason | None = None) -> list[SegmentRequest]:
        """Close a request after `extend`.

        Returns the requests that may start now: none until the last live path of the wave is back.
        """
        stop = self.stop_of(request_id, verdict)
        path = self._pending.pop(request_id)
        path.stop = stop
        if stop is None:
            self._survivors.append(path)
        else:
            self._finish(path)
        return self._boundary()

    def fail(self, request_id: int, error: str) -> list[SegmentRequest]:
        """Report that a request could not be answered or checked. Its budget goes to the tree's other paths."""
        self._pending.pop(request_id)
        self.tree.stats.failures += 1
        self.last_error = error
        self._ended += 1
        return self._boundary()

    def give_up(self, error: str) -> None:
        """Fill what is missing with failed placeholders; they have no tokens and take part in no baseline."""
        while not self.done:
            self.tree.trajectories.append(Path(self.tree.root, stop=StopReason.FAILED, error=error))

    # Machinery.

    def _request(self, path: Path) -> SegmentRequest:
        used = path.leaf.length
        room = min(self.limits.max_response - used, self.limits.max_context - len(self.tree.prompt_ids) - used)
        self.tree.stats.engine_requests += 1
        request = SegmentRequest(self.tree.stats.engine_requests, path.leaf, min(self.config.segment_length, room),
                                 self._rng.getrandbits(31))
        self._pending[request.id] = path
        return request

    def _limit_reached(self, node: Node) -> StopReason | None:
        if node.length >= self.limits.max_response:
            return StopReason.TOKEN_LIMIT
        if len(self.tree.prompt_ids) + node.length >= self.limits.max_context:
            return StopReason.CONTEXT_LIMIT
        if node.depth >= self.config.max_depth:
            return StopReason.DEPTH_LIMIT
        return None

    def _finish(self, path: Path) -> None:
        self._ended += 1
        self.tree.trajectories.append(path)
        self.tree.stats.trajectory_tokens += path.leaf.length

    def _boundary(self) -> list[SegmentRequest]:
        if self._pending or self.done:
            return []
        if self.tree.stats.failures >= MAX_FAILURES_PER_WIDTH * self.width:
            self.give_up(f'{self.tree.stats.failures} segments of this tree failed, the last one: {self.last_error}')
            return []
        live, self._survivors = self._survivors, []
        ended, self._ended = self._ended, 0
        return self._fork(live, ended) if live else self._fall_back()

    def _fork(self, live: list[Path], ended: int) -> list[SegmentRequest]:
        total = branching.next_width(
            live=len(live),
            finished=len(self.tree.trajectories),
            ended=ended,
            width=self.width,
            divergence=self.config.divergence)
        requests = []
        for path, count in zip(live, self._branch(live, total, self._rng), strict=True):
            self.tree.stats.forks += count - 1
            requests += [self._request(replace(path)) for _ in range(count)]
        return requests

    def _fall_back(self) -> list[SegmentRequest]:
        starts = fallback.random_segment(
            self.tree.trajectories,
            self.tree.root,
            needed=self.width - len(self.tree.trajectories),
            divergence=self.config.divergence,
            rng=self._rng)
        self.tree.stats.fallbacks += len(starts)
        return [self._request(Path(node, fallback_from=index)) for node, index in starts]
