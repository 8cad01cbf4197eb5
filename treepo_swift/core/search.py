"""The tree search as a pure state machine: segments go in, engine requests come out.

It does no I/O and knows no clock. Whoever drives it (the async scheduler, a test, a synchronous engine) hands every
request to an engine and reports what came back, in any order.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from treepo_swift.config import TreeConfig
from treepo_swift.core.policies.branching import (
    BranchContext,
    branching_policies,
    may_fork,
    most_leaves,
    next_width,
    paced_width,
)
from treepo_swift.core.policies.stopping import first_reason

from .messages import Limits, NextTurn, Segment, SegmentRequest
from .policies import fallback
from .tree import Node, Path, StopReason, Tree, sampled_tokens, turns_before

MAX_FAILURES_PER_WIDTH = 2
"""A tree gives up and fills itself with placeholders after this many failed segments per wanted trajectory."""


@dataclass(slots=True)
class _Round:
    """A segment of every path that grew at one time: they branch together when the last of them is back."""

    growing: set[int] = field(default_factory=set)
    # By path id: the order in which answers arrive must not matter.
    survivors: dict[int, Node] = field(default_factory=dict)
    finished: dict[int, Path] = field(default_factory=dict)
    failed: int = 0


def check_policies(config: TreeConfig) -> None:
    """Raise ``ValueError`` where `config` names a policy that nobody registered."""
    branching_policies[config.branching]
    if config.fallback not in ('root', 'none'):
        fallback.cut_policies[config.fallback]


class TreeSearch:
    """Grows one tree of `width` trajectories (TreePO, arXiv 2508.17445).

    All live paths of a tree branch together, one boundary after the other: forks are decided when the last of them
    has reported its segment. When none is live and trajectories are missing, fallback starts new branches from
    prefixes of finished ones. ``width == 1`` is plain sampling, still in segments.

    Every live path has at least one branch, so a path need not stop where it forks. With ``schedule: stream`` it is
    one request that runs on, possibly past boundaries that are still to be decided; with ``lockstep`` it is a request
    a segment. Both grow the same tree. Trees do not wait for each other, unless they share a token budget per depth:
    then `waiting` turns true at a boundary, and `resume` goes on.

    Use::

        requests = search.start()
        # for each request, as its segments come (or else: requests += search.fail(request.path_id, 'why')):
        path = search.extend(request.path_id, segment)
        requests += search.settle(request.path_id, verdict)   # stop reading the request where path.stop is set
        # until search.done; then read search.tree.trajectories, always exactly `width` of them.

    A trajectory may take turns with an environment. Where one has ended, `begin_turn` instead of `settle` lets the path
    go on behind what the environment said; depth and response limits count anew in every turn.
    """

    def __init__(
        self,
        config: TreeConfig,
        *,
        tree_id: str,
        prompt_ids: list[int],
        width: int,
        limits: Limits,
        rng: random.Random,
        progress: float = 0.0,
    ) -> None:
        """`progress` is the share of the training that is done, for scheduled temperatures."""
        if width < 1:
            raise ValueError(f'width={width}: a tree has at least one trajectory.')
        check_policies(config)
        self.config = config
        self.width = width
        self.limits = limits
        self.tree = Tree(tree_id, prompt_ids)
        self.waiting = False
        """Whether a boundary waits for `resume` to share the budget out."""
        self._room = limits.max_context - len(prompt_ids)
        """Tokens that a path may have in all its turns."""
        self._rng = rng
        self._seed = rng.getrandbits(64)
        self._context = BranchContext(config, rng, progress)
        # A budget of trajectory tokens shrinks with what every path has taken, so each segment has to ask again.
        self._runs_on = config.schedule == 'stream' and config.budget != 'by_trajectory_tokens'
        self._last_path = 0
        self._paths: dict[int, Path] = {}
        self._round_of: dict[int, int] = {}
        self._rounds: defaultdict[int, _Round] = defaultdict(_Round)
        self._now = 0
        self._survivors: list[Path] = []
        self._ended = 0
        self._failed = 0
        self._spent = 0
        """Tokens of the trajectories, for the budget that counts them."""
        self._first = 0
        self._started = False
        self.last_error = ''

    # What a driver calls.

    def set_prompt(self, prompt_ids: list[int]) -> None:
        """Before `start`, where the prompt was not known when the search was made: an environment says it."""
        self.tree.prompt_ids = prompt_ids
        self._room = self.limits.max_context - len(prompt_ids)

    @property
    def done(self) -> bool:
        return len(self.tree.trajectories) == self.width

    @property
    def growing(self) -> int:
        """Paths that have not ended."""
        return len(self._paths)

    def start(self, share: int | None = None) -> list[SegmentRequest]:
        """The first requests, all from the prompt; for `share` see `resume`."""
        if self._started:
            raise RuntimeError(f'Tree {self.tree.id} was started before.')
        self._started = True
        if self._room < 1:
            self.give_up(
                f'the prompt has {len(self.tree.prompt_ids)} tokens and the engine takes '
                f'{self.limits.max_context} in all, so that no room is left for a response'
            )
            return []
        first = min(self._draw(self.config.root_divergence), self.width)
        first = min(first, self._paced_width(self.tree.root, first))
        self._first = min(first, self._affordable([Path(self.tree.root)], share))
        self.tree.stats.forks += self._first - 1
        return self._launch([Path(self.tree.root) for _ in range(self._first)])

    def path(self, path_id: int) -> Path:
        """A growing path."""
        return self._paths[path_id]

    def leaf(self, path_id: int) -> Node:
        """Where a growing path stands."""
        return self._paths[path_id].leaf

    def extend(self, path_id: int, segment: Segment) -> Path:
        """Append a segment to its path and return the path, for hooks to look at."""
        path = self._paths[path_id]
        self.tree.stats.decoded_tokens += len(segment.token_ids)
        self.tree.stats.cached_tokens += segment.cached_tokens
        path.leaf = self.tree.add_node(path.leaf, segment.token_ids, segment.logprobs, segment.entropies)
        path.stop = segment.stop
        return path

    def stop_of(self, path_id: int, verdict: StopReason | None) -> StopReason | None:
        """Why an extended path ends here, or None; `verdict` is what the checks of its text said.

        Where several reasons hold, the first in `stop_order` counts. By default that is an answer: it is what
        fallback looks for, whether or not EOS follows it.
        """
        path = self._paths[path_id]
        reached = self._limits_reached(path.leaf)
        if not reached and path.stop is None and verdict is None:
            return None
        return first_reason({path.stop, verdict, *reached} - {None}, self.config)

    def has_room(self, length: int) -> bool:
        """Whether a path of `length` tokens, environments included, may have one more."""
        return length < self._room

    def cut(self, path_id: int, count: int) -> None:
        """Keep only the first `count` tokens of a path's last segment."""
        leaf = self._paths[path_id].leaf
        del leaf.token_ids[count:], leaf.logprobs[count:]
        if leaf.entropies is not None:
            del leaf.entropies[count:]
        leaf.length = leaf.parent.length + count
        leaf.text = leaf.text_state = None

    def settle(self, path_id: int, verdict: StopReason | None = None) -> list[SegmentRequest]:
        """Close a segment after `extend`; sets the path's `stop` where it ends here.

        Returns the requests that may start now: none until the last live path of its round is back.
        """
        path = self._paths[path_id]
        path.stop = self.stop_of(path_id, verdict)
        number = self._leave(path_id)
        if path.stop is not None:
            self._rounds[number].finished[path_id] = self._paths.pop(path_id)
        else:
            self._rounds[number].survivors[path_id] = path.leaf
            if self._runs_on:
                self._join(path_id, number + 1)
        return self._boundaries()

    def begin_turn(self, path_id: int, following: NextTurn) -> list[SegmentRequest]:
        """Close a segment at which a turn has ended, and let the path go on with the next.

        Returns requests as `settle` does; the path's own is among them where it does not wait for its round.
        """
        path = self._paths[path_id]
        path.stop = None
        behind = self.tree.node_at(path, following.keep)
        path.leaf = self.tree.add_environment(behind, following.environment_ids, following.turn)
        number = self._leave(path_id)
        self._rounds[number].survivors[path_id] = path.leaf
        going_on = [self._request(path, self.config.segment_length, number + 1)] if self._runs_on else []
        return going_on + self._boundaries()

    def fail(self, path_id: int, error: str) -> list[SegmentRequest]:
        """Report that a path could not be continued or checked. Its budget goes to the tree's other paths."""
        del self._paths[path_id]
        self.tree.stats.failures += 1
        self.last_error = error
        self._rounds[self._leave(path_id)].failed += 1
        return self._boundaries()

    def resume(self, share: int | None = None) -> list[SegmentRequest]:
        """Branch at the boundary where the tree waits; `share` is its part of the depth's tokens."""
        if not self.waiting:
            raise RuntimeError(f'Tree {self.tree.id} does not wait for a share.')
        self.waiting = False
        return self._branch(share) + self._boundaries()

    def discard(self, tokens: int) -> None:
        """Count tokens that the engine sampled for nobody: past the end of a path, or in a request that failed."""
        self.tree.stats.decoded_tokens += tokens

    def give_up(self, error: str) -> None:
        """Fill what is missing with failed placeholders; they have no tokens and take part in no baseline."""
        while not self.done:
            self._fill(StopReason.FAILED, error)

    # Machinery.

    def _draw(self, number: int | tuple[int, int]) -> int:
        return self._rng.randint(*number) if isinstance(number, tuple) else number

    def _limits_reached(self, node: Node) -> list[StopReason]:
        start = node.turn_start
        reached = []
        if node.length - start.length >= self.limits.max_response:
            reached.append(StopReason.TOKEN_LIMIT)
        if node.length >= self._room:
            reached.append(StopReason.CONTEXT_LIMIT)
        if node.depth - start.depth >= self.config.max_depth:
            reached.append(StopReason.DEPTH_LIMIT)
        return reached

    def _finish(self, path: Path) -> None:
        self._ended += 1
        self._spent += path.leaf.length
        self.tree.stats.trajectory_tokens += sampled_tokens(path.leaf)
        self.tree.add_trajectory(path, last=len(self.tree.trajectories) + 1 == self.width)

    def _fill(self, stop: StopReason, error: str) -> None:
        path = Path(self.tree.root, stop=stop, error=error)
        self.tree.add_trajectory(path, last=len(self.tree.trajectories) + 1 == self.width)

    def _join(self, path_id: int, number: int) -> None:
        self._round_of[path_id] = number
        self._rounds[number].growing.add(path_id)

    def _leave(self, path_id: int) -> int:
        number = self._round_of.pop(path_id)
        self._rounds[number].growing.remove(path_id)
        return number

    def _boundaries(self) -> list[SegmentRequest]:
        """Close every round that is complete. A token budget that is used up ends paths without a request."""
        requests: list[SegmentRequest] = []
        while not (self.done or self.waiting or self._rounds[self._now].growing):
            requests += self._close(self._rounds.pop(self._now))
        return requests

    def _close(self, round_: _Round) -> list[SegmentRequest]:
        self._now += 1
        for _, path in sorted(round_.finished.items()):
            self._finish(path)
        self._ended += round_.failed
        # Not of `stats`: a path that is ahead may have failed in a round that is still to come.
        self._failed += round_.failed
        if self.done:
            return []
        if self._failed >= MAX_FAILURES_PER_WIDTH * self.width:
            self.give_up(f'{self._failed} segments of this tree failed, the last one: {self.last_error}')
            return []
        self._survivors = [Path(node, id=path_id) for path_id, node in sorted(round_.survivors.items())]
        grows_on = self._survivors or (self.config.fallback, self.config.fallback_fill) != ('none', 'placeholder')
        if self.config.budget == 'by_segment_tokens' and grows_on:
            self.waiting = True
            return []
        return self._branch()

    def _branch(self, share: int | None = None) -> list[SegmentRequest]:
        live, self._survivors = self._survivors, []
        if not live:
            self._ended = 0
            return self._fall_back(share)
        requests = self._fork(live, share)
        if self.config.fallback_start == 'early':
            paths = len(requests) + (len(live) if self._runs_on else 0)
            requests += self._fall_back_early(paths, max(path.leaf.depth for path in live))
        return requests

    def _fork(self, live: list[Path], share: int | None) -> list[SegmentRequest]:
        """Requests for the forks of `live`, and for the paths themselves where they do not run on."""
        counts = dict.fromkeys((path.id for path in live), 1)
        forking = [path for path in live if may_fork(path.leaf, self.config)]
        if forking:
            counts.update(zip((path.id for path in forking), self._share_out(forking, len(live), share), strict=True))
            self._ended = 0
        # Every path once before any twice: a token budget that runs out takes the forks, not the paths.
        forks = [
            Path(path.leaf) for extra in range(1, max(counts.values())) for path in live if extra < counts[path.id]
        ]
        going_on = [] if self._runs_on else [self._paths[path.id] for path in live]
        requests = self._launch(self._within_budget(going_on + forks, keep=len(going_on)))
        self.tree.stats.forks += max(len(requests) - len(going_on), 0)
        return requests

    def _share_out(self, forking: list[Path], live: int, share: int | None) -> list[int]:
        """How many branches each of `forking` has, which are some or all of the `live` paths."""
        finished = len(self.tree.trajectories) + live - len(forking)
        cap = min(self.width, max(self._paced_width(path.leaf, self._first) for path in forking))
        total = next_width(
            live=len(forking),
            finished=finished,
            ended=self._ended,
            width=min(cap, finished + self._affordable(forking, share)),
            divergence=self._draw(self.config.divergence),
        )
        counts = branching_policies[self.config.branching](forking, total, self._context)
        if len(counts) != len(forking) or sum(counts) != total or min(counts) < 1:
            raise ValueError(
                f'branching policy {self.config.branching!r} returned {counts} for {len(forking)} live '
                f'paths and {total} branches: it must give every path at least one, and all of them out.'
            )
        return counts

    def _paced_width(self, node: Node, first: int) -> int:
        """Most paths that may exist while what follows `node` grows."""
        by_turn = self.config.fork_at == 'turn'
        depth = 1 + (turns_before(node) if by_turn else node.depth)
        last = self.limits.max_turns if by_turn else self.config.max_depth
        return paced_width(self.config, width=self.width, depth=depth, first=first, last=last)

    def _fall_back(self, share: int | None) -> list[SegmentRequest]:
        missing = self.width - len(self.tree.trajectories)
        grown = [path for path in self.tree.trajectories if path.leaf.length]
        requests = self._launch(self._fallback_starts(min(missing, self._affordable(grown, share))))
        self.tree.stats.fallbacks += len(requests)
        if not requests:
            for index in range(missing):
                failed = index < self.tree.stats.failures
                self._fill(
                    StopReason.FAILED if failed else StopReason.ABSENT,
                    self.last_error if failed else 'no budget or no fallback was left to grow it',
                )
        return requests

    def _fall_back_early(self, paths: int, depth: int) -> list[SegmentRequest]:
        """Branches for the trajectories that `paths` live ones of `depth` segments can not make any more."""
        finished = len(self.tree.trajectories)
        reach = most_leaves(self.config, paths=paths, finished=finished, width=self.width, depth=depth)
        missing = self.width - finished - reach
        if missing < 1 or not self._fallback_candidates():
            return []
        requests = self._launch(self._fallback_starts(missing))
        self.tree.stats.fallbacks += len(requests)
        return requests

    def _fallback_candidates(self) -> list[int]:
        if self.config.fallback in ('root', 'none'):
            return []
        return fallback.candidates(self.tree.trajectories, self.config, self._rng)

    def _fallback_starts(self, needed: int) -> list[Path]:
        root, config = self.tree.root, self.config

        def from_root(count: int) -> list[Path]:
            return self._within_budget([Path(root, fallback_from=-1) for _ in range(count)])

        if config.fallback == 'none':
            return from_root(needed) if config.fallback_fill == 'root' else []
        divergence = self._draw(config.divergence)
        chosen = self._fallback_candidates()
        if not chosen:
            return from_root(min(divergence, needed))
        starts: list[Path] = []
        for index in chosen:
            path = self.tree.trajectories[index]
            context = fallback.cut_context(path, config, self._rng)
            position = fallback.cut_policies[config.fallback](path, context)
            if not context.low <= position <= context.high:
                raise ValueError(
                    f'fallback {config.fallback!r} returned {position}, allowed are {context.low} to {context.high}.'
                )
            position = fallback.next_start(path, position, config)
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
            left = config.budget_tokens - self._spent
            mean = sum(path.leaf.length for path in paths) / max(len(paths), 1)
            return max(int(left // (mean + length)), 1)
        return self.width

    def _covers(self, lengths: Sequence[int]) -> bool:
        """Whether a budget of trajectory tokens covers paths of these lengths with a token more each."""
        if self.config.budget != 'by_trajectory_tokens':
            return True
        return sum(lengths) + len(lengths) <= self.config.budget_tokens - self._spent

    def _within_budget(self, starts: list[Path], keep: int = 0) -> list[Path]:
        """The first of `starts` that the budget covers, `keep` of them in any case."""
        while len(starts) > keep and not self._covers([path.leaf.length for path in starts]):
            starts = starts[:-1]
        return starts

    def _launch(self, starts: Sequence[Path]) -> list[SegmentRequest]:
        """Requests for `starts`; where a budget of trajectory tokens lets none of them go on, all end here."""
        limit = self.config.segment_length
        if self.config.budget == 'by_trajectory_tokens' and starts:
            left = self.config.budget_tokens - self._spent
            limit = min(limit, (left - sum(path.leaf.length for path in starts)) // len(starts))
        if limit < 1:
            for path in starts:
                path.stop = StopReason.TOKEN_LIMIT
                # A turn without a token: the trajectory ends before what the environment said.
                while not path.leaf.sampled:
                    path.outcome = path.leaf.turn
                    path.leaf = path.leaf.parent
                self._paths.pop(path.id, None)
                self._finish(path)
            return []
        return [self._request(path, limit, self._now) for path in starts]

    def _request(self, path: Path, limit: int, number: int) -> SegmentRequest:
        """Let `path` grow from its leaf, from round `number` on."""
        if not path.id:
            self._last_path += 1
            path.id = self._last_path
            self._paths[path.id] = path
        self._join(path.id, number)
        used, start = path.leaf.length, path.leaf.turn_start
        depths = self.config.max_depth - (path.leaf.depth - start.depth) if self._runs_on else 1
        self.tree.stats.engine_requests += 1
        self.tree.stats.input_tokens += len(self.tree.prompt_ids) + used
        most = min(depths * limit, self.limits.max_response - (used - start.length), self._room - used)
        return SegmentRequest(path.id, path.leaf, most, limit, self._request_seed(path))

    def _request_seed(self, path: Path) -> int:
        """Of the path and its depth alone, so that no schedule changes what the tree's generator draws."""
        digest = hashlib.blake2b(f'{self._seed}:{path.id}:{path.leaf.depth}'.encode(), digest_size=4).digest()
        return int.from_bytes(digest, 'big') >> 1
