"""The TreePO advantage: a trajectory against every subgroup that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

WEIGHTINGS = ('average', 'size')
CHAIN_COUNTS = ('per_depth', 'per_fork')


@register_advantage('treepo')
def treepo(
    paths: Sequence[TreePath],
    rewards: Sequence[float],
    *,
    weighting: str = 'average',
    reject_flat_subgroups: bool = False,
    include_root: bool = True,
    count_chains: str = 'per_depth',
) -> list[float]:
    """Subgroup advantage of TreePO (arXiv 2508.17445).

    ``A_i = sum_j w_ij (r_i - mean(G_ij)) / sum_j w_ij`` over the depths j at which trajectory i has a subgroup
    G_ij, with ``w = 1`` (`average`, Eq. 5) or ``w = |G_ij|`` (`size`, Eq. 6). Depth 0 is the whole tree.

    Degenerate cases: a subgroup of one counts only at depth 0, where a tree of a single trajectory has baseline 0, so
    that its advantage is its reward. `reject_flat_subgroups` (Eq. 7) leaves out subgroups below the root whose rewards
    are all alike; the root stays, so a tree whose rewards are all alike gives zeros. With ``include_root=False`` depth
    0 counts only for trajectories that have no other subgroup left. Where nothing below the root is shared this is
    plain GRPO's reward minus group mean.
    """
    for name, value, allowed in (('weighting', weighting, WEIGHTINGS), ('count_chains', count_chains, CHAIN_COUNTS)):
        if value not in allowed:
            raise ValueError(f'{name}={value!r}: allowed are {", ".join(allowed)}.')
    groups = Subgroups(paths, rewards)
    size_N, root_L = groups.size_N, groups.root_L
    counts_N = size_N > 1
    if reject_flat_subgroups:
        counts_N &= ~groups.is_flat_N()
    if count_chains == 'per_fork':
        counts_N &= size_N != size_N[groups.parent_N]
    counts_N[root_L] = False

    unit_N = size_N if weighting == 'size' else np.ones_like(size_N)
    weight_N = np.where(counts_N, unit_N, 0)
    total_L = groups.sum_L(weight_N)
    root_weight_L = np.where(include_root | (total_L == 0), unit_N[root_L], 0)
    total_L += root_weight_L
    baseline_L = (groups.sum_L(weight_N * groups.value_N) + root_weight_L * groups.value_N[root_L]) / total_L
    alone_L = size_N[root_L] == 1
    advantage_L = np.where(alone_L, np.asarray(rewards, dtype=np.float64), groups.gain_L - baseline_L)
    return list(advantage_L.tolist())
