"""Depth-wise normalisation: a segment against all segments of its depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

EPSILON = 1e-8
FLAT = 1e-6


@register_advantage('depth_wise', level='segment')
def depth_wise(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Depth-wise advantage of BranchGRPO (arXiv 2509.06040), which was made for diffusion models.

    ``A(node) = (V(node) - mean(V of the depth)) / (std(V of the depth) + 1e-8)``. V is the mean reward of the
    trajectories through a node; the depth's nodes are those of the same tree whose paths are as long, the node itself
    among them, and each counts once. The standard deviation is the sample one (n - 1), as in the paper's code. There
    all paths are of one length; here those that have ended are in no depth below their end.

    Degenerate cases, as in that code: a node that is alone at its depth gets 0, and so do the nodes of a depth whose
    values spread (std) by less than 1e-6. The paper's weighting of rewards by a path's probability is not part of this.
    """
    nodes = Subgroups(paths, rewards)
    depth_N = nodes.depth_N()
    # Numbers each depth of each tree.
    _, level_N, count = np.unique(
        nodes.root_N * (depth_N.max(initial=0) + 1) + depth_N, return_inverse=True, return_counts=True
    )
    mean = np.bincount(level_N, weights=nodes.value_N) / count
    gap_N = nodes.value_N - mean[level_N]
    std = np.sqrt(np.bincount(level_N, weights=gap_N**2) / np.maximum(count - 1, 1))
    return nodes.per_segment(np.where(std[level_N] < FLAT, 0.0, gap_N / (std[level_N] + EPSILON)))
