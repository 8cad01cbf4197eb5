"""Generated tasks: a small machine runs a program of look-ups, and the answer writes its states down, step by step.

One character is one token. A prompt ``AcBa|3>`` says: start in state 3, look up table c, then table a. An answer
``Ac3=5;Ba5=0;!0`` runs it. The tables are the same for all programs, so the model has them in its weights. What
demonstrations get wrong, and where, makes the task; the model learns to get it wrong as often.

In a task with a tool the model writes only the calls, ``Ac3=`` and ``Ba5=``; the tool says ``5;`` and ``0;``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

STATES = '01234567'
OPS = 'abcdefgh'
LABELS = 'ABCDEFGHIJKL'
MARKS = '=;!?~#*|>'
PAD, EOS = 0, 1
ALPHABET = STATES + OPS + LABELS + MARKS
VOCABULARY = 2 + len(ALPHABET)
SPLITS = ('pretrain', 'train', 'heldout')
CALL = '='
"""Where there is a tool, it speaks behind this."""
LOOKUP_OP = 'h'
"""The table that only a detour reads rightly where a task has detours."""

_IDS = {character: index for index, character in enumerate(ALPHABET, 2)}


def encode(text: str) -> list[int]:
    """Raises ``KeyError`` for a character that is none of the tasks'."""
    return [_IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """Text up to EOS; padding and ids that are none of the tasks' read as a space, which is in no right answer."""
    text = ''
    for token in ids:
        if token == EOS:
            break
        text += ALPHABET[token - 2] if 2 <= token < VOCABULARY else ' '
    return text


@dataclass(frozen=True)
class Problem:
    program: str
    """A table's name for each step."""
    start: int
    """The state before the first step."""
    solution: int
    """The state after the last."""

    @property
    def prompt(self) -> str:
        steps = ''.join(label + op for label, op in zip(LABELS, self.program))
        return f'{steps}|{self.start}>'


@dataclass(frozen=True)
class Task:
    """What demonstrations look like. All probabilities are of a demonstration, and so of the pre-trained model."""

    name: str
    steps: tuple[int, int] = (7, 11)
    """Fewest and most steps of a program."""
    faulty: float = 0.0
    """Share of the tables' entries at which demonstrations are often wrong, always in the same way."""
    p_fault: tuple[float, float] = (0.2, 0.6)
    """How often they are, drawn for each such entry."""
    p_guess: float = 0.0
    """Of opening with a guess instead of the first step."""
    p_reconsider: float = 0.3
    """Of taking the steps after such a guess."""
    p_give_up: float = 0.0
    """Of a guess instead of the next step, at each step."""
    hard: float = 0.0
    """Share of the programs with a step that only a detour does rightly; the others have none."""
    p_detour: float = 0.05
    """Of the detour at such a step."""
    p_filler: float = 0.15
    """Of marks without meaning after a step, so that steps and segments do not end together."""
    tool: bool = False
    """Whether a tool looks the tables up. Demonstrations then call the wrong table where they would be wrong."""
    seed: int = 0
    """Of the tables and of what is wrong with them."""

    max_answer = 112
    """Most tokens of an answer, EOS and the tool's included."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which a turn ends."""
        return (EOS, *encode(CALL)) if self.tool else (EOS,)

    def reply(self, text: str) -> str:
        """What the tool says to an answer that ends with a call; a call that it can't read gives no state."""
        known = {f'{op}{state}': str(after) for (op, state), after in self.table().items()}
        return known.get(text[-3:-1], '?') + ';'

    def is_sampled(self, text: str) -> list[bool]:
        """Which characters of a demonstration are the model's, not the tool's."""
        return [not (self.tool and CALL in text[max(index - 2, 0) : index]) for index in range(len(text))]

    def table(self) -> dict[tuple[str, int], int]:
        """(name, state) -> the next state: a permutation for each name, so that no step repairs a wrong one.

        Where there are detours, theirs is the identity: a few demonstrations are enough to learn what a detour gives.
        """
        return _table(self.seed) | {(LOOKUP_OP, int(state)): int(state) for state in STATES if self.hard}

    def faults(self) -> dict[tuple[str, int], tuple[int, float]]:
        """(name, state) -> the wrong next state, and how often demonstrations take it."""
        return _faults(self.seed, self.faulty, self.p_fault)

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """An endless seeded stream of one split's problems; no program is in two splits, whatever the seed."""
        if split not in SPLITS:
            raise ValueError(f'split is {split!r}; allowed: {", ".join(SPLITS)}')
        rng = random.Random(f'{split}-{seed}')
        table = self.table()
        others = OPS.replace(LOOKUP_OP, '') if self.hard else OPS
        while True:
            program = rng.choices(others, k=rng.randint(*self.steps))
            if rng.random() < self.hard:
                program[rng.randrange(len(program))] = LOOKUP_OP
            text, start = ''.join(program), rng.randrange(8)
            if split_of(text) != split:
                continue
            state = start
            for op in text:
                state = table[op, state]
            yield Problem(text, start, state)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """A written answer, as often wrong as the task says."""
        text = ''
        if rng.random() < self.p_guess:
            text = '?'
            if rng.random() >= self.p_reconsider:
                return text + _answer(_other(problem.solution, rng))
            text += '~'
        table, faults, state = self.table(), self.faults(), problem.start
        for label, op in zip(LABELS, problem.program):
            if rng.random() < self.p_give_up:
                return text + '?' + _answer(_other(problem.solution, rng))
            wrong, often = faults.get((op, state), (0, 0.0))
            called, after, detour = op, table[op, state], ''
            if rng.random() < often:
                after = wrong
                if self.tool:  # it says what the table says, so that only another table leads astray
                    called = OPS[(OPS.index(op) + 1 + wrong % 7) % len(OPS)]
                    after = table[called, state]
            if self.hard and op == LOOKUP_OP:
                if rng.random() < self.p_detour:
                    detour = '#'
                else:
                    after = _other(table[op, state], rng)
            text += f'{label}{called}{state}{detour}{CALL}{after};'
            if rng.random() < self.p_filler:
                text += '*' * rng.randint(1, 3)
            state = after
        return text + _answer(state)


@cache
def _table(seed: int) -> dict[tuple[str, int], int]:
    rng = random.Random(f'table-{seed}')
    return {(op, s): after for op in OPS for s, after in enumerate(rng.sample(range(8), 8))}


@cache
def _faults(seed: int, share: float, often: tuple[float, float]) -> dict[tuple[str, int], tuple[int, float]]:
    rng = random.Random(f'faults-{seed}')
    table = _table(seed)
    found = {}
    for entry in rng.sample(sorted(table), round(share * len(table))):
        wrong = rng.choice([state for state in range(8) if state != table[entry]])
        found[entry] = (wrong, rng.uniform(*often))
    return found


def split_of(program: str) -> str:
    bucket = zlib.crc32(program.encode()) % 8
    return 'heldout' if bucket == 0 else 'train' if bucket <= 2 else 'pretrain'


def reward(problem: Problem, text: str, *, ended: bool) -> float:
    """1.0 where the one ``!`` of an answer that `ended` with EOS is followed by the solution and nothing else."""
    _, mark, said = text.partition('!')
    return float(ended and bool(mark) and said == str(problem.solution))


def _answer(state: int) -> str:
    return f'!{state}'


def _other(state: int, rng: random.Random) -> int:
    return (state + rng.randint(1, 7)) % 8


TASKS = {
    # One decision, in the first tokens: the shape of the quickstart's task.
    'opening': Task('opening', p_guess=0.65, p_give_up=0.02),
    # A wrong choice at any of several steps dooms what follows.
    'decisions': Task('decisions', faulty=0.25),
    # Half of the programs are lost without what is rarely done.
    'rare': Task('rare', hard=0.5, p_detour=0.08),
    # A wrong call dooms what follows; each turn ends with a call.
    'calls': Task('calls', faulty=0.25, tool=True),
}
"""By the names that a matrix uses."""
