"""What an arena found, as Markdown: accuracy at marks, paired differences, what each method took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from treepo_swift.lab.bench.table import table

from .runs import Run, best_rate, reported
from .settings import Matrix
from .statistics import Interval, accuracy_at, interval, tokens_to

Reported = Mapping[str, Mapping[int, Run]]


def marks_of(matrix: Matrix) -> list[float]:
    """The decoded tokens at which runs are compared."""
    count = matrix.training.marks
    return [matrix.training.tokens * number / count for number in range(1, count + 1)]


def report(matrix: Matrix, runs: Sequence[Run]) -> str:
    """Raises ``ValueError`` where no run of the first method, which others are compared with, is there."""
    found = reported(matrix, runs)
    base = next(iter(matrix.methods))
    if base not in found:
        raise ValueError(f'no reported run of {base} is there yet, so there is nothing to compare with.')
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    start = fmean(run.curve[0].accuracy for by_seed in found.values() for run in by_seed.values())
    parts = [
        f'Task `{matrix.task}`: {start:.1%} right before training. Each run ends with the step that reaches '
        f'{matrix.training.tokens:,} decoded tokens; seeds {", ".join(map(str, seeds))}. Means and 95 % confidence '
        'intervals over seeds.',
        'Held-out accuracy, %, at marks of decoded tokens:',
        table(_accuracies(matrix, found), transpose=False),
    ]
    if len(found) > 1:
        parts += [
            f'Difference to {base} by seed, points; bold where the interval excludes 0:',
            table(_differences(matrix, found, base), transpose=False),
        ]
    parts += ['What it took:', table(_costs(matrix, runs, found, base), transpose=False)]
    return '\n\n'.join(parts) + '\n'


def beside(matrix: Matrix, runs: Sequence[Run], other: Matrix, other_runs: Sequence[Run]) -> str:
    """How far the runs of `matrix` are from those of `other`, by method and seed; both have these at the same rate.

    Raises:
        ValueError: the two share no such runs, or differ in what all of their runs have in common.
    """
    if (matrix.the_task, matrix.training, matrix.pretraining) != (other.the_task, other.training, other.pretraining):
        raise ValueError('task, training and pretraining must be the same in both folders.')
    found, others = reported(matrix, runs), reported(other, other_runs)
    rows = []
    for name in found:
        theirs = {(r.cell.lr, seed): r for seed, r in others.get(name, {}).items()}
        same = name in others and matrix.config_of(name) == other.config_of(name)
        pairs = [(r, theirs[r.cell.lr, seed]) for seed, r in found[name].items() if (r.cell.lr, seed) in theirs]
        if not (same and pairs):
            continue
        row = {'method': name, 'seeds': str(len(pairs))}
        for column, marks in _columns(matrix).items():
            at = [[fmean(accuracy_at(run.curve, mark) for mark in marks) for run in pair] for pair in pairs]
            mine, hers = (interval([values[side] for values in at]).percent() for side in (0, 1))
            row[column] = f'{mine} / {hers}: {_told(interval([one - two for one, two in at]))}'
        rows.append(row)
    if not rows:
        raise ValueError('the two folders share no method with the same settings, rate and seeds.')
    return (
        f'Held-out accuracy, %, with `loop: {matrix.loop}` / with `loop: {other.loop}`: their difference by seed, '
        f'points; bold where the interval excludes 0:\n\n{table(rows, transpose=False)}\n'
    )


def _columns(matrix: Matrix) -> dict[str, list[float]]:
    """Headings of a table of differences, and the marks whose mean stands below each."""
    marks = marks_of(matrix)
    return {f'{mark:,.0f}': [mark] for mark in marks} | {'mean of marks': marks}


def _told(gap: Interval) -> str:
    text = gap.percent(sign=True)
    return f'**{text}**' if gap.excludes_zero else text


def _accuracies(matrix: Matrix, found: Reported) -> list[dict[str, str]]:
    return [
        {'method': name}
        | {
            f'{mark:,.0f}': interval([accuracy_at(run.curve, mark) for run in by_seed.values()]).percent()
            for mark in marks_of(matrix)
        }
        for name, by_seed in found.items()
    ]


def _differences(matrix: Matrix, found: Reported, base: str) -> list[dict[str, str]]:
    rows = []
    for name, by_seed in found.items():
        shared = [seed for seed in by_seed if seed in found[base]]
        if name == base or not shared:
            continue
        row = {'method': name}
        for column, marks in _columns(matrix).items():
            gaps = [
                fmean(accuracy_at(by_seed[s].curve, m) - accuracy_at(found[base][s].curve, m) for m in marks)
                for s in shared
            ]
            row[column] = _told(interval(gaps))
        rows.append(row)
    return rows


def _costs(matrix: Matrix, runs: Sequence[Run], found: Reported, base: str) -> list[dict[str, str]]:
    marks = marks_of(matrix)
    target = fmean(accuracy_at(run.curve, marks[-1]) for run in found[base].values())
    rows = []
    for name, by_seed in found.items():
        ends = [run.curve[-1] for run in by_seed.values()]
        reached = tokens_to([run.curve for run in by_seed.values()], target, marks)
        flat = [point.flat for run in by_seed.values() for point in run.curve if point.flat is not None]
        rows.append(
            {
                'method': name,
                'lr': f'{best_rate(matrix, name, runs):g}',
                'seeds': str(len(by_seed)),
                f"tokens to {base}'s last accuracy": 'not reached' if reached is None else f'{reached:,.0f}',
                'trained tokens': f'{fmean(end.trained for end in ends):,.0f}',
                'steps': f'{fmean(end.steps for end in ends):.0f}',
                'seconds': f'{fmean(end.seconds for end in ends):.0f}',
                'prompts with equal rewards': f'{fmean(flat):.0%}',
            }
        )
    return rows
