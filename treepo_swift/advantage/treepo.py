"""The TreePO advantage: a trajectory against every subgroup that it belongs to."""
from __future__ import annotations

from typing import Hashable, Sequence

from .registry import TreePath, register_advantage

WEIGHTINGS = ('average', 'size')
CHAIN_COUNTS = ('per_depth', 'per_fork')


@register_advantage('treepo')
def treepo(paths: Sequence[TreePath],
           rewards: Sequence[float],
           *,
           weighting: str = 'average',
           reject_flat_subgroups: bool = False,
           include_root: bool = True,
           count_chains: str = 'per_depth') -> list[float]:
    """Subgroup advantage of TreePO (arXiv 2508.17445).

    ``A_i = sum_j w_ij (r_i - mean(G_ij)) / sum_j w_ij`` over the depths j at which trajectory i has a subgroup
    G_ij, with ``w = 1`` (`average`, Eq. 5) or ``w = |G_ij|`` (`size`, Eq. 6). Depth 0 is the whole tree.

    Degenerate cases: a subgroup of one counts only at depth 0, where a tree of a single trajectory has baseline 0.
    `reject_flat_subgroups` (Eq. 7) leaves out subgroups below the root whose rewards are all alike; the root stays,
    so a tree whose rewards are all alike gives zeros. With ``include_root=False`` depth 0 counts only for
    trajectories that have no other subgroup left. Where nothing below the root is shared this is plain GRPO's
    reward minus group mean.
    """
    for name, value, allowed in (('weighting', weighting, WEIGHTINGS), ('count_chains', count_chains, CHAIN_COUNTS)):
        if value not in allowed:
            raise ValueError(f'{name}={value!r}: allowed are {", ".join(allowed)}.')
    # Subgroups get numbers by (number of the parent subgroup, id of the node): one dict step per node.
    numbers: dict[tuple[int, Hashable], int] = {}
    size: list[int] = []
    total: list[float] = []
    lowest: list[float] = []
    highest: list[float] = []
    groups_of: list[list[int]] = []
    for path, reward in zip(paths, rewards, strict=True):
        parent = -1
        groups = []
        for node in path:
            parent = numbers.setdefault((parent, node), len(size))
            if parent == len(size):
                size.append(0)
                total.append(0.0)
                lowest.append(reward)
                highest.append(reward)
            size[parent] += 1
            total[parent] += reward
            lowest[parent] = min(lowest[parent], reward)
            highest[parent] = max(highest[parent], reward)
            groups.append(parent)
        groups_of.append(groups)

    def counts(group: int, parent: int) -> bool:
        if size[group] == 1 or (reject_flat_subgroups and lowest[group] == highest[group]):
            return False
        return not (count_chains == 'per_fork' and size[group] == size[parent])

    advantages = []
    for groups, reward in zip(groups_of, rewards, strict=True):
        root = groups[0]
        used = [group for parent, group in zip(groups, groups[1:]) if counts(group, parent)]
        if include_root or not used:
            used.append(root)
        weights = [size[group] if weighting == 'size' else 1 for group in used]
        gaps = [reward - (total[group] / size[group] if size[group] > 1 else 0.0) for group in used]
        advantages.append(sum(w * gap for w, gap in zip(weights, gaps)) / sum(weights))
    return advantages
