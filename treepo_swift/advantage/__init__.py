"""Advantages from trees: which fork earned the reward. One estimator a file, a registry, and normalisation.

``paths[i] = [tree_id, node_1, ..., node_n]`` and ``rewards[i]`` describe trajectory i; the subgroup of i at depth j
is every trajectory whose path begins with the same j + 1 ids. Trajectory-level estimators give one value per
trajectory (`estimate`), segment-level ones one per node after the root (`estimate_segments`).
"""

from .at2po import at2po
from .depth_wise import depth_wise
from .fr3e import fr3e
from .grpo import grpo
from .normalisation import normalise
from .progress import progress
from .registry import (
    AdvantageEstimator,
    SegmentAdvantageEstimator,
    check_estimator,
    estimate,
    estimate_segments,
    is_segment_level,
    register_advantage,
    registered_estimators,
)
from .reinforce_plus_plus import reinforce_plus_plus
from .rloo import rloo
from .rtmc import rtmc
from .spo import spo
from .spo_tree import spo_tree
from .subgroups import Subgroups
from .tree_grpo import tree_grpo
from .treepo import treepo
from .treerl import treerl
from .whitening import whiten

__all__ = [
    'AdvantageEstimator',
    'SegmentAdvantageEstimator',
    'Subgroups',
    'at2po',
    'check_estimator',
    'depth_wise',
    'estimate',
    'estimate_segments',
    'fr3e',
    'grpo',
    'is_segment_level',
    'normalise',
    'progress',
    'register_advantage',
    'registered_estimators',
    'reinforce_plus_plus',
    'rloo',
    'rtmc',
    'spo',
    'spo_tree',
    'tree_grpo',
    'treepo',
    'treerl',
    'whiten',
]
