"""`TreeTrace`: a whole tree as it travels to the trainer, once, in ``RolloutOutput.rollout_infos['tree_trace']``.

A `TreeReport` says of a trajectory what advantages need. A trace says what a reader wants to see: every node with its
tokens, what an environment said, and who is whose parent. It goes with a tree's first trajectory, and only where the
trainer writes trees to disk.
"""

from __future__ import annotations

import base64
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treepo_swift.core.tree import Tree

TRACE_KEY = 'tree_trace'


def is_traced(tree_id: str, rate: float) -> bool:
    """Whether the tree is one of the share `rate` that is described whole. The same id, the same answer."""
    return zlib.crc32(tree_id.encode()) < rate * 2**32


@dataclass(frozen=True, slots=True)
class TracedNode:
    """A segment (`sampled`) or what an environment said."""

    id: int
    parent: int
    """0: the root."""
    depth: int
    sampled: bool
    token_ids: list[int]
    logprobs: list[float]
    """Of `token_ids`; empty where nothing was sampled."""
    entropies: list[float] | None
    """In nats; None where no policy asked for them."""


@dataclass(frozen=True, slots=True)
class TreeTrace:
    """The nodes that lie on a tree's trajectories, parents first, and where each trajectory ends."""

    id: str
    prompt_ids: list[int]
    nodes: list[TracedNode]
    leaves: list[int]
    """Node at which each trajectory ends, in their order; 0: at the root (a placeholder)."""

    @classmethod
    def of(cls, tree: Tree) -> TreeTrace:
        """The trace of a tree that is done, so that its nodes have ids."""
        found = {node.id: node for path in tree.trajectories for node in path.leaf.lineage()}
        nodes = [
            TracedNode(
                id=node.id,
                parent=node.above.id,
                depth=node.depth,
                sampled=node.sampled,
                token_ids=node.token_ids.tolist(),
                logprobs=node.logprobs.tolist(),
                entropies=None if node.entropies is None else array('f', node.entropies).tolist(),
            )
            for _, node in sorted(found.items())
        ]
        return cls(tree.id, list(tree.prompt_ids), nodes, [path.leaf.id for path in tree.trajectories])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: columns over the nodes, numbers of tokens as packed bytes."""
        columns = {
            'ids': [node.id for node in self.nodes],
            'parents': [node.parent for node in self.nodes],
            'depths': [node.depth for node in self.nodes],
            'sampled': [int(node.sampled) for node in self.nodes],
            'lengths': [len(node.token_ids) for node in self.nodes],
        }
        values = {
            'id': self.id,
            'prompt': _to_text(self.prompt_ids, np.int32),
            'leaves': self.leaves,
            **columns,
            'tokens': _to_text([t for node in self.nodes for t in node.token_ids], np.int32),
            'logprobs': _to_text([v for node in self.nodes for v in node.logprobs], np.float32),
        }
        known = [node.entropies is not None for node in self.nodes]
        if any(known):
            values['with_entropies'] = [int(value) for value in known]
            values['entropies'] = _to_text([v for node in self.nodes for v in node.entropies or ()], np.float32)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TreeTrace:
        tokens = _from_text(values['tokens'], np.int32)
        logprobs = _from_text(values['logprobs'], np.float32)
        entropies = _from_text(values['entropies'], np.float32) if 'entropies' in values else []
        known = values.get('with_entropies', [0] * len(values['ids']))
        nodes, token, scored, measured = [], 0, 0, 0
        columns = (values[name] for name in ('ids', 'parents', 'depths', 'sampled', 'lengths'))
        for (id, parent, depth, sampled, length), has in zip(zip(*columns, strict=True), known, strict=True):
            own = length if sampled else 0
            uncertain = length if has else 0
            nodes.append(
                TracedNode(
                    id,
                    parent,
                    depth,
                    bool(sampled),
                    tokens[token : token + length],
                    logprobs[scored : scored + own],
                    entropies[measured : measured + uncertain] if has else None,
                )
            )
            token, scored, measured = token + length, scored + own, measured + uncertain
        return cls(values['id'], _from_text(values['prompt'], np.int32), nodes, list(values['leaves']))


def _to_text(values: Sequence[float], dtype: type) -> str:
    return base64.b64encode(np.array(values, dtype).tobytes()).decode()


def _from_text(text: str, dtype: type) -> list[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).tolist()  # type: ignore[no-any-return]
