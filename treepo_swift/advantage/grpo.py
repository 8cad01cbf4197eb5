"""Plain GRPO on the trajectories of a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import tree_gaps

EPSILON = 1e-4


@register_advantage('grpo')
def grpo(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[float]:
    """Group-relative advantage of GRPO (arXiv 2402.03300), which sees a tree as a group of trajectories.

    ``A_i = (r_i - mean(tree)) / (std(tree) + 1e-4)`` with the sample standard deviation (n - 1), the form and the
    epsilon of ms-swift.

    Degenerate cases: a tree of one trajectory, or one whose rewards are all alike, gives zeros.
    """
    gap_L, trees = tree_gaps(paths, rewards)
    variance_N = trees.sum_N(gap_L**2) / np.maximum(trees.size_N - 1, 1)
    return list((gap_L / (np.sqrt(variance_N[trees.root_L]) + EPSILON)).tolist())
