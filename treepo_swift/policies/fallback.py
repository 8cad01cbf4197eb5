"""Where new branches start when a tree has no live path left and is still too narrow."""
from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol, Sequence

from ..config import TreeConfig
from ..registry import Registry
from ..tree import Path, StopReason, response_logprobs

REASONS = {
    'answer_or_eos': (StopReason.ANSWER, StopReason.EOS),
    'finished': (StopReason.ANSWER, StopReason.EOS, StopReason.STOP_STRING, StopReason.HOOK),
}
"""Paths that came to an end of their own show a prefix worth another try."""


@dataclass(frozen=True, slots=True)
class CutContext:
    """What a cut policy may look at besides the path."""

    config: TreeConfig
    rng: random.Random
    low: int
    high: int
    """A cut may keep `low` to `high` response tokens of this path."""
    boundaries: list[int]
    """Those of its segment boundaries that are within, ascending; 0 stands for the root. Never empty."""


class CutPolicy(Protocol):
    def __call__(self, path: Path, context: CutContext) -> int:
        """How many response tokens of `path` a new branch keeps, ``context.low`` to ``context.high``."""


cut_policies: Registry[CutPolicy] = Registry('fallback')


@cut_policies.register('random_segment')
def random_segment(path: Path, context: CutContext) -> int:
    """One of the segment boundaries, each as likely as the others (the paper's)."""
    return context.rng.choice(context.boundaries)


@cut_policies.register('random_token')
def random_token(path: Path, context: CutContext) -> int:
    """Anywhere, each token as likely as the others."""
    return context.rng.randint(context.low, context.high)


@cut_policies.register('random_block')
def random_block(path: Path, context: CutContext) -> int:
    """A multiple of `fallback_block`: misaligned where that is not a multiple of the segment length."""
    block = context.config.fallback_block
    first = -(-context.low // block) * block
    return context.rng.choice(range(first, context.high + 1, block) or [context.low])


@cut_policies.register('min_logprob_token')
def min_logprob_token(path: Path, context: CutContext) -> int:
    """Before the least probable token, which is sampled anew."""
    logprobs = response_logprobs(path.leaf)
    return min(range(context.low, context.high + 1), key=logprobs.__getitem__)


@cut_policies.register('logprob_block')
def logprob_block(path: Path, context: CutContext) -> int:
    """The beginning of a block of `fallback_block` tokens, drawn by a softmax over the blocks' mean log-probs."""
    logprobs, block = response_logprobs(path.leaf), context.config.fallback_block
    starts = list(range(context.low, context.high + 1, block))
    means = [math.fsum(part) / len(part) for part in (logprobs[start:start + block] for start in starts)]
    sign = -1.0 if context.config.fallback_favour == 'low' else 1.0
    top = max(sign * mean for mean in means)
    return context.rng.choices(starts, [math.exp(sign * mean - top) for mean in means])[0]


def candidates(trajectories: Sequence[Path], config: TreeConfig, rng: random.Random) -> list[int]:
    """Indices of the trajectories that may be cut, in the order in which they are."""
    chosen = [i for i, path in enumerate(trajectories) if path.leaf.length > 0 and not path.stop.is_placeholder]
    if config.fallback_candidates in REASONS:
        chosen = [i for i in chosen if trajectories[i].stop in REASONS[config.fallback_candidates]]
    rng.shuffle(chosen)
    if config.fallback_candidates == 'best_reason_first':
        order = list(StopReason)
        chosen.sort(key=lambda i: order.index(trajectories[i].stop))
    return chosen


def cut_context(path: Path, config: TreeConfig, rng: random.Random) -> CutContext:
    """The range in which `path` may be cut, so that its new branch has a token and a depth left to grow."""
    ends = [(0, 0)] + [(node.length, node.depth) for node in path.leaf.lineage()]
    allowed = [length for length, depth in ends if depth < config.max_depth and length < path.leaf.length]
    high = path.leaf.length - 1 if path.leaf.depth < config.max_depth else allowed[-1]
    low = 0
    if config.fallback_window:
        low = max(length for length, depth in ends if depth <= max(path.leaf.depth - config.fallback_window, 0))
        low = min(low, high)
    return CutContext(config, rng, low, high, [length for length in allowed if length >= low] or [low])
