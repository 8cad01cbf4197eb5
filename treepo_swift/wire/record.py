"""`TreeRecord`: a tree as it is kept on disk, one line of JSON each. docs/viewer.md has the schema as a table.

Nodes store only their own tokens; a trajectory is the way from its `leaf` to the root. What is not known is left out of
the line and None here, which is not 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .report import TreeReport
from .trace import TreeTrace

SCHEMA_VERSION = 1
"""Raised when a reader of the last version would misread a line. Keys may be added without that."""
DIGITS = 4
"""Digits behind the point of log-probs, entropies, advantages and mean rewards."""

_OPTIONAL = ('logprobs', 'entropies', 'trained', 'value', 'reward', 'segments', 'fallback_from', 'fallback_at', 'error')


@dataclass(slots=True)
class NodeRecord:
    """A segment, or what an environment said."""

    id: int
    parent: int
    """0: the prompt."""
    depth: int
    """Segments from the prompt to here."""
    kind: str
    """`segment`: sampled; `environment`: said by a tool or an environment, never trained on."""
    tokens: list[int]
    text: str
    """What `tokens` add to the text of their path."""
    pieces: list[int]
    """Characters of `text` that each token completes. A character of several tokens belongs to the last of them."""
    size: int = 0
    """Trajectories through it that are no placeholders: its subgroup."""
    value: float | None = None
    """Mean reward of its subgroup; None where it is empty."""
    logprobs: list[float] | None = None
    """Of `tokens`, under the sampling distribution; None where nothing was sampled."""
    entropies: list[float] | None = None
    """Of the sampling distribution at each token in nats; None where no policy asked for it."""
    trained: int | None = None
    """How many of `tokens` are trained on, where a hook masked some (for the first trajectory through it)."""


@dataclass(slots=True)
class TrajectoryRecord:
    """A finished path, or the placeholder of one that failed."""

    leaf: int
    """Node at which it ends; 0: at the prompt."""
    stop: str
    """A `StopReason`; `failed` and `absent` are placeholders."""
    loss_tokens: int
    reward: float | None
    """Weighted sum of `rewards` (minus the KL term of ``--kl_in_reward``); None for placeholders."""
    rewards: dict[str, float | None]
    """Of each reward function, before weights; None where it had nothing to say."""
    advantage: float
    """As trained: normalised, the mean over its loss tokens. 0 for placeholders."""
    segments: list[float] | None = None
    """As trained, of each of its segments, where the estimator tells them apart."""
    fallback_from: int | None = None
    """Index of the trajectory whose prefix this one branched from by fallback; -1: from the prompt."""
    fallback_at: int | None = None
    """Node with which that branch begins."""
    error: str | None = None
    """What failed, where `stop` is `failed`."""

    @property
    def is_placeholder(self) -> bool:
        return self.reward is None


@dataclass(slots=True)
class TreeRecord:
    """One line of a trees file."""

    run: str
    """When the process that wrote it began, as ISO 8601 in UTC: a resumed run has another one."""
    step: int
    """The trainer's global step at which the tree was trained on (in `eval`: was evaluated)."""
    mode: str
    """`train` or `eval`."""
    tree: str
    """Its id."""
    prompt: str
    """Text, with the template's special tokens."""
    prompt_tokens: list[int]
    nodes: list[NodeRecord]
    """Parents first."""
    trajectories: list[TrajectoryRecord]
    value: float | None
    """Mean reward of the tree; None where all of it failed."""
    estimator: str
    normalisation: str
    stats: dict[str, int] = field(default_factory=dict)
    """`TreeStats`: what growing it took."""
    version: int = SCHEMA_VERSION

    def paths(self) -> list[list[NodeRecord]]:
        """For each trajectory its nodes, from the first after the prompt to its leaf."""
        by_id = {node.id: node for node in self.nodes}
        parent = {node.id: node.parent for node in self.nodes}
        return [[by_id[id] for id in _down(t.leaf, parent)] for t in self.trajectories]

    def segment_paths(self) -> list[list[int]]:
        """For each trajectory the ids of its segments, as `treepo_swift.advantage` wants them after the tree's id."""
        return [[node.id for node in path if node.kind == 'segment'] for path in self.paths()]

    def texts(self) -> list[str]:
        """The response of each trajectory, with what environments said."""
        return [''.join(node.text for node in path) for path in self.paths()]

    def to_json(self) -> str:
        """One line, without the line's end."""
        values = dataclasses.asdict(self)
        for part in (*values['nodes'], *values['trajectories']):
            for key in _OPTIONAL:
                # A reward of None says something: nobody scored it.
                if key in part and part[key] is None and key != 'reward':
                    del part[key]
        # A half of a surrogate pair, which no file in UTF-8 can hold, becomes an escape.
        return json.dumps({'version': values.pop('version'), **values}, separators=(',', ':'), ensure_ascii=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TreeRecord:
        """Unknown keys are ignored, so that lines of a later minor writer can be read. Raises ``ValueError`` for a
        version that this reader does not know."""
        if values.get('version') != SCHEMA_VERSION:
            raise ValueError(f'version {values.get("version")!r} of a tree: this treepo_swift reads {SCHEMA_VERSION}')
        known = _known(cls, values)
        return cls(
            **{
                **known,
                'nodes': [NodeRecord(**_known(NodeRecord, node)) for node in values['nodes']],
                'trajectories': [TrajectoryRecord(**_known(TrajectoryRecord, t)) for t in values['trajectories']],
            }
        )


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in values.items() if key in names}


