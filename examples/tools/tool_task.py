r"""Questions that are easy with a tool: digit sums for a calculator, and who has how many coins for a search.

    python tool_task.py --output data            # writes data/train.jsonl and data/heldout.jsonl

Who calls the right tool and reads its result is right; who answers at once or calls the wrong tool is mostly wrong. A
demonstration may change its mind on the way, so a fork is worth something at any turn.

This module needs the standard library only: a reward function may import it in any process.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / 'quickstart')]
from agent_tools import Corpus, Tool, make_tools, parse_call, run_call
from task import is_correct, write_datasets

SPLITS = ('pretrain', 'train', 'heldout')
STYLES = ('right tool', 'wrong tool', 'bad call', 'guess')

OWNERS = ('Ada', 'Ben', 'Cleo', 'Dan', 'Eve', 'Finn', 'Gus', 'Hana', 'Ida', 'Jon', 'Kit', 'Lea')
PLACES = ('box', 'bag', 'jar', 'drawer')

MAX_TURNS = 3
"""Two calls and an answer."""

# How often a demonstration does what. Together they put a pre-trained model's accuracy near one half.
P_CALL = 0.55
P_HESITATE = 0.25
P_WRONG_TOOL = 0.12
P_RECOVER = 0.4

# What make_model.py pre-trains with.
VOCAB_SIZE = 384
STEPS = 1000
MAX_RESPONSE = 96

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    prompt: str
    """What the user says."""
    solution: str
    tool: str
    """The one that helps."""
    argument: str
    """What to give it."""
    world: int = 0
    """Whose coins it is about."""

    def to_row(self) -> dict[str, object]:
        """One line of ms-swift's GRPO dataset; `solution` reaches the reward function as a column."""
        return {'messages': [{'role': 'user', 'content': self.prompt}], 'solution': self.solution}


# --- the world ---


@lru_cache
def corpus(world: int = 0) -> Corpus:
    """Who has how many coins where, one line each; the same in every process.

    Only pre-training is about other worlds than 0: what is where is then nothing that a model could know by heart.
    """
    rng = random.Random(f'coins-{world}')
    coins = [number for number in range(10, 100) if number % 11]
    return Corpus([f"{owner}'s {place} holds {rng.choice(coins)} coins." for owner in OWNERS for place in PLACES])


@lru_cache
def tools(world: int = 0) -> dict[str, Tool]:
    return make_tools(corpus(world))


TOOLS: list[dict[str, object]] = []
"""Schemas in the system message. This small model is shown none: they are ten times as long as a question, and it knows
its two tools from pre-training. A model of yours wants ``[tool.to_schema() for tool in tools().values()]`` in the
dataset's column ``tools``."""

# --- questions ---


def split_of(argument: str) -> str:
    """The split that a sum or a place belongs to, whatever the seed."""
    return ('heldout', 'train', 'pretrain', 'pretrain')[zlib.crc32(argument.encode()) % 4]


def problems(split: str, seed: int) -> Iterator[Question]:
    """An endless seeded stream of the questions of one split; `distinct_problems` drops what repeats."""
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; allowed: {", ".join(SPLITS)}')
    rng = random.Random(f'{split}-{seed}')
    while True:
        world = rng.randint(1, 64) if split == 'pretrain' else 0
        question = _sum(rng) if rng.random() < 0.5 else _coins(rng, world)
        if split_of(question.argument) == split:
            yield question


def distinct_problems(split: str, count: int, seed: int) -> list[Question]:
    """`count` questions of one split, no prompt twice: ms-swift gives equal prompts one `prompt_id`."""
    found: dict[str, Question] = {}
    for question in problems(split, seed):
        if len(found) == count:
            break
        found.setdefault(question.prompt, question)
    return list(found.values())


