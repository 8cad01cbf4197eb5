"""A benchmark's result as a picture: a bar for each mode, where matplotlib is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def can_draw() -> bool:
    return find_spec('matplotlib') is not None


def draw(found: dict[str, Any], path: Path) -> None:
    """`found` is what a rollout bench or ``--train`` measured: its time on the left, and what it took on the right; of
    a whole step a bar with both of its parts."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    if 'steps' in found:
        _draw_steps(found, path)
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 * len(found['modes']) + 1.6), sharey=True)
    names = list(found['modes'])
    for side, (title, values) in zip(axes, _panels(found).items(), strict=True):
        bars = side.barh(names, values, color=[f'C{index}' for index in range(len(names))])
        side.bar_label(bars, fmt='{:,.4g}', padding=3)
        side.set(title=title, xlim=(0, 1.2 * max(values)))
    axes[0].invert_yaxis()
    figure.suptitle(found['hardware'])
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_steps(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.6))
    names, left = list(found['steps']), [0.0] * len(found['steps'])
    for part, label in (('rollout', 'rollout'), ('pass', 'policy pass')):
        values = [parts[part] for parts in found['steps'].values()]
        axes.bar_label(axes.barh(names, values, left=left, label=label), fmt='{:,.3g} s', label_type='center')
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel='seconds', title=f'{found["hardware"]}: a step {found["speed_up"]["step"]:.2f} times as fast')
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _panels(found: dict[str, Any]) -> dict[str, list[float]]:
    modes = found['modes'].values()
    if 'row_tokens' in found:  # of --train
        return {
            'seconds of a policy pass': [mode['policy'] for mode in modes],
            'peak MiB of it': [mode['peak_mib'] for mode in modes],
        }
    return {
        'seconds of a rollout': [mode['seconds']['median'] for mode in modes],
        'decoded tokens for each answer': [mode['decoded_tokens_per_trajectory'] for mode in modes],
    }
