"""Whether an answer is right, and what it says: a reward function of swift's, or the text in its last box."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from .prompts import PromptRow

RIGHT_FROM = 1.0
"""An answer is right from this reward on; partial credit is not."""
BOXED = '\\boxed{'

Judge = Callable[[PromptRow, list[str]], list[float]]
"""Rewards of a prompt's answers."""


def boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` that has any, without blanks around it; None without one.

    Braces inside are balanced; of a box in a box it is the inner one. The text is a model's: it is searched from its
    end, in linear time.
    """
    ends: list[int] = []
    for at in range(len(text) - 1, -1, -1):
        if text[at] == '}':
            ends.append(at)
        elif text[at] == '{' and ends:
            end = ends.pop()
            if text.endswith(BOXED, 0, at + 1) and (content := text[at + 1 : end].strip()):
                return content
    return None


def by_solution(row: PromptRow, answers: list[str]) -> list[float]:
    r"""1 where the last ``\boxed{...}`` of an answer is the line's `solution` (or what that has in a box), else 0."""
    solution = str(row.columns['solution'])
    wanted = boxed(solution) or solution.strip()
    return [float(boxed(answer) == wanted) for answer in answers]


def load_judge(name: str | None, rows: Sequence[PromptRow]) -> Judge:
    """The reward function `name` of swift, of which plugins may have registered more; None: `by_solution`.

    Raises:
        ValueError: nobody registered that name, or without a name a row has no `solution`.
    """
    from swift.rewards import orms

    if name is None:
        for row in rows:
            if row.columns.get('solution') is None:
                raise ValueError(
                    f'{row.place} of the prompts has no "solution", with which answers are compared. Give it one '
                    'everywhere, or name a reward function of swift by --reward.'
                )
        return by_solution
    if name not in orms:
        raise ValueError(
            f'--reward {name}: swift has no such reward function; it has {", ".join(sorted(orms))}. A file that '
            'registers your own goes to --external_plugins.'
        )
    made: Any = orms[name]
    return _judge_of(name, made if inspect.isfunction(made) else made(args=None))


def _judge_of(name: str, function: Callable[..., Any]) -> Judge:
    def judge(row: PromptRow, answers: list[str]) -> list[float]:
        columns = {key: [value] * len(answers) for key, value in row.columns.items()}
        try:
            rewards = function(completions=answers, messages=[row.messages] * len(answers), **columns)
            if inspect.isawaitable(rewards):
                rewards = asyncio.run(_awaited(rewards))
        except Exception as e:
            raise ValueError(
                f'Reward function {name!r} raised {type(e).__name__}: {e} for the answers to {row.place}, whose '
                f'keys are {", ".join(row.columns) or "none"}.'
            ) from e
        fine = isinstance(rewards, (list, tuple)) and len(rewards) == len(answers)
        if not fine or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in rewards):
            raise ValueError(
                f'Reward function {name!r} returned {rewards!r} for the {len(answers)} answers to {row.place}: '
                'allowed is a list of one finite number each.'
            )
        return [float(value) for value in rewards]

    return judge


async def _awaited(value: Any) -> Any:
    return await value
