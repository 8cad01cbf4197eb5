"""Rewards of a batch before advantages, and segments' advantages over their tokens: the trainer's sums on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from treepo_swift.advantage.batch import SegmentAdvantages
from treepo_swift.wire.report import TreeReport


def set_missing_gym_rewards(infos: Sequence[dict[str, Any]]) -> None:
    """Say nan where an environment gave no reward, because swift reads ``total_reward`` of every sample.

    `find_reward_fault` then names a trajectory that should have had one; placeholders have played nothing.
    """
    for info in infos:
        info.setdefault('total_reward', math.nan)


def find_reward_fault(
    rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str], reports: Sequence[TreeReport]
) -> tuple[int, str] | None:
    """The first sample without a finite total reward, and what was returned for it.

    One function may answer None (nan in `rewards` [N, functions]) where it has nothing to say, but not all of them.
    """
    if not names:
        return None  # distillation: the teacher is the only signal
    for index, (row, report) in enumerate(zip((rewards * weights).tolist(), reports, strict=True)):
        if report.is_placeholder:
            continue
        if all(map(math.isnan, row)):
            return index, f'Reward function {" and ".join(map(repr, names))} returned None or nan'
        for name, value, weighted in zip(names, rewards[index].tolist(), row, strict=True):
            if math.isinf(weighted):
                return index, f'Reward function {name!r} returned {value}'
    return None


def settle_placeholders(rewards: torch.Tensor, reports: Sequence[TreeReport]) -> torch.Tensor:
    """Give placeholders the mean rewards of their tree, so that nothing that swift counts was invented for them.

    Its reward metrics, and its test for groups that are all alike (``--dynamic_sample``), see every row. Where a whole
    tree is placeholders their rewards become nan, which swift reads as 0.
    """
    healthy: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        if not report.is_placeholder:
            healthy.setdefault(report.id, []).append(index)
    settled = rewards.clone()
    for index, report in enumerate(reports):
        if report.is_placeholder:
            siblings = rewards[healthy.get(report.id, [])]
            # The mean of equal numbers may differ from them in the last bit, and groups would no longer be flat.
            alike = (siblings == siblings[:1]).all(dim=0)
            settled[index] = torch.where(alike, siblings[0], siblings.nanmean(dim=0)) if len(siblings) else math.nan
    return settled


def spread_over_tokens(advantages: Sequence[SegmentAdvantages], batch: Any) -> None:
    """Write segments' advantages over their loss tokens, wherever the layout of `batch` has put those.

    swift has written each trajectory's mean to all of its tokens, and perhaps added a teacher's term: what is left to
    add is each segment's difference from the mean.
    """
    for row, trajectory in enumerate(advantages):
        mask = batch.completion_mask[row].bool()
        counts = torch.tensor(trajectory.tokens, dtype=torch.long, device=mask.device)
        if int(mask.sum()) != int(counts.sum()):
            raise RuntimeError(f'Row {row} has {int(mask.sum())} loss tokens for segments of {trajectory.tokens}.')
        gaps = torch.tensor(trajectory.values, dtype=batch.advantages.dtype, device=mask.device) - trajectory.mean
        batch.advantages[row, mask] += gaps.repeat_interleave(counts)
