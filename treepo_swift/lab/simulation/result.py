"""`Result`: what a simulated batch took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .server import SimulatedServer


@dataclass(frozen=True)
class Result:
    """Tokens are sampled tokens, prompts not counted, where nothing else is said."""

    seconds: float
    """Until the last tree of the last server was done."""
    trajectories: int
    """Placeholders not counted."""
    trajectories_per_second: float
    decoded_tokens: int
    decoded_tokens_per_second: float
    trajectory_tokens: int
    """Sum of the trajectories' lengths."""
    requests: int
    segments: int
    """That came back to the event loops."""
    prefill_tokens: int
    """Tokens of prompts and prefixes that were computed because no cache had them."""
    preemptions: int
    peak_kv_tokens: int
    """Most tokens that the running requests of one engine had in its KV cache, shared ones counted once."""
    mean_running: float
    """Sequences of an engine's batch, mean over time and engines."""
    latency_p50: float
    """Of trees in seconds from the start of the batch, the wait for a place included."""
    latency_p95: float
    latency_p99: float
    latency_max: float
    tail_seconds: float
    """At the end, while less than half of the highest number of sequences run."""
    event_loop_utilisation: float
    """Of the busiest server: CPU time over the engines' time. Above 1 it is the event loop that sets the pace."""

    @classmethod
    def of(cls, servers: Sequence[SimulatedServer], *, engines: int) -> Result:
        """Of servers that ran; `engines` is the number of all engines, idle ones included."""
        used = [engine for server in servers for engine in server.engines]
        seconds = max(server.seconds * server.stretch for server in servers)
        latencies = sorted(time * server.stretch for server in servers for time in server.latencies)
        mean_running, tail_seconds = _running(servers)
        trajectories = sum(server.trajectories for server in servers)
        decoded = sum(server.decoded_tokens for server in servers)
        return cls(
            seconds=seconds,
            trajectories=trajectories,
            trajectories_per_second=trajectories / seconds,
            decoded_tokens=decoded,
            decoded_tokens_per_second=decoded / seconds,
            trajectory_tokens=sum(server.trajectory_tokens for server in servers),
            requests=sum(server.requests for server in servers),
            segments=sum(server.segments for server in servers),
            prefill_tokens=sum(engine.prefill_tokens for engine in used),
            preemptions=sum(engine.preemptions for engine in used),
            peak_kv_tokens=max(engine.peak_kv_tokens for engine in used),
            mean_running=mean_running / engines,
            latency_p50=_percentile(latencies, 50),
            latency_p95=_percentile(latencies, 95),
            latency_p99=_percentile(latencies, 99),
            latency_max=latencies[-1],
            tail_seconds=tail_seconds,
            event_loop_utilisation=max(server.event_loop_utilisation for server in servers),
        )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of `ordered` values that so many percent of them do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def _running(servers: Sequence[SimulatedServer]) -> tuple[float, float]:
    """Sequences that run on all engines together, mean over time, and the seconds of the tail."""
    changes: Counter[float] = Counter()
    for server in servers:
        for engine in server.engines:
            before = 0
            for time, count in engine.batches:
                changes[time * server.stretch] += count - before
                before = count
    times = sorted(changes)
    counts = list(accumulate(changes[time] for time in times))
    area = sum(count * (end - start) for count, start, end in zip(counts, times, times[1:]))
    half = max(counts) / 2
    tail = 1 + max(i for i, count in enumerate(counts) if count >= half)
    return area / times[-1], times[-1] - times[tail]
