"""Advantages from trees: which fork earned the reward. One estimator a file, a registry, and whitening.

``paths[i] = [tree_id, node_1, ..., node_n]`` and ``rewards[i]`` describe trajectory i; the subgroup of i at depth j
is every trajectory whose path begins with the same j + 1 ids.
"""
from .registry import AdvantageEstimator, estimate, register_advantage
from .treepo import treepo
from .whitening import whiten

__all__ = ['AdvantageEstimator', 'estimate', 'register_advantage', 'treepo', 'whiten']
