"""RTMC: how much a segment raised a value that is drawn towards the tree's mean where few trajectories tell of it."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import TreePath, register_advantage
from .subgroups import Subgroups


@register_advantage('rtmc', level='segment')
def rtmc(paths: Sequence[TreePath], rewards: Sequence[float], *, prior: float = 2.0) -> list[list[float]]:
    """Step advantage of RTMC (arXiv 2604.11037, Eq. 11 as a public port of it has it).

    ``A(node) = V(node) - (n V(parent) + prior V(root)) / (n + prior)``, where V is the mean reward of the trajectories
    through a node, n their number at the parent, and `prior` counts trajectories too. With ``prior=0`` it is
    `progress`. Rewards are not discounted by the steps that follow, as they are there. States are nodes, where RTMC
    finds equal ones in independent rollouts by signatures of what was done.

    Degenerate cases: every node of a tree of one trajectory, or with rewards all alike, gets 0. An only child gets
    what the prior makes of it: its parent's value less the tree's mean, times ``prior / (n + prior)``.
    """
    if prior < 0:
        raise ValueError(f'prior={prior!r} of the advantage estimator rtmc: a number of trajectories, 0 or more.')
    nodes = Subgroups(paths, rewards)
    size_N, value_N = nodes.size_N[nodes.parent_N], nodes.value_N[nodes.parent_N]
    smoothed_N = (size_N * value_N + prior * nodes.value_N[nodes.root_N]) / (size_N + prior)
    return nodes.per_segment(nodes.value_N - smoothed_N)
