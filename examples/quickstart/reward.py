"""The reward of the quickstart, as a swift reward plugin: 1 for a right boxed answer, else 0."""

from __future__ import annotations

from swift.rewards import ORM, orms
from task import is_correct


class DigitSum(ORM):
    def __call__(self, completions: list[str], solution: list[str], **kwargs) -> list[float]:
        return [float(is_correct(text, answer)) for text, answer in zip(completions, solution, strict=True)]


orms['digit_sum'] = DigitSum
