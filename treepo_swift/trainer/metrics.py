"""The ``tree/*`` metrics of a batch, from the reports that came with its trajectories."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from treepo_swift.core.tree import StopReason, TreeStats
from treepo_swift.wire.report import TreeReport


@dataclass(frozen=True, slots=True)
class RolloutRound:
    """One rollout over all ranks: the report and the reward of every trajectory."""

    reports: list[TreeReport]
    rewards: list[float]


@dataclass(slots=True)
class EvaluationFailures:
    """Answers of one evaluation that failed on the server; swift scores them as if the model had said nothing."""

    answers: int = 0
    """All answers, the healthy ones included."""
    errors: list[str] = field(default_factory=list)

    def add(self, errors: Sequence[str | None]) -> None:
        """One entry for each answer of a batch: what failed, None where nothing did."""
        self.answers += len(errors)
        self.errors += [error for error in errors if error is not None]

    def describe(self) -> str:
        """How many, and the most common cause. Errors name their tree and path: those are no difference."""
        kinds = Counter(re.sub(r'\S*\d\S*', '', error) for error in self.errors)
        kind, count = kinds.most_common(1)[0]
        example = next(error for error in self.errors if re.sub(r'\S*\d\S*', '', error) == kind)
        return (
            f'{len(self.errors)} of {self.answers} answers of this evaluation failed on the rollout server. They were '
            f'scored as empty answers, so the rewards are too low. Most common cause ({count} times): {example}'
        )


def tree_metrics(rounds: Sequence[RolloutRound]) -> dict[str, float]:
    """Metrics of one batch over all ranks.

    ``--dynamic_sample`` may take several rounds for a batch: the trees that it threw away were grown too and count.
    """
    reports = [report for round_ in rounds for report in round_.reports]
    rewards = [reward for round_ in rounds for reward in round_.rewards]
    stats = [report.stats for report in reports if report.stats is not None]
    total = TreeStats(*(sum(getattr(s, f.name) for s in stats) for f in fields(TreeStats)))
    stops = Counter(report.stop for report in reports)
    metrics = {
        'tree/rounds': len(rounds),
        'tree/trees': len(stats),
        'tree/decoded_tokens': total.decoded_tokens,
        'tree/independent_tokens': total.trajectory_tokens,
        'tree/saved_tokens': total.trajectory_tokens - total.decoded_tokens,
        'tree/saved_fraction': 1 - total.decoded_tokens / max(total.trajectory_tokens, 1),
        'tree/engine_requests': total.engine_requests,
        'tree/prefix_hit_rate': total.cached_tokens / max(total.input_tokens, 1),
        'tree/evicted_tokens': total.evicted_tokens,
        'tree/forks': total.forks,
        'tree/fallbacks': total.fallbacks,
        'tree/failures': total.failures,
        'tree/turns': total.turns,
        'tree/environment_tokens': total.environment_tokens,
        'tree/replayed_turns': total.replayed_turns,
        'tree/depth': sum(report.depth for report in reports) / len(reports),
        **{f'tree/stop/{reason.value}': stops[reason] / len(reports) for reason in StopReason},
        **_flatness(reports, rewards),
        **_contrast(reports, rewards),
        **_server_metrics(rounds),
    }
    return {key: float(value) for key, value in metrics.items()}


def _server_metrics(rounds: Sequence[RolloutRound]) -> dict[str, float]:
    """What the servers measured. Several of them work on a round at the same time, rounds follow each other."""
    metrics: dict[str, float] = {}
    batches = [[r.batch for r in round_.reports if r.batch is not None] for round_ in rounds]
    if all(batches):
        metrics['tree/rollout_seconds'] = sum(max(b.seconds for b in servers) for servers in batches)
        metrics['tree/scheduler_cpu_share'] = max(
            b.scheduler_cpu_seconds / b.seconds for servers in batches for b in servers
        )
        metrics['tree/hung_hooks'] = sum(b.hung_hooks for servers in batches for b in servers)
        counted = [b.engine for servers in batches for b in servers if b.engine is not None]
        if counted:
            # Of the whole engine, as vLLM counts; the rates above are of the trees' own requests.
            queries = sum(c.prefix_queries for c in counted)
            metrics['tree/engine_prefix_hit_rate'] = sum(c.prefix_hits for c in counted) / max(queries, 1)
            metrics['tree/engine_preemptions'] = sum(c.preemptions for c in counted)
    return metrics


def _flatness(reports: Sequence[TreeReport], rewards: Sequence[float]) -> dict[str, float]:
    """Share of trees, and of subgroups of two or more below the root, whose rewards are all alike: no signal there."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for report, reward in zip(reports, rewards, strict=True):
        if report.is_placeholder:
            continue
        groups.setdefault((report.id,), []).append(reward)
        for node in report.nodes:
            groups.setdefault((report.id, node), []).append(reward)

    def share(keys: list[tuple[Any, ...]]) -> float:
        return sum(min(groups[k]) == max(groups[k]) for k in keys) / max(len(keys), 1)

    return {
        'tree/flat_trees': share([k for k in groups if len(k) == 1]),
        'tree/flat_subgroups': share([k for k in groups if len(k) == 2 and len(groups[k]) > 1]),
    }


def _contrast(reports: Sequence[TreeReport], rewards: Sequence[float]) -> dict[str, float]:
    """Share of the rewards' variance that lies between the first branches of a tree, on average over trees that have
    any. Nothing where all trees are flat."""
    trees: dict[str, dict[int, list[float]]] = {}
    for report, reward in zip(reports, rewards, strict=True):
        if not report.is_placeholder and report.nodes:
            trees.setdefault(report.id, {}).setdefault(report.nodes[0], []).append(reward)
    shares = [share for branches in trees.values() if (share := _between(list(branches.values()))) is not None]
    return {'tree/contrast': sum(shares) / len(shares)} if shares else {}


def _between(groups: Sequence[Sequence[float]]) -> float | None:
    """Variance of the groups' means, weighted by size, over the variance of all; None where all are alike."""
    values = [value for group in groups for value in group]
    if min(values) == max(values):
        return None
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    return sum(len(group) * (sum(group) / len(group) - mean) ** 2 for group in groups) / total
