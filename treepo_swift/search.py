"""The tree search as a pure state machine: segment results go in, segment requests come out.

It does no I/O and knows no clock. Whoever drives it (the async scheduler, a test, a synchronous engine) hands every
request to an engine and reports what came back, in any order.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Iterable, Sequence

from .config import TreeConfig
from .policies import fallback
from .policies.branching import BranchContext, branching_policies, next_width, paced_width
from .policies.stopping import TextState
from .tree import Node, Path, StopReason, Tree

MAX_FAILURES_PER_WIDTH = 2
"""A tree gives up and fills itself with placeholders after this many failed segments per wanted trajectory."""


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """Ask of the engine: continue ``prompt + tokens up to prefix`` by at most `max_tokens`."""

    id: int
    """Becomes the id of the segment's node."""
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
    entropies: list[float] | None = None
    """Entropy at each token in nats, where it was asked for."""
    cached_tokens: int = 0
    """Tokens of the request's input that the engine found in its prefix cache."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits of a response, in tokens."""

    max_response: int
    max_context: int
    """Prompt and response together (the engine's model length)."""


@lru_cache(maxsize=8)
def _ranks(stop_order: tuple[str, ...]) -> dict[StopReason, int]:
    return {reason: rank for rank, reason in enumerate(dict.fromkeys([*map(StopReason, stop_order), *StopReason]))}


def first_reason(reasons: Iterable[StopReason], config: TreeConfig) -> StopReason | None:
    """The one that counts of several stop reasons that hold at once, None where there is none."""
    return min(reasons, key=_ranks(config.stop_order).__getitem__, default=None)


def text_verdict(state: TextState, path: Path, config: TreeConfig) -> StopReason | None:
    """Why a path should stop by what its text checks know, None where it should not."""
    answered = state.answer and (path.stop is StopReason.EOS or not config.answer_needs_eos)
    reasons = ([StopReason.ANSWER] if answered else []) + ([StopReason.REPETITION] if state.repetition else [])
    return first_reason(reasons, config)


def check_policies(config: TreeConfig) -> None:
    """Raise ``ValueError`` where `config` names a policy that nobody registered."""
    branching_policies[config.branching]
    if config.fallback not in ('root', 'none'):
        fallback.cut_policies[config.fallback]