def _sum(rng: random.Random) -> Question:
    """No digit occurs twice, so that the one after a given digit is never in doubt."""
    digits = ''.join(map(str, rng.sample(range(1, 10), rng.randint(4, 6))))
    expression = '+'.join(digits)
    prompt = rng.choice(('Add up the digits of {}.', 'What is the digit sum of {}?', 'Sum the digits of {}.'))
    return Question(prompt.format(digits), tools()['calculator'].function(expression), 'calculator', expression)


def _coins(rng: random.Random, world: int) -> Question:
    place = f"{rng.choice(OWNERS)}'s {rng.choice(PLACES)}"
    prompt = rng.choice(
        ('How many coins are in {}?', 'How many coins does {} hold?', 'Count the coins in {}.', 'How full is {}?')
    )
    document = tools(world)['search'].function(place).splitlines()[0]
    return Question(prompt.format(place), document.split()[-2], 'search', place, world)


# --- demonstrations ---


def demonstrate(question: Question, rng: random.Random) -> Messages:
    """A conversation that ends with a boxed answer; only one that calls the right tool is sure to be right."""
    messages = [{'role': 'user', 'content': question.prompt}]
    if rng.random() >= P_CALL:
        opening = rng.choice(('I can do that in my head.', 'I know that.', 'There is no need to look.'))
        if rng.random() >= P_HESITATE:
            return _say(messages, f'{opening} {_box(_guess(question, rng))}')
        hesitation = f'{opening} But a tool is better.\n'
    else:
        hesitation = rng.choice(('', 'Let me use a tool.\n'))
    if rng.random() < P_WRONG_TOOL:
        other = 'search' if question.tool == 'calculator' else 'calculator'
        _call(messages, hesitation, other, question)
        if rng.random() >= P_RECOVER:
            return _say(messages, f'That does not help, so I guess. {_box(_guess(question, rng))}')
        hesitation = 'That was the wrong tool.\n'
    _call(messages, hesitation, question.tool, question)
    return _say(messages, f'It is {_box(question.solution)}.')


def _say(messages: Messages, text: str) -> Messages:
    messages.append({'role': 'assistant', 'content': text})
    return messages


def _call(messages: Messages, opening: str, tool: str, question: Question) -> None:
    """A turn that calls a tool, and what comes back."""
    (key,) = tools()[tool].parameters['required']
    call = json.dumps({'name': tool, 'arguments': {key: question.argument}})
    _say(messages, f'{opening}<tool_call>\n{call}\n</tool_call>')
    messages.append({'role': 'tool', 'content': _result(messages[-1]['content'], question)})


def _result(text: str, question: Question) -> str | None:
    call = parse_call(text)
    return None if call is None else run_call(call, tools(question.world))


def _box(number: object) -> str:
    return f'\\boxed{{{number}}}'


def _guess(question: Question, rng: random.Random) -> int:
    """About the right size but rarely right; drawn blindly, so that there is no rule for a model to learn."""
    return rng.randint(10, 99) if question.tool == 'search' else max(10, int(question.solution) + rng.randint(-20, 20))


def reply(messages: Messages, question: Question) -> dict[str, str] | None:
    """The result of the call in the last message; None where it has none and after the last turn."""
    turns = sum(message['role'] == 'assistant' for message in messages)
    result = _result(messages[-1]['content'], question)
    return None if result is None or turns >= MAX_TURNS else {'role': 'tool', 'content': result}


def succeeded(messages: Messages, question: Question) -> bool:
    return is_correct(messages[-1]['content'], question.solution)


def style_of(messages: Messages) -> str:
    """Which of STYLES a conversation is in, by its first call."""
    call = parse_call(messages[1]['content'])
    if call is None:
        return 'guess'
    if isinstance(call, str):
        return 'bad call'
    needed = 'search' if "'s " in messages[0]['content'] else 'calculator'
    return 'right tool' if call[0] == needed else 'wrong tool'


def main() -> None:
    write_datasets(distinct_problems, train=192, heldout=128)


if __name__ == '__main__':
    main()
