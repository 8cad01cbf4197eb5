"""Nodes, paths and trees. A node holds only its own tokens; everything longer is derived from its parents."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class StopReason(str, enum.Enum):
    """Why a path ended. The values reach ``rollout_infos['tree']['stop']``."""

    ANSWER = 'answer'
    EOS = 'eos'
    STOP_STRING = 'stop_string'
    HOOK = 'hook'
    REPETITION = 'repetition'
    TOKEN_LIMIT = 'token_limit'
    CONTEXT_LIMIT = 'context_limit'
    DEPTH_LIMIT = 'depth_limit'
    FAILED = 'failed'
    ABSENT = 'absent'

    @property
    def is_placeholder(self) -> bool:
        """Whether nothing stands behind it: a masked row that only keeps the batch rectangular."""
        return self in (StopReason.FAILED, StopReason.ABSENT)

    @property
    def finish_reason(self) -> str:
        """swift's `finish_reason`: ``length`` where the response was cut before it had ended by itself.

        A repeating path is one of them: left alone it would have run into the length limit, so
        ``--overlong_filter`` and the truncation metrics treat it as they would without trees.
        """
        return 'length' if self in _CUT else 'stop'


_CUT = {
    StopReason.REPETITION,
    StopReason.TOKEN_LIMIT,
    StopReason.CONTEXT_LIMIT,
    StopReason.DEPTH_LIMIT,
    StopReason.FAILED,
    StopReason.ABSENT,
}


@dataclass(slots=True, eq=False)
class Node:
    """One segment, or what an environment said between two turns. The root stands for the prompt, without tokens."""

    parent: Node | None
    token_ids: array[int]
    """Tokens of this node only, int32."""
    logprobs: array[float]
    """Log-probs of `token_ids` under the sampling distribution, same length, in the engine's float32; empty where
    nothing was sampled."""
    depth: int
    """Segments from the root to here; 0 at the root. Both parts of a segment that was split have its depth, and so
    has the environment's node that follows it."""
    length: int
    """Response tokens from the root to the end of this node, an environment's included."""
    start: Node | None = field(default=None, repr=False)
    """Where the turn that this node belongs to began, None at the root; see `turn_start`."""
    sampled: bool = True
    """False for the tokens of an environment: they are never trained on."""
    entropies: list[float] | None = None
    """Entropy of the sampling distribution at each token in nats, where a policy asked for it."""
    id: int = 0
    """1, 2, ... when the tree is done; 0 before, and at the root."""
    data: Any = field(default=None, repr=False)
    """What the driver keeps of it. The search hands it on and never looks at it."""

    @property
    def above(self) -> Node:
        """The parent of a node that has one: of every node but the root."""
        assert self.parent is not None, 'the root has no parent'
        return self.parent

    @property
    def begins_turn(self) -> bool:
        """Whether a turn begins at its end: at the root, and after an environment."""
        return not self.sampled or self.parent is None

    @property
    def turn_start(self) -> Node:
        """The node at whose end the turn begins that goes on after this node."""
        return self if self.begins_turn or self.start is None else self.start

    def lineage(self, since: Node | None = None) -> list[Node]:
        """The nodes from the first one after the root (or after `since`) to this one."""
        nodes = []
        node: Node | None = self
        while node is not since and node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def response_ids(node: Node) -> list[int]:
    """All response tokens from the root to the end of `node`."""
    return [token for part in node.lineage() for token in part.token_ids]


def response_logprobs(node: Node) -> list[float]:
    return [logprob for part in node.lineage() for logprob in part.logprobs]


def sampled_tokens(node: Node) -> int:
    """How many of the response tokens from the root to the end of `node` were sampled."""
    return sum(len(part.token_ids) for part in node.lineage() if part.sampled)


def turns_before(node: Node) -> int:
    """How many turns have ended on the way to the one that goes on after `node`."""
    start, turns = node.turn_start, 0
    while start.start is not None:
        start, turns = start.start, turns + 1
    return turns


def last_ids(node: Node, count: int) -> list[int]:
    """The last `count` tokens of a turn up to the end of `node`, fewer where there are fewer."""
    tail: list[int] = []
    current = node
    while not current.begins_turn and len(tail) < count:
        tail = current.token_ids[len(tail) - count :].tolist() + tail
        current = current.above
    return tail


@dataclass(slots=True, eq=False)
class Path:
    """A way from the root to a leaf that is still growing, or has become a trajectory (`stop` is set)."""

    leaf: Node
    stop: StopReason | None = None
    """None while the path lives."""
    fallback_from: int | None = None
    """Index of the trajectory whose prefix a fallback branched from (-1: from the root), None without fallback."""
    error: str | None = None
    """What failed, where `stop` is FAILED."""
    reward: float | None = None
    """What its environment gave it, where that is known while the tree grows; None: nobody has said, which is not 0."""
    id: int = 0
    """1, 2, ... in the order in which paths started, the same for every order of the engine's answers; 0 before."""

    @property
    def is_placeholder(self) -> bool:
        """Whether it ended without a trajectory."""
        return self.stop is not None and self.stop.is_placeholder


