"""What trainer and server tell each other: a note in every request, a report in every output.

Both travel in fields that swift carries anyway: ``RolloutInferRequest.data_dict['treepo']`` and
``RolloutOutput.rollout_infos['tree']``.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import Any, Mapping, Sequence

from .config import TreeConfig
from .tree import Path, Tree

REQUEST_KEY = 'treepo'
REPORT_KEY = 'tree'
PROTOCOL = 2
"""Raised when the note or the report changes its meaning, so that mixed versions refuse each other."""

MODES = ('tree', 'independent', 'probe')


@dataclass(frozen=True, slots=True)
class RequestNote:
    """The trainer's wishes for one request. The trainer is the source of truth for the config."""

    mode: str = 'tree'
    """`tree`; `independent` sampling (evaluation); `probe`: score `token_ids` and tell about the engine."""
    config: dict[str, Any] | None = None
    num_generations: int | None = None
    """Trajectories per prompt: a prompt that occurs twice in a batch makes two trees of this width."""
    step: int = 0
    """The trainer's global step: it enters the seed, so that a prompt's next tree forks elsewhere."""
    progress: float = 0.0
    """Share of the training that is done, 0 to 1: scheduled temperatures follow it."""
    token_ids: list[int] | None = None
    packed: bool = False
    """Whether the trainer takes `PackedOutputs`."""
    protocol: int = PROTOCOL

    def to_dict(self) -> dict[str, Any]:
        """Without what is as it is by default: a note goes with every request."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {f.name: given[f.name] for f in dataclasses.fields(self) if given[f.name] != f.default}
        return {**kept, 'mode': self.mode, 'protocol': self.protocol}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestNote:
        if values.get('protocol') != PROTOCOL:
            raise ValueError(f'The trainer speaks treepo protocol {values.get("protocol")}, this server {PROTOCOL}: '
                             'install the same treepo_swift version on both sides.')
        note = cls(**values)
        if note.mode not in MODES:
            raise ValueError(f'mode={note.mode!r} in a treepo request: allowed are {", ".join(MODES)}.')
        return note

    def tree_config(self, default: TreeConfig) -> TreeConfig:
        return default if self.config is None else TreeConfig.from_dict(self.config, where='the trainer\'s TreeConfig')


def tree_report(tree: Tree, index: int, trained: Sequence[int] | None = None) -> dict[str, Any]:
    """What the trainer needs of trajectory `index`: a few integers per segment, no tokens.

    Environments have no part in it. `trained` tells for each sampled token whether it is trained on, None: all are.
    The tree's statistics ride on its first trajectory only.
    """
    path: Path = tree.trajectories[index]
    nodes = [node for node in path.leaf.lineage() if node.sampled]
    tokens = [len(node.token_ids) for node in nodes]
    if trained is not None:
        left = iter(trained)
        tokens = [sum(islice(left, count)) for count in tokens]
    report: dict[str, Any] = {
        'id': tree.id,
        'nodes': [node.id for node in nodes],
        'tokens': tokens,
        'stop': path.stop.value,
        'depth': path.leaf.depth,
        'fallback_from': path.fallback_from,
    }
    if path.error is not None:
        report['error'] = path.error[:500]
    if index == 0:
        report['stats'] = dataclasses.asdict(tree.stats)
    return report
