"""From a batch's reports and rewards to an advantage for every loss token, before swift's trainer spreads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from treepo_swift.config import TreeConfig
from treepo_swift.config.sections import OtherAdvantage
from treepo_swift.wire.report import TreeReport

from .normalisation import normalise
from .registry import estimate, estimate_segments, is_segment_level


@dataclass(frozen=True, slots=True)
class SegmentAdvantages:
    """Advantages of one trajectory: `values[k]` for its next `tokens[k]` loss tokens."""

    values: list[float]
    tokens: list[int]
    mean: float
    """Over the tokens; the advantage that swift knows of."""


def tree_advantages(
    reports: Sequence[TreeReport], rewards: Sequence[float], lengths: Sequence[int], config: TreeConfig
) -> list[SegmentAdvantages]:
    """Normalised advantages of a whole batch, one `SegmentAdvantages` per trajectory.

    An estimator of trajectory level makes one segment of each trajectory. Placeholders are in no baseline and get 0.
    So does a trajectory that is the only one left of its tree: there is nothing to compare it with.
    Arguments are in the same order, over all ranks: what ``rollout_infos['tree']`` says, the weighted reward, and the
    number of loss tokens (0 where ``--overlong_filter`` takes a trajectory out of the loss).
    """
    asked = Counter(report.id for report in reports)
    grown = Counter(report.id for report in reports if not report.is_placeholder)
    left_alone = {tree for tree, count in grown.items() if count == 1 and asked[tree] > 1}
    healthy = [i for i, report in enumerate(reports) if not report.is_placeholder and report.id not in left_alone]
    paths = [[reports[i].id, *reports[i].nodes] for i in healthy]
    settings = config.advantage
    options = settings.model_dump(exclude={'normalisation', 'options'})
    if isinstance(settings, OtherAdvantage):
        options['options'] = settings.options
    if is_segment_level(settings.estimator):
        raw = estimate_segments(paths, [rewards[i] for i in healthy], **options)
        tokens = [reports[i].tokens for i in healthy]
    else:
        raw = [[value] for value in estimate(paths, [rewards[i] for i in healthy], **options)]
        tokens = [[sum(reports[i].tokens)] for i in healthy]
    flat = iter(
        normalise(
            [value for values in raw for value in values],
            [n if lengths[i] else 0 for i, counts in zip(healthy, tokens, strict=True) for n in counts],
            [reports[i].id for i, values in zip(healthy, raw, strict=True) for _ in values],
            how='whiten' if settings.normalisation == 'whiten_scale' else settings.normalisation,
            shift_mean=settings.normalisation != 'whiten_scale',
        )
    )
    advantages = [
        SegmentAdvantages([0.0] * len(r.tokens), r.tokens, 0.0)
        if r.id in left_alone and not r.is_placeholder
        else SegmentAdvantages([], [], 0.0)
        for r in reports
    ]
    for i, counts in zip(healthy, tokens, strict=True):
        values = [next(flat) for _ in counts]
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / max(sum(counts), 1)
        advantages[i] = SegmentAdvantages(values, counts, mean)
    return advantages
