"""The tree search as a pure state machine: segments go in, engine requests come out.

It does no I/O and knows no clock. Whoever drives it (the async scheduler, a test, a synchronous engine) hands every
request to an engine and reports what came back, in any order.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from treepo_swift.config import TreeConfig

from .failure import NodeFailure
from .forks import Forks, PolicyError
from .messages import Limits, NextTurn, Segment, SegmentRequest
from .policies.branching import may_fork
from .policies.stopping import first_reason
from .tree import Node, Path, StopReason, Tree, sampled_tokens

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


class TreeSearch:
    """Grows one tree of `width` trajectories (TreePO, arXiv 2508.17445).

    All live paths of a tree branch together, one boundary after the other: forks are decided when the last of them
    has reported its segment. When none is live and trajectories are missing, fallback starts new branches from
    prefixes of finished ones. ``width == 1`` is plain sampling, still in segments.

    Every live path has at least one branch, so a path need not stop where it forks: it is one request that runs on,
    possibly past boundaries that are still to be decided. With `by_segment` it is a request a segment, as in the
    paper's code. Both grow the same tree. Trees do not wait for each other, unless they share a token budget per
    depth: then `waiting` turns true at a boundary, and `resume` goes on.

    Use::

        requests = search.start()
        # for each request, as its segments come (or else: requests += search.fail(request.path_id, 'why')):
        path = search.extend(request.path_id, segment)
        requests += search.settle(request.path_id, verdict)   # stop reading the request where path.stop is set
        # until search.done; then read search.tree.trajectories, always exactly `width` of them.

    A trajectory may take turns with an environment. Where one has ended, `begin_turn` instead of `settle` lets the path
    go on behind what the environment said; depth and response limits count anew in every turn.

    Reading on: `_next_requests` is the main loop.
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
        by_segment: bool = False,
    ) -> None:
        """`progress` is the share of the training that is done, for scheduled temperatures."""
        if width < 1:
            raise ValueError(f'width={width}: a tree has at least one trajectory.')
        self.config = config
        self.width = width
        self.limits = limits
        self.tree = Tree(tree_id, prompt_ids)
        self.waiting = False
        """Whether a boundary waits for `resume`, with what the tree may spend on the next depth."""
        self.last_error = ''
        self.failure: NodeFailure | None = None
        """Why the tree gave up, where that was none of its paths: its prompt, or a policy."""
        self._room = limits.max_context - len(prompt_ids)
        """Tokens that a path may have in all its turns."""
        self._seed = rng.getrandbits(64)
        self.forks = Forks(config, tree=self.tree, width=width, limits=limits, rng=rng, progress=progress)
        self._budget = self.forks.budget
        # A budget that shrinks with every token of every path has to be asked before each segment.
        self._runs_on = not (by_segment or self._budget.is_per_tree)
        self._started = False
        self._last_path = 0
        self._paths: dict[int, Path] = {}
        """The growing paths, by id."""
        self._round_of: dict[int, int] = {}
        self._rounds: defaultdict[int, _Round] = defaultdict(_Round)
        self._now = 0
        """The round that closes next; paths that run ahead are in later ones."""
        self._live: list[Path] = []
        """Survivors of the last closed round, while the tree waits."""
        self._ended = 0
        """Paths that ended since the last fork: e of the width rule."""
        self._failed = 0

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

    def open_nodes(self) -> Iterator[Node]:
        """Nodes from which a path may still go on: where paths stand, where forks are to be decided, and the root where
        fallback may start there. Where fallback may cut they are the ends of all paths, which may be cut anywhere."""
        if self.done:
            return
        yield from (path.leaf for path in self._paths.values())
        yield from (path.leaf for path in self._live)
        for round_ in self._rounds.values():
            yield from round_.survivors.values()
            if self.forks.may_cut:
                yield from (path.leaf for path in round_.finished.values())
        if self.forks.may_cut:
            yield from (path.leaf for path in self.tree.trajectories)
        if self.forks.may_fall_back:
            yield self.tree.root

    def start(self, allowance: int | None = None) -> list[SegmentRequest]:
        """The first requests, all from the prompt; for `allowance` see `resume`."""
        if self._started:
            raise RuntimeError(f'Tree {self.tree.id} was started before.')
        self._started = True
        if self._room < 1:
            self.give_up(
                NodeFailure(
                    f'the prompt has {len(self.tree.prompt_ids)} tokens and the engine takes '
                    f'{self.limits.max_context} in all, so that no room is left for a response',
                    kind='the prompt leaves no room for a response',
                    remedy='Raise --vllm_max_model_len, or leave long prompts out of the dataset (--max_length).',
                )
            )
            return []
        first = self.forks.from_the_prompt(allowance)
        self.tree.stats.forks += len(first) - 1
        return self._launch(first)

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
        """Why the turn of an extended path ends here, or None; `verdict` is what the checks of its text said.

        Where several reasons hold, the first in `stop.order` counts. By default that is an answer: it is what
        fallback looks for, whether or not EOS follows it.
        """
        path = self._paths[path_id]
        reached = self._limits_reached(path.leaf)
        if not reached and path.stop is None and verdict is None:
            return None
        reasons = (path.stop, verdict, *reached)
        return first_reason({reason for reason in reasons if reason is not None}, self.config)

    def has_room(self, length: int) -> bool:
        """Whether a path of `length` tokens, environments included, may have one more."""
        return length < self._room

    def cut(self, path_id: int, count: int) -> None:
        """Keep only the first `count` tokens of a path's last segment."""
        leaf = self._paths[path_id].leaf
        del leaf.token_ids[count:], leaf.logprobs[count:]
        if leaf.entropies is not None:
            del leaf.entropies[count:]
        assert leaf.parent is not None
        leaf.length = leaf.parent.length + count
        leaf.data = None

    def settle(self, path_id: int, verdict: StopReason | None = None) -> list[SegmentRequest]:
        """Close a segment after `extend`: end the path where `stop_of` says so, or let it go on.

        Returns the requests that may start now: none until the last live path of its round is back.
        """
        stop = self.stop_of(path_id, verdict)
        if stop is not None:
            return self.end(path_id, stop)
        number = self._leave(path_id)
        self._rounds[number].survivors[path_id] = self._paths[path_id].leaf
        if self._runs_on:
            self._join(path_id, number + 1)
        return self._next_requests()

    def end(self, path_id: int, stop: StopReason) -> list[SegmentRequest]:
        """Close a segment after `extend`, and its path with it. Returns requests as `settle` does."""
        path = self._paths.pop(path_id)
        path.stop = stop
        self._rounds[self._leave(path_id)].finished[path_id] = path
        return self._next_requests()

    def begin_turn(self, path_id: int, following: NextTurn) -> list[SegmentRequest]:
        """Close a segment at which a turn has ended, and let the path go on with the next.

        Returns requests as `settle` does; the path's own is among them where it does not wait for its round.
        """
        path = self._paths[path_id]
        path.stop = None
        behind = self.tree.node_at(path, following.keep)
        path.leaf = self.tree.add_environment(behind, following.environment_ids, following.data)
        number = self._leave(path_id)
        self._rounds[number].survivors[path_id] = path.leaf
        going_on = [self._request(path, self.config.segment_length, number + 1)] if self._runs_on else []
        return going_on + self._next_requests()

    def fail(self, path_id: int, error: str) -> list[SegmentRequest]:
        """Report that a path could not be continued or checked. Its budget goes to the tree's other paths."""
        del self._paths[path_id]
        self.tree.stats.failures += 1
        self.last_error = error
        self._rounds[self._leave(path_id)].failed += 1
        return self._next_requests()

    def resume(self, allowance: int | None = None) -> list[SegmentRequest]:
        """Branch at the boundary where the tree waits; `allowance` are its tokens of the depth that comes."""
        if not self.waiting:
            raise RuntimeError(f'Tree {self.tree.id} does not wait.')
        self.waiting = False
        live, self._live = self._live, []
        return self._branch(live, allowance) + self._next_requests()

    def discard(self, tokens: int) -> None:
        """Count tokens that the engine sampled for nobody: past the end of a path, or in a request that failed."""
        self.tree.stats.decoded_tokens += tokens

    def give_up(self, error: str | NodeFailure) -> None:
        """Fill what is missing with failed placeholders; they have no tokens and take part in no baseline."""
        self.failure = error if isinstance(error, NodeFailure) else None
        while not self.done:
            self._fill(StopReason.FAILED, str(error))

    # What is asked of the engine next.

    def _next_requests(self) -> list[SegmentRequest]:
        """Close every round that is complete, and branch where it left the tree."""
        requests: list[SegmentRequest] = []
        while not (self.done or self.waiting or self._rounds[self._now].growing):
            live = self._close(self._rounds.pop(self._now))
            if self.done:
                break
            if self._budget.is_per_depth and (live or self.forks.may_fall_back):
                self.waiting, self._live = True, live
                break
            requests += self._branch(live)
        return requests

    def _branch(self, live: list[Path], allowance: int | None = None) -> list[SegmentRequest]:
        """Forks of the live paths, or fallback where none is live. A policy that fails ends the tree."""
        try:
            return self._fork(live, allowance) if live else self._fall_back(allowance)
        except PolicyError as e:
            self.give_up(e)
            return []

    def _fork(self, live: list[Path], allowance: int | None) -> list[SegmentRequest]:
        """Requests for the forks of `live`, and for the paths themselves where they do not run on."""
        counts = dict.fromkeys((path.id for path in live), 1)
        forking = [path for path in live if may_fork(path.leaf, self.config)]
        if forking:
            branches = self.forks.branches(forking, live=len(live), ended=self._ended, allowance=allowance)
            counts.update(zip((path.id for path in forking), branches, strict=True))
            self._ended = 0
        kept = {path.id: self.forks.position(path, counts[path.id] - 1) for path in live if counts[path.id] > 1}
        # Every path once before any twice: a token budget that runs out takes the forks, not the paths.
        forks = [path for extra in range(1, max(counts.values())) for path in live if extra < counts[path.id]]
        going_on = [] if self._runs_on else [self._paths[path.id] for path in live]
        lengths = [path.leaf.length for path in going_on] + [kept[path.id] for path in forks]
        forks = forks[: self._budget.covered(lengths, keep=len(going_on)) - len(going_on)]
        starts = [Path(self.tree.node_at(path, kept[path.id])) for path in forks]
        requests = self._launch(going_on + starts)
        self.tree.stats.forks += max(len(requests) - len(going_on), 0)
        return requests

    def _fall_back(self, allowance: int | None) -> list[SegmentRequest]:
        """Requests for new branches from prefixes of finished paths; placeholders where there can be none."""
        self._ended = 0
        missing = self.width - len(self.tree.trajectories)
        requests = self._launch(self.forks.from_finished(allowance))
        self.tree.stats.fallbacks += len(requests)
        if not requests:
            for index in range(missing):
                failed = index < self.tree.stats.failures
                self._fill(
                    StopReason.FAILED if failed else StopReason.ABSENT,
                    self.last_error if failed else 'no budget or no fallback was left to grow it',
                )
        return requests

    def _launch(self, starts: Sequence[Path]) -> list[SegmentRequest]:
        """Requests for `starts`; where a budget of trajectory tokens lets none of them go on, all end here."""
        limit = self._budget.segment_limit(starts)
        if limit < 1:
            for path in starts:
                path.stop = StopReason.TOKEN_LIMIT
                # A turn without a token: the trajectory ends before what the environment said.
                while not path.leaf.sampled:
                    assert path.leaf.parent is not None
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

    # Keeping count.

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

    def _join(self, path_id: int, number: int) -> None:
        self._round_of[path_id] = number
        self._rounds[number].growing.add(path_id)

    def _leave(self, path_id: int) -> int:
        number = self._round_of.pop(path_id)
        self._rounds[number].growing.remove(path_id)
        return number

    def _close(self, round_: _Round) -> list[Path]:
        """Take a complete round's trajectories into the tree, and return its live paths as they stood there."""
        self._now += 1
        for _, path in sorted(round_.finished.items()):
            self._finish(path)
        self._ended += round_.failed
        # Not of `stats`: a path that is ahead may have failed in a round that is still to come.
        self._failed += round_.failed
        if not self.done and self._failed >= MAX_FAILURES_PER_WIDTH * self.width:
            self.give_up(f'{self._failed} segments of this tree failed, the last one: {self.last_error}')
        return [Path(node, id=path_id) for path_id, node in sorted(round_.survivors.items())]

    def _finish(self, path: Path) -> None:
        self._ended += 1
        self._budget.spend(path.leaf.length)
        self.tree.stats.trajectory_tokens += sampled_tokens(path.leaf)
        self.tree.add_trajectory(path, last=len(self.tree.trajectories) + 1 == self.width)

    def _fill(self, stop: StopReason, error: str) -> None:
        path = Path(self.tree.root, stop=stop, error=error)
        self.tree.add_trajectory(path, last=len(self.tree.trajectories) + 1 == self.width)

    def _request_seed(self, path: Path) -> int:
        """Of the path and its depth alone, so that no way of asking changes what the tree's generator draws."""
        digest = hashlib.blake2b(f'{self._seed}:{path.id}:{path.leaf.depth}'.encode(), digest_size=4).digest()
        return int.from_bytes(digest, 'big') >> 1
