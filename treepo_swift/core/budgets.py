"""How many paths a tree may have: the width rule, pacing, and token budgets."""

from __future__ import annotations

from collections.abc import Sequence

from treepo_swift.config import TreeConfig

from .tree import Path


def next_width(*, live: int, finished: int, ended: int, width: int, divergence: int) -> int:
    """Paths that grow after a boundary: ``max(a, min(W - f, d*a + d*e))``.

    `live` (a) paths go on, `finished` (f) trajectories are in, `ended` (e) of the paths stopped since the last
    boundary: the ``d*e`` term hands their unused budget to the live ones (budget transfer, arXiv 2508.17445).
    """
    return max(live, min(width - finished, divergence * live + divergence * ended))


def paced_width(config: TreeConfig, *, width: int, depth: int, first: int, last: int | None = None) -> int:
    """Most paths, finished ones included, that may exist while segments of `depth` (1 to `last`: D) grow.

    `first` is the number of branches that the root gave. Where only turns fork, `depth` counts turns.
    """
    last = last or config.max_depth
    if config.pacing == 'eager':
        return width
    if config.pacing == 'even':
        if depth >= last:
            return width
        return first + round((width - first) * (depth - 1) / (last - 1))
    assert isinstance(config.pacing, dict)
    reached = [paths for start, paths in config.pacing.items() if start <= depth]
    return min(width, reached[-1]) if reached else width


def expected_saving(config: TreeConfig, width: int) -> float:
    """Share of the decoded tokens that trees of full-length paths save against independent sampling.

    An estimate for the log before training starts: no path stops early and none fails. Trajectories that pacing
    leaves out are grown from the root by fallback.
    """
    low, high = config.root_divergence if isinstance(config.root_divergence, tuple) else (config.root_divergence,) * 2
    savings = [_saving_from(config, width, min(first, width)) for first in range(low, high + 1)]
    return sum(savings) / len(savings)


def _saving_from(config: TreeConfig, width: int, first: int) -> float:
    divergence = config.divergence
    d = sum(divergence) / 2 if isinstance(divergence, tuple) else divergence
    paths: float = min(first, paced_width(config, width=width, depth=1, first=first))
    segments = paths
    # A fork inside a segment is shorter by what it does not share of it: half of it, if all positions are as likely.
    missing, lost = 0.0, 0.0 if config.fork_position.policy == 'boundary' else 0.5
    for depth in range(2, config.max_depth + 1):
        more = max(paths, min(paced_width(config, width=width, depth=depth, first=first), d * paths)) - paths
        missing += more * (missing / paths + lost)
        paths += more
        segments += paths
    segments += (width - paths) * config.max_depth if config.fallback.policy != 'none' else 0
    return 1 - segments / (width * config.max_depth - missing)


class TokenBudget:
    """What the config's token budget leaves for the paths of one tree; with `by_width` it never runs out."""

    def __init__(self, config: TreeConfig, width: int) -> None:
        self._width = width
        self._segment = config.segment_length
        self.is_per_depth = config.budget.policy == 'by_segment_tokens'
        """Whether trees share the tokens of each depth, and so wait for each other there."""
        self.is_per_tree = config.budget.policy == 'by_trajectory_tokens'
        """Whether it counts the lengths of the tree's trajectories, and so shrinks with every token of every path."""
        self._left: int = config.budget.tokens if self.is_per_tree else 0

    def spend(self, tokens: int) -> None:
        """A trajectory of so many tokens is done."""
        self._left -= tokens

    def affordable(self, paths: Sequence[Path], allowance: int | None) -> int:
        """Most paths like `paths` that may grow by a segment, at least one. `allowance`: the tree's tokens of this
        depth, where trees share those."""
        if self.is_per_depth and allowance is not None:
            return max(allowance // self._segment, 1)
        if self.is_per_tree:
            mean = sum(path.leaf.length for path in paths) / max(len(paths), 1)
            return max(int(self._left // (mean + self._segment)), 1)
        return self._width

    def covers(self, lengths: Sequence[int]) -> bool:
        """Whether paths of these lengths may have a token more each."""
        return not self.is_per_tree or sum(lengths) + len(lengths) <= self._left

    def covered(self, lengths: Sequence[int], *, keep: int = 0) -> int:
        """How many of paths of these lengths it covers, the first ones first; `keep` of them in any case."""
        count = len(lengths)
        while count > keep and not self.covers(lengths[:count]):
            count -= 1
        return count

    def segment_limit(self, paths: Sequence[Path]) -> int:
        """Most tokens of the next segment of each of `paths`; below 1 where nothing is left."""
        if not self.is_per_tree or not paths:
            return self._segment
        return min(self._segment, (self._left - sum(path.leaf.length for path in paths)) // len(paths))
