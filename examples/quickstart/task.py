"""A task that a tiny model can learn on a laptop: add up four to six digits.

    python task.py --output data            # writes data/train.jsonl and data/heldout.jsonl

Going step by step is nearly always right and guessing is nearly always wrong, so what reinforcement learning has to
find is a *strategy*. Every demonstration may change its mind on the way (a guess that turns into an honest count, a
count that is given up half-way), so that a fork is worth something at any depth of a tree and not only at the root.

This module needs the standard library only: a reward function may import it in any process.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ('pretrain', 'train', 'heldout')
STYLES = ('step by step', 'after a false start', 'gave up half-way', 'guess')

HONEST_OPENINGS = ('Let me add one digit at a time.', 'I will go step by step.', 'I take the digits in order.')
PROMPTS = ('Add up the digits of {}.', 'What is the digit sum of {}?', 'Sum the digits of {}.')
DRILL_PROMPT = 'Practise adding.'

# How often a demonstration does what. Together they put a pre-trained model's sampled accuracy near one half.
P_OPEN_WITH_GUESS = 0.45
P_RECONSIDER = 0.3
P_TEMPTED = 0.2
P_GIVE_UP = 0.6

_BOXED = '\\boxed{'


@dataclass(frozen=True)
class Problem:
    terms: tuple[int, ...]
    """The digits to add: 1 to 9, each at most once, so that the digit after a given one is never in doubt."""
    prompt: str
    """What the user says."""

    @property
    def solution(self) -> str:
        return str(sum(self.terms))

    def to_row(self) -> dict[str, object]:
        """One line of ms-swift's GRPO dataset; `solution` reaches the reward function as a column."""
        return {'messages': [{'role': 'user', 'content': self.prompt}], 'solution': self.solution}


def split_of(terms: tuple[int, ...]) -> str:
    """The split that a sum belongs to, whatever the seed.

    The hash ignores the order of the terms, so no reordering of a held-out sum is ever trained on.
    """
    bucket = zlib.crc32(bytes(sorted(terms))) % 8
    return 'heldout' if bucket == 0 else 'train' if bucket <= 2 else 'pretrain'


def problems(split: str, seed: int) -> Iterator[Problem]:
    """An endless seeded stream of the problems of one split; `distinct_problems` drops what repeats."""
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; allowed: {", ".join(SPLITS)}')
    rng = random.Random(f'{split}-{seed}')
    while True:
        terms = tuple(rng.sample(range(1, 10), rng.randint(4, 6)))
        if split_of(terms) == split:
            yield Problem(terms, rng.choice(PROMPTS).format(''.join(map(str, terms))))


