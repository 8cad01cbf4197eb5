"""SPO-tree: how much a segment raised a value that is averaged child by child."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import TreePath, register_advantage
from .subgroups import Subgroups


@register_advantage('spo_tree', level='segment')
def spo_tree(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Segment advantage of SPO-tree (arXiv 2505.23564) without a standard deviation, `adv_method: rloo` in its code.

    ``A(node) = U(node) - U(parent)``, where U of a node is the mean of its children's U, and at the end of a trajectory
    its reward: each child counts once, however many trajectories run through it. As U(parent) is the mean of the
    siblings, it is the node's U less that of its siblings' mean. `progress` is the same with V, the mean over all
    trajectories through a node; where all nodes of a depth have equally many trajectories both are the same.

    Degenerate cases: an only child gets 0, and so does every node of a tree of one trajectory or with rewards all
    alike. A trajectory that ends where others go on counts as one more child there.
    """
    nodes = Subgroups(paths, rewards)
    value_N = nodes.child_mean_N()
    return nodes.per_segment(value_N - value_N[nodes.parent_N])
