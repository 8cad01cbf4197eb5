r"""The quickstart's digit sums, one step a turn: the user says 'Go on.' until the assistant boxes an answer.

    python one_step_a_turn.py --output data            # writes data/train.jsonl and data/heldout.jsonl

Who takes every step is right after five to seven turns. At any turn the assistant may lose patience and box a guess,
which is mostly wrong; and when the user wants an answer at once it has to. So a fork is worth something at any turn.

This module needs the standard library and the quickstart's task only: a reward function may import it in any process.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'quickstart'))
from task import DRILL_PROMPT, SPLITS, Problem, distinct_problems, drill, is_correct, main, problems

__all__ = ['DRILL_PROMPT', 'SPLITS', 'Problem', 'distinct_problems', 'drill', 'is_correct', 'problems']

STYLES = ('every step', 'lost patience', 'had to answer', 'guess')

GO_ON = 'Go on.'
ANSWER_NOW = 'You must answer now.'
MAX_TURNS = 7
"""Six digits take a start, five additions and the answer."""

# How often a demonstration does what, at a turn. Few answers come early: the comparison of calls is one of
# conversations that use nearly all of their turns, as those of the published table do.
P_GUESS_AT_ONCE = 0.03
P_LOSE_PATIENCE = 0.02
P_MUST_ANSWER = 0.1

# What make_model.py pre-trains with.
STEPS = 1000
MAX_RESPONSE = 64

Messages = list[dict[str, str]]

_BOXED = '\\boxed{'


def demonstrate(problem: Problem, rng: random.Random) -> Messages:
    """A conversation that ends with a boxed answer; only one that takes every step is sure to be right."""
    terms = problem.terms
    messages = [{'role': 'user', 'content': problem.prompt}]
    if rng.random() < P_GUESS_AT_ONCE:
        opening = rng.choice(('This looks easy.', 'I have a feeling for sums.', 'There is no need to add it all up.'))
        return _say(messages, f'{opening} {_box(_guess(sum(terms), rng))}')
    for step in range(len(terms)):
        total, left = sum(terms[: step + 1]), terms[step + 1 :]
        if step == 0:
            _say(messages, f'Start with {total}. Left: {_digits(left)}.')
        else:
            _say(messages, f'Step {step}: {total - terms[step]} and {terms[step]} make {total}. Left: {_digits(left)}.')
        if step and rng.random() < P_MUST_ANSWER:
            messages.append({'role': 'user', 'content': ANSWER_NOW})
            return _say(messages, f'Then I guess the rest. {_box(_guess(sum(terms), rng))}' if left else _finish(total))
        messages.append({'role': 'user', 'content': GO_ON})
        if left and rng.random() < P_LOSE_PATIENCE:
            opening = rng.choice(('This is slow, so I guess the rest.', 'That is enough. I leave out the rest.'))
            return _say(messages, f'{opening} {_box(_guess(sum(terms), rng) if "guess" in opening else total)}')
    return _say(messages, _finish(sum(terms)))


def _say(messages: Messages, text: str) -> Messages:
    messages.append({'role': 'assistant', 'content': text})
    return messages


def _finish(total: int) -> str:
    return f'All digits are used. {_box(total)}'


def _box(number: int) -> str:
    return f'{_BOXED}{number}}}'


def _digits(left: tuple[int, ...]) -> str:
    return ''.join(map(str, left)) or 'none'


def _guess(solution: int, rng: random.Random) -> int:
    """Near the solution but rarely it; the distance is drawn blindly, so that there is no rule for a model to learn."""
    return max(4, solution + rng.randint(-9, 9))


def reply(messages: Messages, problem: Problem) -> dict[str, str] | None:
    """What the user says next; None after a complete boxed answer and after the last turn."""
    turns = sum(message['role'] == 'assistant' for message in messages)
    if turns >= MAX_TURNS or is_boxed(messages[-1]['content']):
        return None
    return {'role': 'user', 'content': ANSWER_NOW if turns == MAX_TURNS - 1 else GO_ON}


def is_boxed(text: str) -> bool:
    r"""Whether there is a complete `\boxed{...}`, in linear time."""
    return text.rfind(_BOXED, 0, text.rfind('}') + 1) >= 0


def succeeded(messages: Messages, problem: Problem) -> bool:
    return is_correct(messages[-1]['content'], problem.solution)


def style_of(messages: Messages) -> str:
    """Which of STYLES a conversation is in, by the fixed phrases of `demonstrate`."""
    if 'All digits are used' in messages[-1]['content']:
        return 'every step'
    if len(messages) == 2:
        return 'guess'
    return 'had to answer' if messages[-2]['content'] == ANSWER_NOW else 'lost patience'


if __name__ == '__main__':
    main()
