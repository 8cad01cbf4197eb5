"""FR3E: continuations of one place against each other, less of it where that place is better than the one before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

ROUNDING = 1e-5
"""What a float32 reward may be off its group's mean and still be it, as a share of the group's highest gain."""


@register_advantage('fr3e', level='segment')
def fr3e(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Advantage of FR3E (arXiv 2507.07017), as its authors' code computes it without the option to sharpen.

    Trajectories with the same last fork are a group: what was sampled from one place to the end. Behind that fork
    ``A = (reward - mean of the group) / exp(V(group) - V(group before))``, where V is the group's share of rewards
    above its mean (with rewards of 0 and 1 its share of right answers), and the group before is that of the nearest
    fork above. Where there is none, ``exp(1 - V(group))`` divides. What comes before a trajectory's last fork gets 0:
    there it is a prompt, and not trained on.

    A group whose rewards are all alike gets 0 and is no group before others, as those are dropped there. The answer
    that others continue is a member of its own last fork's group; there it is in none.

    Degenerate cases: a trajectory that is alone behind its last fork gets 0, and so does a tree of one trajectory.
    With one continuation for each place every advantage is 0 but at the deepest: let `divergence` be 2 at least.
    """
    nodes = Subgroups(paths, rewards)
    fork_N = np.zeros(len(nodes.parent_N), dtype=bool)
    fork_N[nodes.parent_N[nodes.size_N < nodes.size_N[nodes.parent_N]]] = True
    nearest_N = nodes.nearest_N(fork_N)
    group_L = nearest_N[nodes.leaf_L]

    count_N = np.maximum(np.bincount(group_L, minlength=len(fork_N)), 1)
    centred_L = nodes.gain_L - (np.bincount(group_L, weights=nodes.gain_L, minlength=len(fork_N)) / count_N)[group_L]
    high_N = np.zeros(len(fork_N))
    np.maximum.at(high_N, group_L, nodes.gain_L)
    centred_L[np.abs(centred_L) <= ROUNDING * high_N[group_L]] = 0.0
    share_N = np.bincount(group_L, weights=centred_L > 0, minlength=len(fork_N)) / count_N
    before_N = nodes.nearest_N(share_N > 0)[nodes.parent_N]
    is_first_N = (share_N[before_N] == 0) | (nodes.parent_N == np.arange(len(fork_N)))
    step_N = np.where(is_first_N, 1 - share_N, share_N - share_N[before_N])

    value_N = nodes.sum_N(centred_L / np.exp(step_N)[group_L]) / nodes.size_N
    behind_S = nearest_N[nodes.node_S] == group_L[nodes.trajectory_S]
    behind_N = np.zeros_like(fork_N)
    behind_N[nodes.node_S[behind_S]] = True
    return nodes.per_segment(np.where(behind_N & ~fork_N, value_N, 0.0))
