"""The quickstart's task for a model that goes on after its answer: every demonstration has a remark behind the box.

    python examples/quickstart/make_model.py --output models/talkative --task examples/ablations/talkative_task.py

Problems and rewards are the quickstart's own.
"""

from __future__ import annotations

import random

import task
from task import DRILL_PROMPT, STYLES, Problem, distinct_problems, drill, is_correct, problems, style_of

__all__ = ['DRILL_PROMPT', 'STYLES', 'demonstrate', 'distinct_problems', 'drill', 'is_correct', 'problems', 'style_of']

REMARKS = (
    'That is what I get.',
    'This is the digit sum of your number.',
    'The order of the digits does not matter.',
    'You can ask me for another number.',
)


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """The quickstart's answer and one or two remarks, which say nothing about the sum."""
    return ' '.join([task.demonstrate(problem, rng), *rng.sample(REMARKS, rng.randint(1, 2))])
