"""REINFORCE++ with the tree mean as baseline."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import TreePath, register_advantage
from .subgroups import tree_gaps


@register_advantage('reinforce_plus_plus')
def reinforce_plus_plus(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[float]:
    """First half of REINFORCE++-baseline (arXiv 2501.03262): reward minus group mean, the group being the tree.

    ``A_i = r_i - mean(tree)``. The second half, one mean and one standard deviation for the whole batch, is
    ``normalisation: whiten``.

    Degenerate cases: a tree of one trajectory, or one whose rewards are all alike, gives zeros.
    """
    return list(tree_gaps(paths, rewards)[0].tolist())
