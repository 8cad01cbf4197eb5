"""TreeRL: global plus local advantage of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups


@register_advantage('treerl', level='segment')
def treerl(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Process reward of TreeRL (arXiv 2506.11902), used as the segment's advantage.

    ``A(node) = ((V(node) - V(root)) + (V(node) - V(parent))) / sqrt(n(node))``: the global plus the local advantage,
    where V is the mean reward of the n trajectories through a node. The division makes up for a shared segment being
    trained on once per trajectory through it.

    Only this formula is TreeRL's; its selection of leaves and its own shaping of leaf rewards are not part of it.

    Degenerate cases: every node of a tree of one trajectory, or with rewards all alike, gets 0.
    """
    nodes = Subgroups(paths, rewards)
    value_N = nodes.value_N
    both_N = 2 * value_N - value_N[nodes.root_N] - value_N[nodes.parent_N]
    return nodes.per_segment(both_N / np.sqrt(nodes.size_N))
