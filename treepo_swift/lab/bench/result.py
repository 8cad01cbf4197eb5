"""Runs of a benchmark, and what a reader needs of them."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Run:
    """One rollout of the whole workload. Tokens are sampled tokens where nothing else is said."""

    seconds: float
    trajectory_tokens: int
    decoded_tokens: int
    requests: int
    """Engine requests."""
    prefilled_tokens: int
    """Input tokens that were not found in the prefix cache, by vLLM's counters."""
    prefix_hit_rate: float
    preemptions: int
    peak_rss_mib: float
    """Of this process, which runs the scheduler and vLLM's front end."""
    peak_kv_usage: float
    """Share of the KV cache."""
    tail_seconds: float
    """At the end, with less than half as many running sequences as at the peak."""
    lengths: tuple[int, ...]
    scheduler_cpu_seconds: float = 0.0
    """Of our own scheduler; only of trees, as the next three."""
    evicted_tokens: int = 0
    """Of prefixes that were computed before and had to be computed again."""
    depths: tuple[int, ...] = ()
    """Depth of every trajectory."""
    fallback_depths: tuple[int, ...] = ()
    """Of those that fallback started."""


def result(settings: dict[str, Any], runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Everything a reader needs, as JSON can carry it. Each figure is the median of its mode's runs."""
    modes = {mode: _summary(done) for mode, done in runs.items()}
    baseline = modes.get('independent')
    for summary in modes.values():
        if baseline:
            summary['speed_up'] = summary['trajectories_per_second'] / baseline['trajectories_per_second']
            # What the saved tokens allow: a tree that decodes half the tokens may be twice as fast.
            bound = baseline['decoded_tokens_per_trajectory'] / summary['decoded_tokens_per_trajectory']
            summary['speed_up_of_bound'] = summary['speed_up'] / bound
    lengths = runs.get('independent') or next(iter(runs.values()))
    return {
        'hardware': hardware(),
        'settings': settings,
        'lengths': list(lengths[0].lengths),
        'modes': modes,
    }


def _summary(runs: list[Run]) -> dict[str, Any]:
    count = len(runs[0].lengths)
    seconds = [run.seconds for run in runs]

    def mid(value: Callable[[Run], float]) -> float:
        return median(map(value, runs))

    return {
        'seconds': {'median': median(seconds), 'min': min(seconds), 'max': max(seconds), 'all': seconds},
        'trajectories_per_second': mid(lambda r: count / r.seconds),
        'decoded_tokens_per_second': mid(lambda r: r.decoded_tokens / r.seconds),
        'trajectory_tokens_per_second': mid(lambda r: r.trajectory_tokens / r.seconds),
        'trajectory_tokens_per_trajectory': mid(lambda r: r.trajectory_tokens / count),
        'decoded_tokens_per_trajectory': mid(lambda r: r.decoded_tokens / count),
        'prefilled_tokens_per_trajectory': mid(lambda r: r.prefilled_tokens / count),
        'requests_per_trajectory': mid(lambda r: r.requests / count),
        'prefix_hit_rate': mid(lambda r: r.prefix_hit_rate),
        'evicted_tokens_per_trajectory': mid(lambda r: r.evicted_tokens / count),
        'preemptions': mid(lambda r: r.preemptions),
        'scheduler_cpu_share': mid(lambda r: r.scheduler_cpu_seconds / r.seconds),
        'peak_rss_mib': max(r.peak_rss_mib for r in runs),
        'peak_kv_usage': max(r.peak_kv_usage for r in runs),
        'tail_share': mid(lambda r: r.tail_seconds / r.seconds),
        'depths': _counts(depth for run in runs for depth in run.depths),
        'fallback_depths': _counts(depth for run in runs for depth in run.fallback_depths),
    }


def _counts(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def hardware() -> str:
    """What this ran on, in a few words."""
    import torch

    if torch.accelerator.is_available():
        return f'{torch.accelerator.device_count()} x {torch.cuda.get_device_name()}'
    cores = len(os.sched_getaffinity(0))
    return f'{cores} x {platform.machine()} CPU cores'
