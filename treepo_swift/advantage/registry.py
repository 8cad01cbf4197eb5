"""The table of advantage estimators and the one function that calls them."""
from __future__ import annotations

from typing import Any, Callable, Hashable, Protocol, Sequence

from ..registry import Registry

TreePath = Sequence[Hashable]
"""``[tree_id, node_1, ..., node_n]`` of one trajectory."""


class AdvantageEstimator(Protocol):
    def __call__(self, paths: Sequence[TreePath], rewards: Sequence[float], **options: Any) -> list[float]:
        """Return one advantage per trajectory, before normalisation."""


_estimators: Registry[AdvantageEstimator] = Registry('advantage estimator')


def register_advantage(name: str) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator: make an estimator available as ``estimator: <name>`` in `TreeConfig`."""
    return _estimators.register(name)


def check_estimator(name: str) -> None:
    """Raise ``ValueError`` for a name that nobody registered."""
    _estimators[name]


def estimate(paths: Sequence[TreePath],
             rewards: Sequence[float],
             *,
             estimator: str = 'treepo',
             weighting: str = 'average',
             reject_flat_subgroups: bool = False,
             include_root: bool = True,
             count_chains: str = 'per_depth') -> list[float]:
    """Advantages of a batch of trajectories, one float each, not yet whitened.

    Args:
        paths: per trajectory its tree id and the ids of its nodes, root first. Trees may be mixed, in any order.
        rewards: one finite number per trajectory. Leave failed trajectories out of both lists.
        estimator: a registered name.
        weighting, reject_flat_subgroups, include_root, count_chains: see `treepo_swift.config.TreeConfig`.

    Raises:
        ValueError: lengths differ, a path is empty, or a name is unknown.
    """
    if len(paths) != len(rewards):
        raise ValueError(f'{len(paths)} paths with {len(rewards)} rewards: there must be one reward per path.')
    for index, path in enumerate(paths):
        if not path:
            raise ValueError(f'paths[{index}] is empty: a path begins with its tree id.')
    return _estimators[estimator](
        paths,
        rewards,
        weighting=weighting,
        reject_flat_subgroups=reject_flat_subgroups,
        include_root=include_root,
        count_chains=count_chains)
