"""Tree-GRPO: a trajectory against its prompt, and against its own first branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

EPSILON = 1e-6


@register_advantage('tree_grpo')
def tree_grpo(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[float]:
    """Inter-tree plus intra-tree advantage of Tree-GRPO (arXiv 2509.21240).

    ``A_i = z(r_i; tree) + z(r_i; first branch)`` with ``z(r; G) = (r - mean(G)) / (std(G) + 1e-6)`` and the sample
    standard deviation (n - 1), as in the paper's code. What grows from one first branch of the root is a tree of its
    own there, and the prompt has several of them; here the prompt's one tree has a first branch for each.

    Degenerate cases: a group of one, or one whose rewards are all alike, adds 0. (In the paper's code a group of one
    adds the reward itself.) With one first branch both terms are the same, and the advantage is twice `grpo`'s.
    """
    nodes = Subgroups([path[:2] for path in paths], rewards)
    branch_L = nodes.node_S[np.cumsum([min(len(path), 2) for path in paths], dtype=np.int64) - 1]
    return list((_z_L(nodes, nodes.root_L) + _z_L(nodes, branch_L)).tolist())


def _z_L(nodes: Subgroups, node_L: np.ndarray) -> np.ndarray:
    """z-score of each trajectory in the subgroup of its `node_L`."""
    gap_L = nodes.gain_L - nodes.value_N[node_L]
    squares_N = np.bincount(node_L, weights=gap_L**2, minlength=len(nodes.parent_N))
    std_N = np.sqrt(squares_N / np.maximum(nodes.size_N - 1, 1))
    return np.asarray(np.where(nodes.is_flat_N()[node_L], 0.0, gap_L / (std_N[node_L] + EPSILON)))
