"""Normalisation of advantages over a batch's loss tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-8


def whiten(values: Sequence[float], lengths: Sequence[int], *, shift_mean: bool = True) -> list[float]:
    """``(A - mean) / sqrt(var + 1e-8)``, each trajectory weighted by its loss tokens.

    Args:
        values: one advantage per trajectory of the whole batch, over all ranks.
        lengths: its number of loss tokens; a trajectory with 0 of them moves nothing and gets 0.
        shift_mean: with False the mean is added back, so that only the scale changes.

    The variance is the unbiased one over tokens. A batch of less than two loss tokens has variance 0; a batch whose
    advantages are all alike gives zeros with `shift_mean`.
    """
    if len(values) != len(lengths):
        raise ValueError(f'{len(values)} values with {len(lengths)} lengths.')
    tokens = sum(lengths)
    if tokens == 0:
        return [0.0] * len(values)
    mean = math.fsum(v * n for v, n in zip(values, lengths)) / tokens
    variance = math.fsum(n * (v - mean) ** 2 for v, n in zip(values, lengths)) / max(tokens - 1, 1)
    scale = 1 / math.sqrt(variance + EPSILON)
    offset = 0.0 if shift_mean else mean
    return [(v - mean) * scale + offset if n else 0.0 for v, n in zip(values, lengths)]
