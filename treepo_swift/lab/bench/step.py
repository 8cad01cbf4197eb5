"""A whole step with and without trees: rollouts on a real engine, then a policy pass over the rows that they grew."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .train import TrainedRow

PARTS = ('rollout', 'pass')
"""Of a step, in seconds. The optimizer, rewards and weight sync are the same with and without trees, and not in it."""


def run_rollouts(options: Sequence[str], engine: Sequence[str]) -> tuple[dict[str, Any], list[TrainedRow]]:
    """What ``treepo-swift bench OPTIONS -- ENGINE`` measures, and the rows of its last trees.

    It runs in a process of its own, whose end frees the accelerator's memory for the pass.

    Raises:
        ValueError: it failed; its own message stands above.
    """
    from .train import read_rows

    with tempfile.TemporaryDirectory(prefix='treepo-bench-') as folder:
        found, rows = Path(folder) / 'rollouts.json', Path(folder) / 'rows.json'
        done = subprocess.run(
            [
                *(sys.executable, '-m', 'treepo_swift.cli.main', 'bench', '--modes', 'independent,stream'),
                *('--json', str(found), '--keep-rows', str(rows), *options, '--', *engine),
            ],
            # The table of this part alone would stand above that of the whole.
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise ValueError(f'the rollouts ended with status {done.returncode}; the reason stands above.')
        return json.loads(found.read_text()), read_rows(rows)


def whole_step(rollout: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both parts by what was measured, and how many times as fast trees are."""
    without = (rollout['modes']['independent']['seconds']['median'], training['modes']['padded']['policy'])
    trees = (rollout['modes']['stream']['seconds']['median'], training['modes']['shared']['policy'])
    return {
        'hardware': training['hardware'],
        'steps': {
            'without trees': dict(zip(PARTS, without, strict=True)),
            'with trees': dict(zip(PARTS, trees, strict=True)),
        },
        'speed_up': {
            **{name: before / after for name, before, after in zip(PARTS, without, trees, strict=True)},
            'step': sum(without) / sum(trees),
        },
        'rollouts': rollout,
        'training': training,
    }


def step_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Three lines for the terminal."""
    rows = [
        {
            'a step': name,
            'rollout s': f'{parts["rollout"]:.3f}',
            'policy pass s': f'{parts["pass"]:.3f}',
            'both s': f'{sum(parts.values()):.3f}',
        }
        for name, parts in found['steps'].items()
    ]
    faster = found['speed_up']
    return [
        *rows,
        {
            'a step': 'times as fast',
            'rollout s': f'{faster["rollout"]:.2f}',
            'policy pass s': f'{faster["pass"]:.2f}',
            'both s': f'{faster["step"]:.2f}',
        },
    ]


def model_in(engine: Sequence[str]) -> str:
    """What stands behind --model in the engine's options.

    Raises:
        ValueError: they name no model.
    """
    for at, option in enumerate(engine):
        name, mark, value = option.partition('=')
        if name == '--model' and (mark or at + 1 < len(engine)):
            return value if mark else engine[at + 1]
    raise ValueError('--train with options behind -- measures a whole step of a model: name it there by --model.')
