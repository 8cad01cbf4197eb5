"""From a batch's reports and rewards to an advantage for every token: the trainer's sums, without the trainer."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Sequence

import torch

from .advantage import estimate, estimate_segments, is_segment_level, normalise
from .config import TreeConfig
from .tree import StopReason


def is_placeholder(report: dict[str, Any]) -> bool:
    return StopReason(report['stop']).is_placeholder


def set_missing_gym_rewards(infos: Sequence[dict[str, Any]]) -> None:
    """Say nan where an environment gave no reward, because swift reads ``total_reward`` of every sample.

    `find_reward_fault` then names a trajectory that should have had one; placeholders have played nothing.
    """
    for info in infos:
        info.setdefault('total_reward', math.nan)


def find_reward_fault(rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str],
                      reports: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """The first sample without a finite total reward, and what was returned for it.

    One function may answer None (nan in `rewards` [N, functions]) where it has nothing to say, but not all of them.
    """
    if not names:
        return None  # distillation: the teacher is the only signal
    for index, (row, report) in enumerate(zip((rewards * weights).tolist(), reports, strict=True)):
        if is_placeholder(report):
            continue
        if all(map(math.isnan, row)):
            return index, f'Reward function {" and ".join(map(repr, names))} returned None or nan'
        for name, value, weighted in zip(names, rewards[index].tolist(), row, strict=True):
            if math.isinf(weighted):
                return index, f'Reward function {name!r} returned {value}'
    return None


def settle_placeholders(rewards: torch.Tensor, reports: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Give placeholders the mean rewards of their tree, so that nothing that swift counts was invented for them.

    Its reward metrics, and its test for groups that are all alike (``--dynamic_sample``), see every row. Where a whole
    tree is placeholders their rewards become nan, which swift reads as 0.
    """
    healthy: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        if not is_placeholder(report):
            healthy.setdefault(report['id'], []).append(index)
    settled = rewards.clone()
    for index, report in enumerate(reports):
        if is_placeholder(report):
            siblings = rewards[healthy.get(report['id'], [])]
            # The mean of equal numbers may differ from them in the last bit, and groups would no longer be flat.
            alike = (siblings == siblings[:1]).all(dim=0)
            settled[index] = torch.where(alike, siblings[0], siblings.nanmean(dim=0)) if len(siblings) else math.nan
    return settled


@dataclass(frozen=True, slots=True)
class Segments:
    """Advantages of one trajectory: `values[k]` for its next `tokens[k]` loss tokens."""

    values: list[float]
    tokens: list[int]
    mean: float
    """Over the tokens; the advantage that swift knows of."""


def tree_advantages(reports: Sequence[dict[str, Any]], rewards: Sequence[float], lengths: Sequence[int],
                    config: TreeConfig) -> list[Segments]:
    """Normalised advantages of a whole batch, one `Segments` per trajectory.

    An estimator of trajectory level makes one segment of each trajectory. Placeholders are in no baseline and get 0.
    Arguments are in the same order, over all ranks: what ``rollout_infos['tree']`` says, the weighted reward, and the
    number of loss tokens (0 where ``--overlong_filter`` takes a trajectory out of the loss).
    """
    healthy = [i for i, report in enumerate(reports) if not is_placeholder(report)]
    paths = [[reports[i]['id'], *reports[i]['nodes']] for i in healthy]
    options = dict(
        estimator=config.estimator,
        weighting=config.weighting,
        reject_flat_subgroups=config.reject_flat_subgroups,
        include_root=config.include_root,
        count_chains=config.count_chains)
    if is_segment_level(config.estimator):
        raw = estimate_segments(paths, [rewards[i] for i in healthy], **options)
        tokens = [reports[i]['tokens'] for i in healthy]
    else:
        raw = [[value] for value in estimate(paths, [rewards[i] for i in healthy], **options)]
        tokens = [[sum(reports[i]['tokens'])] for i in healthy]
    flat = iter(
        normalise([value for values in raw for value in values],
                  [n if lengths[i] else 0 for i, counts in zip(healthy, tokens, strict=True) for n in counts],
                  [reports[i]['id'] for i, values in zip(healthy, raw, strict=True) for _ in values],
                  how=config.normalisation,
                  shift_mean=config.whiten_shift_mean))
    advantages = [Segments([], [], 0.0)] * len(reports)
    for i, counts in zip(healthy, tokens, strict=True):
        values = [next(flat) for _ in counts]
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / max(sum(counts), 1)
        advantages[i] = Segments(values, counts, mean)
    return advantages


def spread_segments(segments: Sequence[Segments], batch: Any) -> None:
    """Write segments' advantages over their loss tokens, wherever the layout of `batch` has put those.

    swift has written each trajectory's mean to all of its tokens, and perhaps added a teacher's term: what is left to
    add is each segment's difference from the mean.
    """
    for row, trajectory in enumerate(segments):
        mask = batch.completion_mask[row].bool()
        counts = torch.tensor(trajectory.tokens, dtype=torch.long, device=mask.device)
        if int(mask.sum()) != int(counts.sum()):
            raise RuntimeError(f'Row {row} has {int(mask.sum())} loss tokens for segments of {trajectory.tokens}.')
        gaps = torch.tensor(trajectory.values, dtype=batch.advantages.dtype, device=mask.device) - trajectory.mean
        batch.advantages[row, mask] += gaps.repeat_interleave(counts)
