r"""Puzzles of reasoning-gym (https://github.com/open-thought/reasoning-gym), judged by their own scorers.

The question is the task's, with a line behind it that asks for a ``\boxed{}``. What is in an answer's last box is what
the scorer gets and what majority vote counts.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any

from .judging import Judge, boxed
from .prompts import PromptRow, prompt_rows

logger = logging.getLogger(__name__)

PREFIX = 'reasoning-gym:'
ASKED = '\n\nThink step by step, and give only the final answer in \\boxed{}.'


def read_puzzles(name: str, limit: int | None, seed: int) -> tuple[list[PromptRow], Judge]:
    """The first `limit` puzzles of ``reasoning-gym:TASK[#N]`` (N: 500 where it isn't given), and their judge.

    Each is made of `seed` and its number: more of them change none. A scorer gives 1 for right, and may give less for
    what is nearly right.

    Raises:
        ValueError: reasoning-gym is not installed, has no such task, or N is no number.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as e:
        raise ValueError(
            f'{name}: {e.name} is not installed: pip install "treepo-swift[reasoning-gym]", or reasoning-gym.'
        ) from e
    task, mark, count = name.removeprefix(PREFIX).partition('#')
    if mark and not (count.isdecimal() and int(count)):
        raise ValueError(f'{name}: behind # stands how many puzzles are made, not {count!r}.')
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)
        raise ValueError(f'{name}: reasoning-gym has no task {task!r}; it has {", ".join(near)}.')
    try:
        made = reasoning_gym.create_dataset(task, seed=seed, **({'size': int(count)} if mark else {}))
    except (AssertionError, ValueError) as e:
        raise ValueError(f'{name}: reasoning-gym can not make this task without more settings ({e}).') from e
    total = len(made) if limit is None else min(limit, len(made))
    entries = [made[index] for index in range(total)]
    values = [
        (
            f'puzzle {number}',
            {'prompt': entry['question'] + ASKED, 'solution': entry['answer'], 'metadata': entry['metadata']},
        )
        for number, entry in enumerate(entries, 1)
    ]
    rows = prompt_rows(name, values, None)
    by_key = {row.key: entry for row, entry in zip(rows, entries, strict=True)}

    def judge(row: PromptRow, answers: list[str]) -> list[float]:
        return [_score(made, by_key[row.key], answer) for answer in answers]

    return rows, judge


def _score(made: Any, entry: dict[str, Any], answer: str) -> float:
    said = boxed(answer)
    if said is None:
        return 0.0
    try:
        return float(made.score_answer(answer=said, entry=entry))
    except Exception as e:
        # Scorers parse what a model wrote, and not each of them expects everything.
        logger.warning('reasoning-gym can not score %.100r, which counts as wrong (%s: %s)', said, type(e).__name__, e)
        return 0.0
