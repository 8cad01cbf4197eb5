"""`TreeReport`: what the trainer hears of a trajectory, in ``RolloutOutput.rollout_infos['tree']``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treepo_swift.core.inert import one_line
from treepo_swift.core.tree import StopReason, Tree, TreeStats

REPORT_KEY = 'tree'
FAILURE_KEY = 'tree_failure'
"""In ``rollout_infos`` of an answer without a report (evaluation) that failed: the error."""
MAX_ERROR = 500
"""Characters of an error that travel."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What the engine counted since it started, or between two moments."""

    prefix_queries: int
    """Tokens of requests that were looked up in the prefix cache."""
    prefix_hits: int
    preemptions: int
    """Requests that had to give up their KV blocks and start over."""
    generated_tokens: int

    def since(self, before: EngineCounters) -> EngineCounters:
        return EngineCounters(*(getattr(self, f.name) - getattr(before, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What a server's batch took; it rides on the report of the batch's first output."""

    seconds: float
    """Wall time, from the requests to the outputs."""
    scheduler_cpu_seconds: float
    """Of them, CPU time in the scheduler on the event loop; hooks and templates are not counted."""
    hung_hooks: int = 0
    """Threads of hooks that had not returned when their deadline had passed and the batch ended."""
    engine: EngineCounters | None = None
    """None where the engine keeps no statistics."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchReport:
        engine = values.get('engine')
        return cls(**{**values, 'engine': engine and EngineCounters(**engine)})


@dataclass(frozen=True, slots=True)
class TreeReport:
    """A trajectory as advantages see it: a few integers per segment, no tokens. Environments have no part in it."""

    id: str
    """Of its tree."""
    nodes: list[int]
    """Ids of its segments, from the first after the root; two trajectories share exactly the nodes with equal ids."""
    tokens: list[int]
    """Loss tokens of each of `nodes`."""
    stop: StopReason
    depth: int
    """Segments from the root to its end."""
    fallback_from: int | None = None
    """Index of the trajectory whose prefix a fallback branched from (-1: from the root), None without fallback."""
    error: str | None = None
    """What failed, where `stop` is FAILED."""
    stats: TreeStats | None = field(default=None)
    """Of the whole tree; on its first trajectory only."""
    batch: BatchReport | None = field(default=None)
    """Of the whole batch; on its first output only."""

    @property
    def is_placeholder(self) -> bool:
        """Whether no trajectory stands behind it: it is in no baseline, and its advantage is 0."""
        return self.stop.is_placeholder

    @property
    def loss_tokens(self) -> int:
        return 0 if self.is_placeholder else sum(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not there is left out."""
        values: dict[str, Any] = {
            'id': self.id,
            'nodes': self.nodes,
            'tokens': self.tokens,
            'stop': self.stop.value,
            'depth': self.depth,
            'fallback_from': self.fallback_from,
        }
        if self.error is not None:
            values['error'] = one_line(self.error, MAX_ERROR)
        if self.stats is not None:
            values['stats'] = dataclasses.asdict(self.stats)
        if self.batch is not None:
            values['batch'] = self.batch.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TreeReport:
        try:
            stats, batch = values.get('stats'), values.get('batch')
            return cls(
                **{
                    **values,
                    'stop': StopReason(values['stop']),
                    'stats': stats and TreeStats(**stats),
                    'batch': batch and BatchReport.from_dict(batch),
                }
            )
        except (TypeError, ValueError, LookupError, AttributeError) as e:
            raise ValueError(
                f"A rollout server's report of a trajectory can not be read ({type(e).__name__}: {e}). Install the "
                'same treepo_swift on both sides.'
            ) from e

    @classmethod
    def of(cls, tree: Tree, index: int, tokens: Sequence[int] | None = None) -> TreeReport:
        """The report of trajectory `index`.

        `tokens` are the loss tokens of each of its segments; None: all that was sampled is trained on.
        """
        path = tree.trajectories[index]
        assert path.stop is not None
        nodes = [node for node in path.leaf.lineage() if node.sampled]
        return cls(
            id=tree.id,
            nodes=[node.id for node in nodes],
            tokens=[len(node.token_ids) for node in nodes] if tokens is None else list(tokens),
            stop=path.stop,
            depth=path.leaf.depth,
            fallback_from=path.fallback_from,
            error=path.error,
            stats=tree.stats if index == 0 else None,
        )
