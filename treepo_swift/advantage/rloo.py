"""REINFORCE with a leave-one-out baseline on the trajectories of a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import tree_gaps


@register_advantage('rloo')
def rloo(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[float]:
    """Leave-one-out advantage of RLOO (arXiv 2402.14740) within a tree.

    ``A_i = r_i - mean(rewards of the other trajectories of the tree) = n / (n - 1) (r_i - mean(tree))`` for a tree of
    n trajectories. Trajectories that share a prefix are not independent, so that the baseline is not
    free of bias as it is for independent samples.

    Degenerate cases: a tree of one trajectory has no others and gives 0, as in ms-swift; a tree whose rewards are all
    alike gives zeros.
    """
    gap_L, trees = tree_gaps(paths, rewards)
    size_L = trees.size_N[trees.root_L]
    return list((gap_L * size_L / np.maximum(size_L - 1, 1)).tolist())