@dataclass(frozen=True, slots=True)
class Scored:
    """What a batch knows of one trajectory beside its tokens."""

    report: TreeReport
    reward: float
    rewards: dict[str, float | None]
    advantage: float
    segments: list[float] | None


@dataclass(frozen=True, slots=True)
class Moment:
    """Which batch of which run."""

    run: str
    step: int
    mode: str
    estimator: str
    normalisation: str


def record_of(trace: TreeTrace, scored: Sequence[Scored], moment: Moment) -> TreeRecord:
    """The record of a tree from its trace and its trajectories in order; `text` and `pieces` are still empty.

    Raises ``ValueError`` where the two are not of the same tree.
    """
    parent = {node.id: node.parent for node in trace.nodes}
    sampled = {node.id for node in trace.nodes if node.sampled}
    if len(scored) != len(trace.leaves):
        raise ValueError(f'tree {trace.id} has {len(trace.leaves)} trajectories, and {len(scored)} were scored')
    paths = [_down(leaf, parent) for leaf in trace.leaves]
    through: dict[int, list[float]] = {}
    trained: dict[int, int] = {}
    for path, one in zip(paths, scored, strict=True):
        segments = [node for node in path if node in sampled]
        if segments != one.report.nodes:
            raise ValueError(f'tree {trace.id}: a trajectory of {segments} in its trace has {one.report.nodes} there')
        if not one.report.is_placeholder:
            for node in (0, *path):
                through.setdefault(node, []).append(one.reward)
            for node, count in zip(segments, one.report.tokens, strict=True):
                trained.setdefault(node, count)
    nodes = [
        NodeRecord(
            id=node.id,
            parent=node.parent,
            depth=node.depth,
            kind='segment' if node.sampled else 'environment',
            tokens=node.token_ids,
            text='',
            pieces=[],
            size=len(through.get(node.id, ())),
            value=_mean(through.get(node.id, ())),
            logprobs=_rounded(node.logprobs) if node.sampled else None,
            entropies=_rounded(node.entropies),
            trained=_unless(trained.get(node.id), len(node.token_ids)) if node.sampled else None,
        )
        for node in trace.nodes
    ]
    stats = next((one.report.stats for one in scored if one.report.stats is not None), None)
    return TreeRecord(
        run=moment.run,
        step=moment.step,
        mode=moment.mode,
        tree=trace.id,
        prompt='',
        prompt_tokens=trace.prompt_ids,
        nodes=nodes,
        trajectories=[_trajectory(index, paths, scored) for index in range(len(scored))],
        value=_mean(through.get(0, ())),
        estimator=moment.estimator,
        normalisation=moment.normalisation,
        stats={} if stats is None else dataclasses.asdict(stats),
    )


def _trajectory(index: int, paths: Sequence[Sequence[int]], scored: Sequence[Scored]) -> TrajectoryRecord:
    one, path = scored[index], paths[index]
    report, origin = one.report, one.report.fallback_from
    begins = None
    if origin is not None:
        before = set(paths[origin]) if origin >= 0 else set()
        begins = next((node for node in path if node not in before), None)
    return TrajectoryRecord(
        leaf=path[-1] if path else 0,
        stop=report.stop.value,
        loss_tokens=report.loss_tokens,
        reward=None if report.is_placeholder else one.reward,
        rewards={} if report.is_placeholder else one.rewards,
        advantage=round(one.advantage, DIGITS),
        segments=_rounded(one.segments),
        fallback_from=origin,
        fallback_at=begins,
        error=report.error,
    )


def _down(leaf: int, parent: Mapping[int, int]) -> list[int]:
    """The nodes from the first after the root to `leaf`."""
    nodes = []
    while leaf:
        nodes.append(leaf)
        leaf = parent[leaf]
    return nodes[::-1]


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), DIGITS) if values else None


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(value, DIGITS) + 0.0 for value in values]


def _unless(value: int | None, usual: int) -> int | None:
    return None if value == usual else value
