"""The ``tree/*`` metrics of a batch, from the reports that came with its trajectories."""
from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any, Sequence

from .tree import StopReason


def tree_metrics(reports: Sequence[dict[str, Any]],
                 rewards: Sequence[float],
                 *,
                 rounds: Sequence[int] | None = None) -> dict[str, float]:
    """Metrics of one batch over all ranks.

    Args:
        reports: ``rollout_infos['tree']`` of every trajectory.
        rewards: their rewards, same order.
        rounds: trajectories of each rollout, in order. ``--dynamic_sample`` may take several for a batch; the trees
            that it threw away were grown too and count. None: one round.
    """
    stats = [report['stats'] for report in reports if 'stats' in report]
    total = {key: sum(s[key] for s in stats) for key in stats[0]} if stats else {}
    independent = max(total.get('trajectory_tokens', 0), 1)
    stops = Counter(report['stop'] for report in reports)
    metrics = {
        'tree/rounds': len(rounds or [0]),
        'tree/trees': len(stats),
        'tree/decoded_tokens': total.get('decoded_tokens', 0),
        'tree/independent_tokens': total.get('trajectory_tokens', 0),
        'tree/saved_tokens': total.get('trajectory_tokens', 0) - total.get('decoded_tokens', 0),
        'tree/saved_fraction': 1 - total.get('decoded_tokens', 0) / independent,
        'tree/engine_requests': total.get('engine_requests', 0),
        'tree/prefix_hit_rate': total.get('cached_tokens', 0) / max(total.get('input_tokens', 0), 1),
        'tree/evicted_tokens': total.get('evicted_tokens', 0),
        'tree/forks': total.get('forks', 0),
        'tree/fallbacks': total.get('fallbacks', 0),
        'tree/failures': total.get('failures', 0),
        'tree/turns': total.get('turns', 0),
        'tree/environment_tokens': total.get('environment_tokens', 0),
        'tree/replayed_turns': total.get('replayed_turns', 0),
        'tree/depth': sum(report['depth'] for report in reports) / len(reports),
        **{
            f'tree/stop/{reason.value}': stops[reason.value] / len(reports)
            for reason in StopReason
        },
        **_flatness(reports, rewards),
    }
    # Several servers work on a round at the same time, rounds follow each other.
    ends = list(accumulate(rounds or [len(reports)]))
    batches = [[r['batch'] for r in reports[start:end] if 'batch' in r] for start, end in zip([0, *ends], ends)]
    if all(batches):
        metrics['tree/rollout_seconds'] = sum(max(b['seconds'] for b in servers) for servers in batches)
        metrics['tree/scheduler_cpu_share'] = max(b['scheduler_cpu_seconds'] / b['seconds'] for servers in batches
                                                  for b in servers)
        counted = [b['engine'] for servers in batches for b in servers if 'engine' in b]
        if counted:
            # Of the whole engine, as vLLM counts; the rates above are of the trees' own requests.
            queries = sum(c['prefix_queries'] for c in counted)
            metrics['tree/engine_prefix_hit_rate'] = sum(c['prefix_hits'] for c in counted) / max(queries, 1)
            metrics['tree/engine_preemptions'] = sum(c['preemptions'] for c in counted)
    return {key: float(value) for key, value in metrics.items()}


def _flatness(reports: Sequence[dict[str, Any]], rewards: Sequence[float]) -> dict[str, float]:
    """Share of trees, and of subgroups of two or more below the root, whose rewards are all alike: no signal there."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for report, reward in zip(reports, rewards, strict=True):
        if StopReason(report['stop']).is_placeholder:
            continue
        groups.setdefault((report['id'], ), []).append(reward)
        for node in report['nodes']:
            groups.setdefault((report['id'], node), []).append(reward)

    def share(keys: list[tuple[Any, ...]]) -> float:
        return sum(min(groups[k]) == max(groups[k]) for k in keys) / max(len(keys), 1)

    return {
        'tree/flat_trees': share([k for k in groups if len(k) == 1]),
        'tree/flat_subgroups': share([k for k in groups if len(k) == 2 and len(groups[k]) > 1]),
    }
