"""Curves of a report as a picture, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import marks_of
from .runs import Run, reported
from .settings import Matrix
from .statistics import accuracy_at, interval


def plot(matrix: Matrix, runs: Sequence[Run], path: Path) -> None:
    """Held-out accuracy against decoded tokens: means, with 95 % intervals as bars, and against trained tokens."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    marks = [0.0, *marks_of(matrix)]
    found = reported(matrix, runs)
    for number, (name, by_seed) in enumerate(found.items()):
        # Ten colours, then the same with other lines.
        line = '--' if number == 0 else ('-', '-.', ':')[number // 10 % 3]
        style = {'color': f'C{number}', 'label': name, 'linestyle': line, 'linewidth': 2.5 if number == 0 else 1.3}
        at = [interval([accuracy_at(run.curve, mark) for run in by_seed.values()]) for mark in marks]
        # Side by side, so that bars can be told apart.
        offset = (number - len(found) / 2) * marks[-1] / 250
        left.errorbar(
            [mark + offset for mark in marks],
            [100 * value.mean for value in at],
            [100 * (value.half or 0.0) for value in at],
            capsize=2,
            elinewidth=0.8,
            **style,
        )
        ends = [run.curve[-1] for run in by_seed.values()]
        share = sum(end.trained for end in ends) / sum(end.decoded for end in ends)
        right.plot([mark * share for mark in marks], [100 * value.mean for value in at], marker='o', ms=3, **style)
    # One broken run makes an interval that leaves no room for the others.
    low, high = left.get_ylim()
    left.set_ylim(max(low, 0), min(high, 102))
    left.set(xlabel='decoded tokens', ylabel='held-out accuracy, %', title=f'task: {matrix.task}')
    right.set(xlabel="trained tokens (about: decoded tokens times the method's share)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
