"""The curves as a picture, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .evaluation import Curve


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Rows: pass@k, majority vote. Columns: against tokens for the widest trees, against time for all widths."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    families: dict[str, list[Curve]] = {}
    for found in curves:
        families.setdefault(found.family, []).append(found)
    figure, rows = pyplot.subplots(2, 2, figsize=(11, 7.5), sharey='row')
    for name, members in families.items():
        widest = max(members, key=lambda found: found.width)
        style = {'label': name, 'marker': 'o', 'markersize': 3.5, 'linestyle': '--' if 'even' in name else '-'}
        colour = _colour(name, list(families))
        tokens = [point.tokens for point in widest.points]
        ends = [found.points[-1] for found in sorted(members, key=lambda found: found.width)]
        times = [point.seconds for point in ends]
        for (left, right), value in zip(rows, ('pass_at_k', 'majority'), strict=True):
            left.plot(tokens, [getattr(point, value) for point in widest.points], color=colour, **style)
            right.plot(times, [getattr(point, value) for point in ends], color=colour, **style)
    for (left, right), name in zip(rows, ('pass@k', 'majority vote of k'), strict=True):
        left.set(ylabel=name, xlabel='decoded tokens a prompt', xscale='log')
        right.set(xlabel='wall seconds a prompt, k = W', xscale='log')
        for axes in (left, right):
            axes.grid(alpha=0.3, which='both')
    width = max(found.width for found in curves)
    rows[0][0].set_title(f'subsets of k of W = {width} answers')
    rows[0][1].set_title('whole trees of every width')
    rows[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _colour(name: str, names: list[str]) -> str:
    """One colour for each divergence: pacing is the line's style."""
    kinds = list(dict.fromkeys(other.partition('-')[0] for other in names))
    return f'C{kinds.index(name.partition("-")[0])}'
