"""Sibling-relative advantage of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import TreePath, register_advantage
from .subgroups import Subgroups

EPSILON = 1e-4
ROUNDING = 1e-5
"""Share of the tree's reward range below which a spread of siblings is rounding (rewards may come from float32)."""


@register_advantage('spo', level='segment')
def spo(paths: Sequence[TreePath], rewards: Sequence[float]) -> list[list[float]]:
    """Sibling z-score, after the tree-based advantages of SPO (arXiv 2505.23564).

    ``A(node) = (V(node) - mean(V of siblings)) / (std(V of siblings) + 1e-4)``. V is the mean reward of the
    trajectories through a node. The siblings are all children of the node's parent, itself among them; each counts
    once, however many trajectories run through it. The standard deviation is the sample one (n - 1). Epsilon and
    divisor are this package's choice, the same as in `grpo`.

    Degenerate cases: an only child gets 0. Siblings whose values spread (std) by at most 1e-5 of the tree's reward
    range are alike and get zeros, so that rounding is not blown up. Siblings whose values nearly agree still get values
    of order 1: a z-score says which sibling is better, not by how much.
    """
    nodes = Subgroups(paths, rewards)
    total = len(nodes.parent_N)
    below = np.flatnonzero(nodes.parent_N != np.arange(total))
    parent, value = nodes.parent_N[below], nodes.value_N[below]

    children_N = np.maximum(np.bincount(parent, minlength=total), 1)
    mean_N = np.bincount(parent, weights=value, minlength=total) / children_N
    gap = value - mean_N[parent]
    std_N = np.sqrt(np.bincount(parent, weights=gap**2, minlength=total) / np.maximum(children_N - 1, 1))

    range_N = np.zeros(total)
    np.maximum.at(range_N, nodes.root_L, nodes.gain_L)
    alike = std_N[parent] <= ROUNDING * range_N[nodes.root_N[below]]
    advantage_N = np.zeros(total)
    advantage_N[below] = np.where(alike, 0.0, gap / (std_N[parent] + EPSILON))
    return nodes.per_segment(advantage_N)
