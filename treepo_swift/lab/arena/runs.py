"""The runs of a matrix and the file that holds them: one run a line, and what is there is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .settings import Matrix

RESULTS = 'results.jsonl'
RUN_VARIABLE = 'ARENA_RUN'
"""Tells the training of a real run what it is: a JSON object of task, seed, training (as in the matrix), and curve, the
file that gets the run's points."""


class Marks:
    """At which steps held-out accuracy is measured: the first at or behind each mark."""

    def __init__(self, tokens: int, marks: int) -> None:
        self._tokens, self._marks = tokens, marks
        self._passed = 0

    def passed(self, decoded: float) -> bool:
        """Whether `decoded` tokens have reached a mark that no call before had reached."""
        before, self._passed = self._passed, int(decoded * self._marks // self._tokens)
        return self._passed > before


@dataclass(frozen=True)
class Point:
    """Where a run stood after a step."""

    decoded: int
    """Tokens that were sampled so far."""
    trained: int
    """Loss tokens so far: those that answers share count once for each of them."""
    steps: int
    seconds: float
    """Wall time so far, without what held-out accuracy took."""
    accuracy: float
    """Of one sampled answer to each held-out problem."""
    reward: float | None = None
    """Mean of the last step's answers; forks are among them, so it is no estimate of accuracy. None before a step."""
    flat: float | None = None
    """Share of the last step's prompts whose answers all had the same reward. None before a step."""


@dataclass(frozen=True)
class Cell:
    """A run that a matrix asks for."""

    method: str
    lr: float
    seed: int
    tuning: bool
    """Whether it chooses a rate; such a run is in no table."""


@dataclass(frozen=True)
class Run:
    """A run that was made."""

    key: str
    """`Matrix.key` of its method."""
    task: str
    cell: Cell
    curve: tuple[Point, ...]

    @property
    def mean_accuracy(self) -> float:
        """Over the marks, the start left out: less noisy than the last one, and early gains count."""
        return fmean(point.accuracy for point in self.curve[1:])

    def to_json(self) -> str:
        values = {'key': self.key, 'task': self.task, **asdict(self.cell), 'curve': [asdict(p) for p in self.curve]}
        return json.dumps(values, separators=(',', ':'))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        cell = Cell(*(values[name] for name in ('method', 'lr', 'seed', 'tuning')))
        return cls(values['key'], values['task'], cell, tuple(Point(**point) for point in values['curve']))


class ResultsFile:
    """Opened, it knows its runs, and half a line at its end, which a killed process left, is cut off.

    Raises:
        ValueError: a line is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[Run] = []
        content = path.read_bytes() if path.exists() else b''
        whole, newline, half = content.rpartition(b'\n')
        for number, line in enumerate(whole.split(b'\n') if newline else [], 1):
            try:
                self.runs.append(Run.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f'{path}, line {number} is no run of an arena ({type(e).__name__}: {e}). Choose another --out.'
                ) from None
        if half:
            if not newline and not content.startswith(b'{"key":'[: len(content)]):
                raise ValueError(f'{path} holds no runs of an arena. Choose another --out.')
            with path.open('r+b') as file:
                file.truncate(len(content) - len(half))

    def append(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('ab') as file:
            file.write(f'{run.to_json()}\n'.encode())
        self.runs.append(run)

    def of(self, matrix: Matrix) -> list[Run]:
        """The runs that `matrix` asks for or has asked for: of its methods as they are now."""
        keys = {name: matrix.key(name) for name in matrix.methods}
        return [run for run in self.runs if keys.get(run.cell.method) == run.key]


def best_rate(matrix: Matrix, method: str, runs: Sequence[Run]) -> float | None:
    """The rate of the highest mean accuracy over the tuning seeds, the lower of equals; None while runs are missing."""
    if not matrix.tuning_seeds:
        return matrix.rates_of(method)[0]
    scores = {}
    for lr in sorted(matrix.rates_of(method)):
        there = {run.cell.seed: run.mean_accuracy for run in runs if run.cell == Cell(method, lr, run.cell.seed, True)}
        if not set(matrix.tuning_seeds) <= set(there):
            return None
        scores[lr] = fmean(there[seed] for seed in matrix.tuning_seeds)
    return max(scores, key=scores.__getitem__)


def missing_cells(matrix: Matrix, runs: Sequence[Run]) -> Iterator[Cell]:
    """What is to be run next, seed by seed, so that a matrix that is cut short has whole seeds.

    Reads `runs` anew after each cell: once a method's tuning is there, its reported runs follow.
    """
    for seed in matrix.tuning_seeds:
        for method in matrix.methods:
            for lr in matrix.rates_of(method):
                cell = Cell(method, lr, seed, True)
                if all(run.cell != cell for run in runs):
                    yield cell
    for seed in matrix.seeds:
        for method in matrix.methods:
            rate = best_rate(matrix, method, runs)
            assert rate is not None, f'{method} is not tuned, though all of its runs are there'
            cell = Cell(method, rate, seed, False)
            if all(run.cell != cell for run in runs):
                yield cell


def reported(matrix: Matrix, runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by method and seed, each method at its best rate; methods without a run are left out."""
    found: dict[str, dict[int, Run]] = {}
    for method in matrix.methods:
        rate = best_rate(matrix, method, runs)
        wanted = {Cell(method, rate, seed, False): seed for seed in matrix.seeds} if rate is not None else {}
        there = {wanted[run.cell]: run for run in runs if run.cell in wanted}
        if there:
            found[method] = dict(sorted(there.items()))
    return found


def run_matrix(
    matrix: Matrix,
    file: ResultsFile,
    train: Callable[[Cell], Sequence[Point]],
    *,
    say: Callable[[str], Any] = print,
) -> None:
    """Make the runs that `file` does not have; `train` makes one."""
    # The generator asks for runs as it goes; it must see those that were added.
    there = file.of(matrix)
    for cell in missing_cells(matrix, there):
        curve = tuple(train(cell))
        run = Run(matrix.key(cell.method), matrix.task, cell, curve)
        file.append(run)
        there.append(run)
        kind = 'tuning' if cell.tuning else 'reported'
        say(
            f'{cell.method}, lr {cell.lr:g}, seed {cell.seed} ({kind}): {curve[0].accuracy:.1%} -> '
            f'{curve[-1].accuracy:.1%} after {curve[-1].decoded:,} tokens, {curve[-1].seconds:.0f} s'
        )