@dataclass(slots=True)
class TreeStats:
    """What growing a tree took. Tokens are sampled tokens, prompts not counted, where nothing else is said."""

    decoded_tokens: int = 0
    trajectory_tokens: int = 0
    """Sum of the trajectories' lengths: what independent sampling would have decoded for the same answers."""
    engine_requests: int = 0
    input_tokens: int = 0
    """Sum of the engine requests' inputs, prompts included."""
    cached_tokens: int = 0
    """Those of them that the engine found in its prefix cache."""
    evicted_tokens: int = 0
    """Those of them that this tree had computed before and that the engine had to compute again."""
    forks: int = 0
    """Branches beyond the first at a boundary, root included."""
    fallbacks: int = 0
    """Branches that were started by fallback."""
    failures: int = 0
    turns: int = 0
    """Turns that began after an environment had spoken."""
    environment_tokens: int = 0
    """Tokens of the environments' nodes."""
    replayed_turns: int = 0
    """Turns that were played again to bring a fresh environment to where a fork starts (``fork_state: replay``)."""


@dataclass(slots=True)
class Tree:
    """All nodes and finished paths that grew from one prompt."""

    id: str
    prompt_ids: list[int]
    root: Node = field(default_factory=lambda: Node(None, array('i'), array('f'), 0, 0))
    trajectories: list[Path] = field(default_factory=list)
    stats: TreeStats = field(default_factory=TreeStats)

    def add_node(
        self, parent: Node, token_ids: Sequence[int], logprobs: Sequence[float], entropies: list[float] | None = None
    ) -> Node:
        """Append a segment below `parent`."""
        if len(token_ids) != len(logprobs):
            raise ValueError(f'{len(token_ids)} tokens with {len(logprobs)} log-probs in a segment of tree {self.id}.')
        return Node(
            parent,
            array('i', token_ids),
            array('f', logprobs),
            parent.depth + 1,
            parent.length + len(token_ids),
            parent.turn_start,
            entropies=entropies,
        )

    def add_environment(self, parent: Node, token_ids: Sequence[int], data: Any) -> Node:
        """Append what an environment said below `parent`; a turn begins after it."""
        self.stats.turns += 1
        self.stats.environment_tokens += len(token_ids)
        return Node(
            parent,
            array('i', token_ids),
            array('f'),
            parent.depth,
            parent.length + len(token_ids),
            parent.turn_start,
            sampled=False,
            data=data,
        )

    def add_trajectory(self, path: Path, *, last: bool) -> None:
        """Append a finished path; the `last` one puts trajectories and node ids in depth-first order."""
        self.trajectories.append(path)
        if last:
            self._order_depth_first()

    def _order_depth_first(self) -> None:
        """Trajectories that share most lie next to each other, so a trainer that cuts a tree into micro-batches cuts
        little of what they share. Branches of a node stay in the order in which their first trajectory was added;
        placeholders come last."""
        visited: dict[int, int] = {}
        visits = [
            [visited.setdefault(id(node), len(visited)) for node in trajectory.leaf.lineage()]
            for trajectory in self.trajectories
        ]
        order = sorted(range(len(visits)), key=lambda i: (self.trajectories[i].is_placeholder, visits[i]))
        place = {before: now for now, before in enumerate(order)}
        self.trajectories = [self.trajectories[before] for before in order]
        number = 0
        for trajectory in self.trajectories:
            if trajectory.fallback_from is not None:
                # -1, a new branch of the root, stays what it is.
                trajectory.fallback_from = place.get(trajectory.fallback_from, trajectory.fallback_from)
            for node in trajectory.leaf.lineage():
                if not node.id:
                    number += 1
                    node.id = number

    def node_at(self, path: Path, position: int) -> Node:
        """The last node at whose end `path` has `position` response tokens; a segment is split where it goes through
        one.

        Every trajectory through the segment then goes through both parts, so that two trajectories share exactly
        the tokens of the nodes that they share.
        """
        node = path.leaf
        if not 0 <= position <= node.length:
            raise ValueError(f'position {position} of a path with {node.length} tokens.')
        while node.length > position and node.above.length >= position:
            node = node.above
        return node if node.length == position else self._split(node, position)

    def _split(self, node: Node, position: int) -> Node:
        """Move the tokens of `node` before `position` to a new node above it, and return that."""
        if not node.sampled:
            raise ValueError(f'position {position} is inside what an environment said: no path can go on from there.')
        parent = node.above
        count = position - parent.length
        entropies = node.entropies
        upper = Node(
            parent,
            node.token_ids[:count],
            node.logprobs[:count],
            node.depth,
            position,
            node.start,
            entropies=entropies and entropies[:count],
        )
        node.parent = upper
        node.token_ids, node.logprobs = node.token_ids[count:], node.logprobs[count:]
        node.entropies = entropies and entropies[count:]
        return upper
