"""AT2PO: a segment's value over normalised rewards, as its advantage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

EPSILON = 1e-6


@register_advantage('at2po', level='segment')
def at2po(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Turn-wise credit of AT2PO (arXiv 2601.04767), where a node's value is its advantage.

    ``A(node) = U(node)``: at the end of a trajectory ``U = (r - mean(tree)) / (std(tree) + 1e-6)`` with the standard
    deviation over n, and elsewhere the mean of the children's U. So the paper's code has it with `leaf_value_norm`,
    `node_value_mode: child_mean` and `node_adv_mode: node_value`; its training script weighs children by a softmax of
    their entropies instead, which no estimator here can see. A node there is a turn; here it is a segment, of which
    a turn may have several.

    Degenerate cases: every node of a tree of one trajectory, or of one whose rewards are all alike, gets 0. A node
    through which the whole tree runs need not: its children count once each, and the tree's mean counts trajectories.
    """
    nodes = Subgroups(paths, rewards)
    gap_L = nodes.gain_L - nodes.value_N[nodes.root_L]
    std_N = np.sqrt(nodes.sum_N(gap_L**2) / nodes.size_N)
    flat_N = nodes.is_flat_N()
    gap_N = nodes.child_mean_N() - nodes.value_N[nodes.root_N]
    return nodes.per_segment(np.where(flat_N[nodes.root_N], 0.0, gap_N / (std_N[nodes.root_N] + EPSILON)))