class TreeSearch:
    """Grows one tree of `width` trajectories in lockstep (TreePO, arXiv 2508.17445).

    All live paths of a tree advance by one segment; when the last of them is back, the boundary decides how the
    live ones branch. When none is live and trajectories are missing, fallback starts new branches from prefixes of
    finished ones. Trees do not wait for each other, unless they share a token budget per depth: then `waiting`
    turns true at a boundary, and `resume` goes on. ``width == 1`` is plain sampling, still in segments.

    Use::

        requests = search.start()
        # for each request, when its answer is there (or else: requests += search.fail(request.id, 'why')):
        path = search.extend(request.id, segment)
        requests += search.settle(request.id, verdict)
        # until search.done; then read search.tree.trajectories, always exactly `width` of them.
    """
    def __init__(self,
                 config: TreeConfig,
                 *,
                 tree_id: str,
                 prompt_ids: list[int],
                 width: int,
                 limits: Limits,
                 rng: random.Random,
                 progress: float = 0.0) -> None:
        """`progress` is the share of the training that is done, for scheduled temperatures."""
        if width < 1:
            raise ValueError(f'width={width}: a tree has at least one trajectory.')
        check_policies(config)
        self.config = config
        self.width = width
        self.limits = limits
        self.tree = Tree(tree_id, prompt_ids)
        self.waiting = False
        """Whether all live paths are at a boundary and `resume` has to share the budget out."""
        self._rng = rng
        self._context = BranchContext(config, rng, progress)
        self._pending: dict[int, Path] = {}
        # What came back of this wave, by request: the order in which answers arrive must not matter.
        self._survivors: dict[int, Path] = {}
        self._finished: dict[int, Path] = {}
        self._ended = 0
        self._first = 0
        self._started = False
        self.last_error = ''

    # What a driver calls.

    @property
    def done(self) -> bool:
        return len(self.tree.trajectories) == self.width

    def start(self, share: int | None = None) -> list[SegmentRequest]:
        """The first requests, all from the prompt; for `share` see `resume`."""
        if self._started:
            raise RuntimeError(f'Tree {self.tree.id} was started before.')
        self._started = True
        room = self.limits.max_context - len(self.tree.prompt_ids)
        if room < 1:
            self.give_up(f'the prompt has {len(self.tree.prompt_ids)} tokens and the engine takes '
                         f'{self.limits.max_context} in all, so that no room is left for a response')
            return []
        first = min(self._draw(self.config.root_divergence), self.width)
        first = min(first, paced_width(self.config, width=self.width, depth=1, first=first))
        self._first = min(first, self._affordable([Path(self.tree.root)], share))
        self.tree.stats.forks += self._first - 1
        return self._launch([Path(self.tree.root)] * self._first)

    def extend(self, request_id: int, segment: Segment) -> Path:
        """Append what was sampled for a request to its path and return the path, for hooks to look at."""
        path = self._pending[request_id]
        self.tree.stats.decoded_tokens += len(segment.token_ids)
        self.tree.stats.input_tokens += len(self.tree.prompt_ids) + path.leaf.length
        self.tree.stats.cached_tokens += segment.cached_tokens
        path.leaf = self.tree.add_node(request_id, path.leaf, segment.token_ids, segment.logprobs, segment.entropies)
        path.stop = segment.stop
        return path

    def stop_of(self, request_id: int, verdict: StopReason | None) -> StopReason | None:
        """Why the path of an extended request ends here, or None; `verdict` is what the checks of its text said.

        Where several reasons hold, the first in `stop_order` counts. By default that is an answer: it is what
        fallback looks for, whether or not EOS follows it.
        """
        path = self._pending[request_id]
        return first_reason({path.stop, verdict, *self._limits_reached(path.leaf)} - {None}, self.config)

    def cut(self, request_id: int, count: int) -> None:
        """Keep only the first `count` tokens of what was sampled last for a request."""
        leaf = self._pending[request_id].leaf
        del leaf.token_ids[count:], leaf.logprobs[count:]
        if leaf.entropies is not None:
            del leaf.entropies[count:]
        leaf.length = leaf.parent.length + count
        leaf.text = leaf.text_state = None

    def settle(self, request_id: int, verdict: StopReason | None = None) -> list[SegmentRequest]:
        """Close a request after `extend`.

        Returns the requests that may start now: none until the last live path of the wave is back.
        """
        stop = self.stop_of(request_id, verdict)
        path = self._pending.pop(request_id)
        path.stop = stop
        (self._survivors if stop is None else self._finished)[request_id] = path
        return self._boundary()

    def fail(self, request_id: int, error: str) -> list[SegmentRequest]:
        """Report that a request could not be answered or checked. Its budget goes to the tree's other paths."""
        self._pending.pop(request_id)
        self.tree.stats.failures += 1
        self.last_error = error
        self._ended += 1
        return self._boundary()

    def resume(self, share: int | None = None) -> list[SegmentRequest]:
        """Branch at the boundary where the tree waits; `share` is its part of the depth's tokens."""
        self.waiting = False
        live = [path for _, path in sorted(self._survivors.items())]
        self._survivors.clear()
        ended, self._ended = self._ended, 0
        requests = self._fork(live, ended, share) if live else self._fall_back(share)
        # A token budget that is used up ends paths without a request.
        return requests or self._boundary()

    def give_up(self, error: str) -> None:
        """Fill what is missing with failed placeholders; they have no tokens and take part in no baseline."""
        while not self.done:
            self._fill(StopReason.FAILED, error)

    # Machinery.

    def _draw(self, number: int | tuple[int, int]) -> int:
        return self._rng.randint(*number) if isinstance(number, tuple) else number

    def _limits_reached(self, node: Node) -> list[StopReason]:
        reached = []
        if node.length >= self.limits.max_response:
            reached.append(StopReason.TOKEN_LIMIT)
        if len(self.tree.prompt_ids) + node.length >= self.limits.max_context:
            reached.append(StopReason.CONTEXT_LIMIT)
        if node.depth >= self.config.max_depth:
            reached.append(StopReason.DEPTH_LIMIT)
        return reached

    def _finish(self, path: Path) -> None:
        self._ended += 1
        self.tree.trajectories.append(path)
        self.tree.stats.trajectory_tokens += path.leaf.length

    def _fill(self, stop: StopReason, error: str) -> None:
        self.tree.trajectories.append(Path(self.tree.root, stop=stop, error=error))

    def _boundary(self) -> list[SegmentRequest]:
        if self._pending:
            return []
        for _, path in sorted(self._finished.items()):
            self._finish(path)
        self._finished.clear()
        if self.done:
            return []
        if self.tree.stats.failures >= MAX_FAILURES_PER_WIDTH * self.width:
            self.give_up(f'{self.tree.stats.failures} segments of this tree failed, the last one: {self.last_error}')
            return []
        grows_on = self._survivors or (self.config.fallback, self.config.fallback_fill) != ('none', 'placeholder')
        if self.config.budget == 'by_segment_tokens' and grows_on:
            self.waiting = True
            return []
        return self.resume()

    def _fork(self, live: list[Path], ended: int, share: int | None) -> list[SegmentRequest]:
        finished = len(self.tree.trajectories)
        depth = 1 + max(path.leaf.depth for path in live)
        cap = min(self.width, paced_width(self.config, width=self.width, depth=depth, first=self._first))
        total = next_width(
            live=len(live),
            finished=finished,
            ended=ended,
            width=min(cap, finished + self._affordable(live, share)),
            divergence=self._draw(self.config.divergence))
        counts = branching_policies[self.config.branching](live, total, self._context)
        if len(counts) != len(live) or sum(counts) != total or min(counts) < 1:
            raise ValueError(f'branching policy {self.config.branching!r} returned {counts} for {len(live)} live paths '
                             f'and {total} branches: it must give every path at least one, and all of them out.')
        # Every path once before any twice: a token budget that runs out takes the forks, not the paths.
        starts = [replace(path) for round_ in range(max(counts)) for path, n in zip(live, counts) if round_ < n]
        requests = self._launch(self._within_budget(starts, keep=len(live)))
        self.tree.stats.forks += max(len(requests) - len(live), 0)
        return requests

    def _fall_back(self, share: int | None) -> list[SegmentRequest]:
        missing = self.width - len(self.tree.trajectories)
        grown = [path for path in self.tree.trajectories if path.leaf.length]
        requests = self._launch(self._fallback_starts(min(missing, self._affordable(grown, share))))
        self.tree.stats.fallbacks += len(requests)
        if not requests:
            for index in range(missing):
                failed = index < self.tree.stats.failures
                self._fill(StopReason.FAILED if failed else StopReason.ABSENT,
                           self.last_error if failed else 'no budget or no fallback was left to grow it')
        return requests

    def _fallback_starts(self, needed: int) -> list[Path]:
        root, config = self.tree.root, self.config
        if config.fallback == 'none':
            return self._within_budget([Path(root, fallback_from=-1)] *
                                       needed) if config.fallback_fill == 'root' else []
        divergence = self._draw(config.divergence)
        chosen = fallback.candidates(self.tree.trajectories, config, self._rng) if config.fallback != 'root' else []
        if not chosen:
            return self._within_budget([Path(root, fallback_from=-1)] * min(divergence, needed))
        starts: list[Path] = []
        for index in chosen:
            path = self.tree.trajectories[index]
            context = fallback.cut_context(path, config, self._rng)
            position = fallback.cut_policies[config.fallback](path, context)
            if not context.low <= position <= context.high:
                raise ValueError(f'fallback {config.fallback!r} returned {position}, allowed are {context.low} to '
                                 f'{context.high}.')
            for _ in range(min(divergence, needed - len(starts))):
                if self._covers([*(start.leaf.length for start in starts), position]):
                    starts.append(Path(self.tree.node_at(path, position), fallback_from=index))
        return starts

    # Budgets.

    def _affordable(self, paths: Sequence[Path], share: int | None) -> int:
        """Most paths like `paths` that the token budgets let grow by a segment, at least one."""
        length, config = self.config.segment_length, self.config
        if config.budget == 'by_segment_tokens' and share is not None:
            return max(share // length, 1)
        if config.budget == 'by_trajectory_tokens':
            left = config.budget_tokens - self.tree.stats.trajectory_tokens
            mean = sum(path.leaf.length for path in paths) / max(len(paths), 1)
            return max(int(left // (mean + length)), 1)
        return self.width

    def _covers(self, lengths: Sequence[int]) -> bool:
        """Whether a budget of trajectory tokens covers paths of these lengths with a token more each."""
        if self.config.budget != 'by_trajectory_tokens':
            return True
        return sum(lengths) + len(lengths) <= self.config.budget_tokens - self.tree.stats.trajectory_tokens

    def _within_budget(self, starts: list[Path], keep: int = 0) -> list[Path]:
        """The first of `starts` that the budget covers, `keep` of them in any case."""
        while len(starts) > keep and not self._covers([path.leaf.length for path in starts]):
            starts = starts[:-1]
        return starts

    def _launch(self, starts: Sequence[Path]) -> list[SegmentRequest]:
        """Requests for `starts`; where a budget of trajectory tokens lets none of them go on, all end here."""
        limit = self.config.segment_length
        if self.config.budget == 'by_trajectory_tokens' and starts:
            left = self.config.budget_tokens - self.tree.stats.trajectory_tokens
            limit = min(limit, (left - sum(path.leaf.length for path in starts)) // len(starts))
        if limit < 1:
            for path in starts:
                path.stop = StopReason.TOKEN_LIMIT
                self._finish(path)
            return []
        return [self._request(replace(path), limit) for path in starts]

    def _request(self, path: Path, limit: int) -> SegmentRequest:
        used = path.leaf.length
        room = min(self.limits.max_response - used, self.limits.max_context - len(self.tree.prompt_ids) - used)
        self.tree.stats.engine_requests += 1
        request = SegmentRequest(self.tree.new_id(), path.leaf, min(limit, room), self._rng.getrandbits(31))
        self._pending[request.id] = path
        return request
