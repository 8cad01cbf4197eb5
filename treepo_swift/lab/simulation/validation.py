"""Bench runs of a real engine beside what the simulation says of the same batch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treepo_swift.config import TreeConfig
from treepo_swift.lab.lengths import LengthDistribution

from .setup import SCHEDULES, Setup


@dataclass(frozen=True)
class Measurement:
    """One mode of a bench run."""

    file: str
    hardware: str
    setup: Setup
    """What was run."""
    seconds: float
    """What it took, the median."""


def read_bench(path: str | Path, **options: Any) -> list[Measurement]:
    """The modes of a bench result that can be simulated; `options` are further fields of their `Setup`.

    Raises:
        ValueError: names `path` and what is missing or wrong in it.
    """
    try:
        values = json.loads(Path(path).read_text())
        return _measurements(str(path), values, options)
    except OSError as e:
        raise ValueError(f'{path}: {e.strerror}.') from None
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None


def _measurements(file: str, values: Any, options: dict[str, Any]) -> list[Measurement]:
    settings, modes = _get(values, 'settings', dict), _get(values, 'modes', dict)
    max_tokens = _get(settings, 'max_tokens', int)
    lengths = LengthDistribution.fixed(max_tokens)
    if _get(settings, 'workload', str) != 'fixed':
        lengths = LengthDistribution(_get(values, 'lengths', list))
    engine = settings.get('engine', {'ranks': 1})
    setup = Setup(
        TreeConfig.from_dict(_get(settings, 'config', dict), where='settings.config'),
        'independent',
        prompts=_get(settings, 'prompts', int),
        width=_get(settings, 'width', int),
        prompt_tokens=round(_get(settings, 'prompt_tokens', (int, float))),
        lengths=lengths,
        max_tokens=max_tokens,
        data_parallel=_get(engine, 'ranks', int),
        max_sequences=engine.get('max_num_seqs', 0),
        kv_tokens=engine.get('kv_tokens', 0),
        block_size=engine.get('block_size', 0),
        **options,
    )
    hardware = _get(values, 'hardware', str)
    return [
        Measurement(file, hardware, replace(setup, schedule=mode), _seconds(modes, mode))
        for mode in SCHEDULES
        if mode in modes
    ]


def _seconds(modes: dict[str, Any], mode: str) -> float:
    seconds = _get(_get(_get(modes, mode, dict), 'seconds', dict), 'median', (int, float))
    if seconds <= 0:
        raise ValueError(f'the median of mode {mode!r} is {seconds}: must be above 0.')
    return seconds


def _get(values: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(values, dict) or not isinstance(values.get(key), kind):
        raise ValueError(f'{key!r} is missing or of a wrong type: the file must be a result of `treepo-swift bench`.')
    return values[key]
