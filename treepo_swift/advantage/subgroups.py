"""The subgroups of a batch, numbered once, so that estimators are a few lines over arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import chain, count

import numpy as np

from .registry import TreePath


class Subgroups:
    """Numbers every node of every tree by (number of its parent, id), and holds each node's subgroup.

    A node's subgroup is the trajectories through it. Shapes: ``_L`` trajectories (leaves), ``_S`` steps, which are the
    ids of all paths laid end to end, ``_N`` nodes. Trees come first: node number t < number of trees is a root.

    Rewards are held as gains over the lowest reward of their tree. Differences of rewards are what advantages are made
    of, and in this form a tree whose rewards are all alike has gains and values of exactly 0.
    """

    gain_L: np.ndarray
    """Reward minus the lowest reward of the tree."""
    root_L: np.ndarray
    """Node number of the trajectory's tree."""
    leaf_L: np.ndarray
    """Node number of the trajectory's end."""
    trajectory_S: np.ndarray
    """Trajectory of each step."""
    node_S: np.ndarray
    """Node number of each step."""
    parent_N: np.ndarray
    """Node number of the parent; a root is its own parent."""
    root_N: np.ndarray
    """Node number of the tree's root."""
    size_N: np.ndarray
    """Trajectories in the subgroup."""
    value_N: np.ndarray
    """Mean gain of the subgroup: the node's value, up to the lowest reward of the tree."""

    def __init__(self, paths: Sequence[TreePath], rewards: Sequence[float]) -> None:
        length_L = np.fromiter(map(len, paths), np.int64, count=len(paths))
        self._end_L = np.cumsum(length_L)
        self._start_L = self._end_L - length_L
        self.trajectory_S = np.repeat(np.arange(len(paths)), length_L)
        self._number(paths, length_L)
        self.root_L = self.node_S[self._start_L]
        self.leaf_L = self.node_S[self._end_L - 1]
        self.root_N = np.empty_like(self.parent_N)
        self.root_N[self.node_S] = self.root_L[self.trajectory_S]

        reward_L = np.asarray(rewards, dtype=np.float64)
        lowest = np.full(len(self.parent_N), np.inf)
        np.minimum.at(lowest, self.root_L, reward_L)
        self.gain_L = reward_L - lowest[self.root_L]
        self.size_N = np.bincount(self.node_S, minlength=len(self.parent_N))
        self.value_N = self.sum_N(self.gain_L) / self.size_N

    def _number(self, paths: Sequence[TreePath], length_L: np.ndarray) -> None:
        """Fill `node_S` and `parent_N`, one depth at a time."""
        known: dict[Hashable, int] = defaultdict(count().__next__)  # numbers ids by first sight
        id_S = np.fromiter(map(known.__getitem__, chain.from_iterable(paths)), np.int64, count=len(self.trajectory_S))
        self.node_S = np.empty_like(id_S)
        parents = [np.empty(0, np.int64)]
        nodes = depth = 0
        rows = np.arange(len(paths))
        parent_of_rows = np.zeros(len(paths), np.int64)
        while len(rows):
            steps = self._start_L[rows] + depth
            key, node = np.unique(parent_of_rows * len(known) + id_S[steps], return_inverse=True)
            self.node_S[steps] = nodes + node
            parents.append(key // len(known) if depth else np.arange(len(key)))
            nodes += len(key)
            depth += 1
            longer = length_L[rows] > depth
            rows, parent_of_rows = rows[longer], self.node_S[steps[longer]]
        self.parent_N = np.concatenate(parents)

    def sum_N(self, value_L: np.ndarray) -> np.ndarray:
        """Sum of a quantity of trajectories over each subgroup."""
        return np.bincount(self.node_S, weights=value_L[self.trajectory_S], minlength=len(self.parent_N))

    def sum_L(self, value_N: np.ndarray) -> np.ndarray:
        """Sum of a quantity of nodes over each path."""
        return np.bincount(self.trajectory_S, weights=value_N[self.node_S], minlength=len(self.gain_L))

    def depth_N(self) -> np.ndarray:
        """Nodes between the tree's root and each node, itself counted; 0 at the root."""
        depth_N = np.empty_like(self.parent_N)
        depth_N[self.node_S] = np.arange(len(self.node_S)) - self._start_L[self.trajectory_S]
        return depth_N

    def nearest_N(self, marked_N: np.ndarray) -> np.ndarray:
        """The nearest of the marked nodes at or above each node; the tree's root where there is none."""
        nearest_N = np.where(marked_N, np.arange(len(self.parent_N)), self.root_N)
        depth_N = self.depth_N()
        for depth in range(1, depth_N.max(initial=0) + 1):
            here = np.flatnonzero((depth_N == depth) & ~marked_N)
            nearest_N[here] = nearest_N[self.parent_N[here]]
        return nearest_N

    def child_mean_N(self) -> np.ndarray:
        """Mean over a node's children of the same, up to the lowest reward of the tree; at the end of a trajectory its
        gain. A trajectory that ends where others go on is one of the children."""
        total = len(self.parent_N)
        sum_N = np.bincount(self.leaf_L, weights=self.gain_L, minlength=total)
        count_N = np.bincount(self.leaf_L, minlength=total)
        value_N, depth_N = np.zeros(total), self.depth_N()
        for depth in range(depth_N.max(initial=0), -1, -1):
            here = np.flatnonzero(depth_N == depth)
            value_N[here] = sum_N[here] / count_N[here]
            if depth:
                np.add.at(sum_N, self.parent_N[here], value_N[here])
                np.add.at(count_N, self.parent_N[here], 1)
        return value_N

    def is_flat_N(self) -> np.ndarray:
        """Whether all rewards of the subgroup are exactly alike."""
        some_L_of_N = np.empty_like(self.parent_N)
        some_L_of_N[self.node_S] = self.trajectory_S
        differs_S = self.gain_L[self.trajectory_S] != self.gain_L[some_L_of_N[self.node_S]]
        differing_N = np.bincount(self.node_S, weights=differs_S, minlength=len(self.parent_N))
        return np.asarray(differing_N == 0)

    def per_segment(self, value_N: np.ndarray) -> list[list[float]]:
        """One list per trajectory with the values of its nodes after the root."""
        values = value_N[self.node_S].tolist()
        return [values[start + 1 : end] for start, end in zip(self._start_L.tolist(), self._end_L.tolist())]


def tree_gaps(paths: Sequence[TreePath], rewards: Sequence[float]) -> tuple[np.ndarray, Subgroups]:
    """Reward minus tree mean of each trajectory, and the trees (without the nodes below their roots)."""
    trees = Subgroups([path[:1] for path in paths], rewards)
    return trees.gain_L - trees.value_N[trees.root_L], trees
