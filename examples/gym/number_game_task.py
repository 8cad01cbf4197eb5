"""Guess a number: the rules, what a model is shown before GRPO, and the dataset.

    python number_game_task.py --output data            # writes data/train.jsonl and data/heldout.jsonl

31 numbers and 5 guesses: who halves the range each time always finds the number, who guesses at random or counts up
mostly does not. A demonstration may change its mind on the way, so a fork is worth something at any turn.

This module needs the standard library and the quickstart's task only; `number_game.py` makes it an environment of
ms-swift.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'quickstart'))
from task import write_datasets

SPLITS = ('pretrain', 'train', 'heldout')
STYLES = ('halving', 'changed its mind', 'random', 'counting')

HIGHEST = 31
MAX_GUESSES = 5

OBSERVATION = f'I think of a number from 1 to {HIGHEST}. Guess it.'
HIGHER, LOWER, UNREADABLE = 'Higher.', 'Lower.', 'Say a number.'

HELDOUT = frozenset({4, 6, 10, 14, 18, 20, 26, 30})
"""Numbers that no demonstration and no training game is about. Halving passes each of them on the way to others: there
is only one way to a number, and a model that was never shown it would not find it.
"""

# How often a demonstration does what. Together they put a pre-trained model's success near one half.
P_HALVING = 0.5
P_CHANGE = 0.08

# What make_model.py pre-trains with.
STEPS = 700
MAX_RESPONSE = 48

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Game:
    number: int
    name: str
    """Makes the rows of a dataset differ: ms-swift gives equal prompts one `prompt_id`, and so one group."""

    @property
    def prompt(self) -> str:
        return OBSERVATION

    @property
    def solution(self) -> str:
        return str(self.number)

    def to_row(self) -> dict[str, object]:
        """One line of ms-swift's GRPO dataset. GYMScheduler puts the environment's messages in the place of these."""
        env_config = {'name': 'number_game', 'number': self.number}
        return {'messages': [{'role': 'user', 'content': self.name}], 'env_config': env_config}


# --- rules ---


def read_guess(text: str) -> int | None:
    """The last integer of at most three digits in a model's text, which is searched in linear time."""
    runs = [run for run in re.findall('[0-9]+', text) if len(run) <= 3]
    return int(runs[-1]) if runs else None


def answer(number: int, guess: int | None) -> str | None:
    """What is said to a guess; None where it is right."""
    if guess is None:
        return UNREADABLE
    return None if guess == number else HIGHER if guess < number else LOWER


# --- demonstrations ---


def problems(split: str, seed: int) -> Iterator[Game]:
    """An endless seeded stream of games. Pre-training and training share their numbers: there are only 31."""
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; allowed: {", ".join(SPLITS)}')
    rng = random.Random(f'{split}-{seed}')
    numbers = [number for number in range(1, HIGHEST + 1) if (number in HELDOUT) == (split == 'heldout')]
    game = 0
    while True:
        game += 1
        yield Game(rng.choice(numbers), f'Game {game} ({split}).')


def distinct_problems(split: str, count: int, seed: int) -> list[Game]:
    return [game for game, _ in zip(problems(split, seed), range(count))]


def demonstrate(game: Game, rng: random.Random) -> Messages:
    """A whole game; only one that halves the range from the first guess on is sure to be won."""
    messages = [{'role': 'user', 'content': OBSERVATION}]
    low, high = 1, HIGHEST
    style = 'halving' if rng.random() < P_HALVING else rng.choice(('random', 'counting'))
    guess = 0
    for turn in range(MAX_GUESSES):
        if turn and rng.random() < P_CHANGE:
            style = rng.choice([other for other in ('halving', 'random', 'counting') if other != style])
        if style == 'halving':
            guess = (low + high) // 2
            text = f'It is from {low} to {high}. The middle is {guess}.'
        elif style == 'counting' and turn:
            # Whichever way it has to go, one step at a time.
            guess += 1 if messages[-1]['content'] == HIGHER else -1
            text = f'One step on. My guess: {guess}.'
        else:
            guess = rng.randint(1, HIGHEST)
            text = rng.choice((f'I feel lucky. My guess: {guess}.', f'Why not. My guess: {guess}.'))
        messages.append({'role': 'assistant', 'content': text})
        said = answer(game.number, guess)
        if said is None:
            break
        low, high = (max(low, guess + 1), high) if said == HIGHER else (low, min(high, guess - 1))
        if turn < MAX_GUESSES - 1:
            messages.append({'role': 'user', 'content': said})
    return messages


def reply(messages: Messages, game: Game) -> dict[str, str] | None:
    """What the environment says to the last message; None where the game is over."""
    said = answer(game.number, read_guess(messages[-1]['content']))
    guesses = sum(message['role'] == 'assistant' for message in messages)
    return None if said is None or guesses >= MAX_GUESSES else {'role': 'user', 'content': said}


def succeeded(messages: Messages, game: Game) -> bool:
    return answer(game.number, read_guess(messages[-1]['content'])) is None


def style_of(messages: Messages) -> str:
    """Which of STYLES a game was played in, by the fixed phrases of `demonstrate`."""
    texts = [message['content'] for message in messages if message['role'] == 'assistant']
    halving = ['The middle is' in text for text in texts]
    if all(halving):
        return 'halving'
    if any(halving):
        return 'changed its mind'
    return 'counting' if any('One step on' in text for text in texts) else 'random'


def main() -> None:
    write_datasets(distinct_problems)


if __name__ == '__main__':
    main()
