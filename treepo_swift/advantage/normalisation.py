"""The last step before the loss: advantages of a whole batch on one scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import count

import numpy as np

from .whitening import EPSILON, whiten

HOWS = ('whiten', 'group', 'none')
ROUNDING = 1e-6
"""Share of a tree's largest value below which the spread of its values is rounding."""


def normalise(
    values: Sequence[float], lengths: Sequence[int], trees: Sequence[Hashable], *, how: str, shift_mean: bool = True
) -> list[float]:
    """Normalised advantages.

    Args:
        values: one advantage per trajectory of the whole batch, over all ranks; or one per segment of each trajectory,
            flattened, in which a segment that several trajectories share stands once for each of them.
        lengths: the loss tokens that each value is for; a value with 0 of them moves nothing and gets 0.
        trees: the tree id of each value.
        how: `whiten` (see `whiten`), `none`, or `group`: each value over its tree's standard deviation + 1e-8. That is
            the sample standard deviation (n - 1) of the tree's values, each counted once whatever its length.
        shift_mean: for `whiten` only.

    With `group` a tree whose values are all alike gives zeros, also where they are not 0: without contrast there is no
    scale. So does a tree of a single value.
    """
    if how not in HOWS:
        raise ValueError(f'how={how!r}: allowed are {", ".join(HOWS)}.')
    if not len(values) == len(lengths) == len(trees):
        raise ValueError(f'{len(values)} values with {len(lengths)} lengths and {len(trees)} trees.')
    if how == 'whiten':
        return whiten(values, lengths, shift_mean=shift_mean)
    kept = np.asarray(lengths) > 0
    value = np.where(kept, np.asarray(values, dtype=np.float64), 0.0)
    return list((value if how == 'none' else _scale_by_tree(value, kept, trees)).tolist())


def _scale_by_tree(value: np.ndarray, kept: np.ndarray, trees: Sequence[Hashable]) -> np.ndarray:
    known: dict[Hashable, int] = defaultdict(count().__next__)  # numbers trees by first sight
    tree = np.fromiter(map(known.__getitem__, trees), np.int64, count=len(trees))
    size = np.bincount(tree, weights=kept)
    mean = np.bincount(tree, weights=value) / np.maximum(size, 1)
    gap = np.where(kept, value - mean[tree], 0.0)
    std = np.sqrt(np.bincount(tree, weights=gap**2) / np.maximum(size - 1, 1))
    largest = np.zeros(len(known))
    np.maximum.at(largest, tree, np.abs(value))
    alike = std <= ROUNDING * largest
    return np.where(alike[tree], 0.0, value / (std[tree] + EPSILON))
