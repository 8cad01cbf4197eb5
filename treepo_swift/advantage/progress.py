"""Progress: how much a segment raised the expected reward."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import TreePath, register_advantage
from .subgroups import Subgroups


@register_advantage('progress', level='segment')
def progress(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """``A(node) = V(node) - V(parent)``, where V is the mean reward of the trajectories through a node.

    It is the Monte Carlo estimate of a segment's advantage, as in VinePPO (arXiv 2410.01679), with the tree's own
    branches in place of extra rollouts. Summed along a path it telescopes to V(last node) - mean(tree), which is the
    trajectory's reward minus mean(tree) where the last node is its own.

    Degenerate cases: a node that is its parent's only child (all trajectories of the parent run through it) gets 0, and
    so does every node of a tree of one trajectory or with rewards all alike.
    """
    nodes = Subgroups(paths, rewards)
    return nodes.per_segment(nodes.value_N - nodes.value_N[nodes.parent_N])
