"""Leave-one-out at every fork: a segment's reward against that of the trajectories which went another way there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups


@register_advantage('prefix_rloo', level='segment')
def prefix_rloo(paths: Sequence[TreePath], rewards: Sequence[float], *, prior: float = 1.0) -> list[list[float]]:
    """``A_i(node) = r_i - b(node)``: a trajectory's reward against what others got from the same prefix.

    RLOO (arXiv 2402.14740) at every fork. The baseline of a node begins with the mean reward of the tree's trajectories
    that do not go through it, and is drawn, from each ancestor to the next, towards the mean of those that reach
    that ancestor and do not go through the node:

        b_0 = mean of r over O_0,   b_k = (sum of r over O_k + prior b_{k-1}) / (|O_k| + prior),   b(node) = b_parent

    where O_k are the trajectories through its ancestor at depth k, without those through the node. None of them
    depends on the node's own tokens, so the baseline adds no bias (as far as the number of a node's trajectories
    does not depend on its tokens). `prior` counts trajectories: 0 believes the nearest fork alone, a large one makes
    it RLOO over the whole tree.

    Other than `progress`, a segment behind its path's last fork keeps its signal, and what follows a branch that is
    lost in any case gets next to none.

    Degenerate cases: rewards of a tree that are all alike give zeros. A node that all of the tree's trajectories go
    through has nothing to be compared with but their mean.
    """
    if prior < 0:
        raise ValueError(f'prior={prior!r} of the advantage estimator prefix_rloo: a number of trajectories, 0 or more.')
    nodes = Subgroups(paths, rewards)
    size_N, sum_N = nodes.size_N, nodes.value_N * nodes.size_N
    baseline_N = nodes.value_N[nodes.root_N]
    weight = 0.0
    for ancestor_N, below_N in nodes.ancestors():
        others_N = size_N[ancestor_N] - size_N
        total_N = sum_N[ancestor_N] - sum_N + weight * baseline_N
        known_N = below_N & (others_N > 0)
        baseline_N = np.where(known_N, total_N / np.where(known_N, others_N + weight, 1.0), baseline_N)
        weight = prior
    return nodes.per_step(nodes.gain_L[nodes.trajectory_S] - baseline_N[nodes.node_S])
