"""The report's arithmetic: curves at marks, intervals over seeds, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from .runs import Point

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""
T_MANY = 2.131
"""For more of them: a little wide."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % confidence interval by Student's t."""

    mean: float
    half: float | None
    """None for a single seed: nothing is known of its spread."""

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def percent(self, *, sign: bool = False) -> str:
        """In per cent, or in points of per cent."""
        mean = f'{100 * self.mean:{"+" if sign else ""}.1f}'
        return mean if self.half is None else f'{mean} ± {100 * self.half:.1f}'


def interval(values: Sequence[float]) -> Interval:
    if len(values) < 2:
        return Interval(fmean(values), None)
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else T_MANY
    return Interval(fmean(values), t * stdev(values) / sqrt(len(values)))


def accuracy_at(curve: Sequence[Point], decoded: float) -> float:
    """Linear between the points around; beyond the last one its accuracy."""
    for before, after in zip(curve, curve[1:]):
        if decoded <= after.decoded:
            share = (decoded - before.decoded) / (after.decoded - before.decoded)
            return before.accuracy + share * (after.accuracy - before.accuracy)
    return curve[-1].accuracy


def tokens_to(curves: Sequence[Sequence[Point]], target: float, marks: Sequence[float]) -> float | None:
    """Decoded tokens at which the mean of `curves` first reaches `target`, linear between `marks`; None: at none."""
    values = [(mark, fmean(accuracy_at(curve, mark) for curve in curves)) for mark in (0.0, *marks)]
    if values[0][1] >= target:
        return 0.0
    for (mark, low), (next_mark, high) in zip(values, values[1:]):
        if high >= target:
            return mark + (target - low) / (high - low) * (next_mark - mark)
    return None