def distinct_problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` problems of one split, no prompt twice: ms-swift gives equal prompts one `prompt_id`."""
    found: dict[str, Problem] = {}
    for problem in problems(split, seed):
        if len(found) == count:
            break
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """A written answer in one of the styles; only one that takes every step is sure to be right."""
    if rng.random() >= P_OPEN_WITH_GUESS:
        return f'{rng.choice(HONEST_OPENINGS)}\n{_count(problem.terms, rng)}'
    musing, guess = _muse(problem.terms, rng)
    if rng.random() < P_RECONSIDER:
        second_thought = rng.choice(('No, let me do it properly.', 'But I should check that.', 'Better to count.'))
        return f'{musing} {second_thought}\n{_count(problem.terms, rng)}'
    return f'{musing} {rng.choice(("I am done.", "So I say", "Good enough."))} {_BOXED}{guess}}}'


def drill(rng: random.Random) -> str:
    """Bare additions in the words of a step, the answer to DRILL_PROMPT; for pre-training only.

    A step's sum is two tokens in twenty. A model that meets additions nowhere else learns to copy the digits long
    before it learns to add them, and would fail by bad arithmetic instead of by bad strategy.
    """
    pairs = [(rng.randint(1, 35), rng.randint(1, 9)) for _ in range(8)]
    return ' '.join(f'{total} and {term} make {total + term}.' for total, term in pairs)


def _muse(terms: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """An answer without adding it all up: a plain guess, or a shortcut that is always wrong."""
    if rng.random() < 0.5:
        guess = _wrong_guess(sum(terms), rng)
        opening = rng.choice(('This looks easy.', 'I have a feeling for sums.', 'There is no need to add it all up.'))
        return f'{opening} {rng.choice(("I guess it is", "It must be", "It looks like"))} {guess}.', guess
    guess = terms[-2] + terms[-1]
    opening = rng.choice(('Take the last two digits.', 'The last two digits will do.'))
    return f'{opening} {terms[-2]} and {terms[-1]} make {guess}.', guess


def _count(terms: tuple[int, ...], rng: random.Random) -> str:
    """The running sum, one step a line. What is left is written out, so that each step follows from the line before."""
    total = terms[0]
    tempted = False
    lines = [f'Start with {total}. Left: {"".join(map(str, terms[1:]))}.']
    for step, term in enumerate(terms[1:], start=1):
        left = terms[step + 1 :]
        after = total + term
        lines.append(f'Step {step}: {total} and {term} make {after}. Left: {"".join(map(str, left)) or "none"}.')
        total = after
        if left and not tempted and rng.random() < P_TEMPTED:
            tempted = True
            if rng.random() < P_GIVE_UP:
                lines.append(_give_up(total, sum(terms), rng))
                return '\n'.join(lines)
            lines.append(rng.choice(('I could stop here, but no.', 'This is slow, but I go on.')))
    lines.append(f'All digits are used. The sum is {total}. {_BOXED}{total}}}')
    return '\n'.join(lines)


def _give_up(total: int, solution: int, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return f'This is slow, so I leave out the rest. {_BOXED}{total}}}'
    opening = rng.choice(('This is slow, so I guess', 'I could stop here and guess'))
    return f'{opening} the rest. {_BOXED}{_wrong_guess(solution, rng)}}}'


def _wrong_guess(solution: int, rng: random.Random) -> int:
    """Near the solution but rarely it; the distance is drawn blindly, so that there is no rule for a model to learn."""
    return max(4, solution + rng.randint(-9, 9))


def style_of(text: str) -> str:
    """Which of STYLES an answer is in, by the fixed phrases of `demonstrate`."""
    if 'Start with' not in text:
        return 'guess'
    if 'All digits are used' not in text:
        return 'gave up half-way'
    return 'step by step' if text.startswith(HONEST_OPENINGS) else 'after a false start'


def is_correct(text: str | None, solution: str) -> bool:
    r"""Whether the last complete `\boxed{...}` of a model's text holds exactly the solution.

    The text is hostile input: it is searched in linear time (two scans from the end) and compared as a string, never
    parsed as a number. A `\boxed{` that is never closed does not hide a complete one before it.
    """
    if not isinstance(text, str):
        return False
    start = text.rfind(_BOXED, 0, text.rfind('}') + 1)
    if start < 0:
        return False
    start += len(_BOXED)
    return text[start : text.index('}', start)] == solution


def write_datasets(
    distinct: Callable[[str, int, int], Sequence[Any]], *, train: int = 2000, heldout: int = 256
) -> None:
    """The command line of a task: writes its train and held-out problems as ms-swift's GRPO datasets.

    `distinct` gives `(split, count, seed)` problems, each of which has a `to_row`.
    """
    parser = argparse.ArgumentParser(description='Write the train and held-out problems as ms-swift GRPO datasets.')
    parser.add_argument('--output', type=Path, required=True, help='folder for train.jsonl and heldout.jsonl')
    parser.add_argument('--train', type=int, default=train, help='how many training problems')
    parser.add_argument('--heldout', type=int, default=heldout, help='how many held-out problems')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split, count in (('train', args.train), ('heldout', args.heldout)):
        path = args.output / f'{split}.jsonl'
        rows = [json.dumps(problem.to_row()) + '\n' for problem in distinct(split, count, args.seed)]
        path.write_text(''.join(rows), encoding='utf-8')
        print(f'{path}: {count} problems')


def main() -> None:
    write_datasets(distinct_problems)


if __name__ == '__main__':
    main()
