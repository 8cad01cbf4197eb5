"""The table of advantage estimators and the two functions that call them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from treepo_swift.core.registry import Registry

TreePath = Sequence[Hashable]
"""``[tree_id, node_1, ..., node_n]`` of one trajectory."""

LEVELS = ('trajectory', 'segment')


class AdvantageEstimator(Protocol):
    """Trajectory level."""

    # With `*args` a type checker lets an estimator name the options that it reads.
    def __call__(self, paths: Sequence[TreePath], rewards: Sequence[float], *args: Any, **options: Any) -> list[float]:
        """Return one advantage per trajectory, before normalisation."""


class SegmentAdvantageEstimator(Protocol):
    """Segment level."""

    def __call__(
        self, paths: Sequence[TreePath], rewards: Sequence[float], *args: Any, **options: Any
    ) -> list[list[float]]:
        """Return one list per trajectory, with one advantage per node after the root, before normalisation."""


Estimator = TypeVar('Estimator', AdvantageEstimator, SegmentAdvantageEstimator)

_estimators: Registry[AdvantageEstimator | SegmentAdvantageEstimator] = Registry('advantage estimator')
_levels: dict[str, str] = {}


def register_advantage(name: str, *, level: str = 'trajectory') -> Callable[[Estimator], Estimator]:
    """Decorator: make an estimator available as ``estimator: <name>`` in `TreeConfig`.

    `level` says what it returns: one value per trajectory, or (``'segment'``) a list per trajectory with one value
    per node after the root.
    """
    if level not in LEVELS:
        raise ValueError(f'level={level!r} of advantage estimator {name!r}: allowed are {", ".join(LEVELS)}.')

    def add(estimator: Estimator) -> Estimator:
        _estimators.register(name)(estimator)
        _levels[name] = level
        return estimator

    return add


def registered_estimators() -> list[str]:
    """The names that `estimate` and `estimate_segments` take."""
    return sorted(_estimators)


def check_estimator(name: str) -> None:
    """Raise ``ValueError`` for a name that nobody registered."""
    _estimators[name]


def is_segment_level(name: str) -> bool:
    """Whether the estimator gives each node of a path its own value, and so goes through `estimate_segments`."""
    check_estimator(name)
    return _levels[name] == 'segment'


def estimate(
    paths: Sequence[TreePath],
    rewards: Sequence[float],
    *,
    estimator: str = 'treepo',
    weighting: str = 'average',
    reject_flat_subgroups: bool = False,
    include_root: bool = True,
    count_chains: str = 'per_depth',
    options: Mapping[str, Any] | None = None,
) -> list[float]:
    """Advantages of a batch of trajectories, one float each, not yet normalised.

    Args:
        paths: per trajectory its tree id and the ids of its nodes, root first. Trees may be mixed, in any order.
        rewards: one finite number per trajectory. Leave failed trajectories out of both lists.
        estimator: a registered name of trajectory level.
        weighting, reject_flat_subgroups, include_root, count_chains: for `treepo`, see `TreepoAdvantage` of the config.
        options: keyword arguments of an estimator that you registered.

    Raises:
        ValueError: lengths differ, a path is empty, a reward is not finite, a name is unknown or of segment level, or
            the estimator's result does not fit.
    """
    if is_segment_level(estimator):
        raise ValueError(f'estimator={estimator!r} gives one value per segment: call estimate_segments.')
    _check_batch(paths, rewards)
    keywords = dict(options or {})
    if estimator == 'treepo':
        keywords = dict(
            weighting=weighting,
            reject_flat_subgroups=reject_flat_subgroups,
            include_root=include_root,
            count_chains=count_chains,
        )
    values = cast(AdvantageEstimator, _estimators[estimator])(paths, rewards, **keywords)
    _check_result(estimator, values, [1] * len(paths), [1] * len(values))
    return values


def estimate_segments(
    paths: Sequence[TreePath],
    rewards: Sequence[float],
    *,
    estimator: str = 'progress',
    weighting: str = 'average',
    reject_flat_subgroups: bool = False,
    include_root: bool = True,
    count_chains: str = 'per_depth',
    options: Mapping[str, Any] | None = None,
) -> list[list[float]]:
    """Advantages of a batch of trajectories, one list each with a value per node after the root, not yet normalised.

    An estimator of trajectory level repeats its value for every node. Arguments and errors are those of `estimate`.
    """
    if not is_segment_level(estimator):
        values = estimate(
            paths,
            rewards,
            estimator=estimator,
            weighting=weighting,
            reject_flat_subgroups=reject_flat_subgroups,
            include_root=include_root,
            count_chains=count_chains,
            options=options,
        )
        return [[value] * (len(path) - 1) for path, value in zip(paths, values, strict=True)]
    _check_batch(paths, rewards)
    segments = cast(SegmentAdvantageEstimator, _estimators[estimator])(paths, rewards, **dict(options or {}))
    _check_result(
        estimator,
        list(chain.from_iterable(segments)),
        [len(path) - 1 for path in paths],
        [len(values) for values in segments],
    )
    return segments


def _check_batch(paths: Sequence[TreePath], rewards: Sequence[float]) -> None:
    if len(paths) != len(rewards):
        raise ValueError(f'{len(paths)} paths with {len(rewards)} rewards: there must be one reward per path.')
    for index, path in enumerate(paths):
        if not path:
            raise ValueError(f'paths[{index}] is empty: a path begins with its tree id.')
    finite = np.isfinite(np.asarray(rewards, dtype=np.float64))
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(
            f'rewards[{index}] is {rewards[index]!r}: a reward must be a finite number. Leave failed '
            'trajectories out of paths and rewards.'
        )


def _check_result(estimator: str, values: Sequence[float], expected: list[int], lengths: list[int]) -> None:
    """Name the estimator whose result has a value missing, a value too many, or one that is not finite."""
    if len(lengths) != len(expected):
        raise ValueError(
            f'Advantage estimator {estimator!r} returned {len(lengths)} results for {len(expected)} paths: '
            'it must return one per path.'
        )
    if lengths != expected:
        index = next(i for i, pair in enumerate(zip(lengths, expected)) if pair[0] != pair[1])
        raise ValueError(
            f'Advantage estimator {estimator!r} returned {lengths[index]} values for paths[{index}], which '
            f'has {expected[index]} nodes after the root: it must return one per node.'
        )
    if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
        raise ValueError(f'Advantage estimator {estimator!r} returned a value that is not finite for finite rewards.')
