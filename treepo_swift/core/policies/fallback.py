"""Where new branches start when a tree has no live path left and is still too narrow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from treepo_swift.config import TreeConfig
from treepo_swift.core.registry import Registry
from treepo_swift.core.tree import Node, Path, StopReason

from .branching import may_fork

REASONS = {
    'answer_or_eos': (StopReason.ANSWER, StopReason.EOS),
    'finished': (StopReason.ANSWER, StopReason.EOS, StopReason.STOP_STRING, StopReason.HOOK),
}
"""Paths that came to an end of their own show a prefix worth another try."""

WITHOUT_CUT = ('root', 'none')
"""Values of `fallback` that name no cut policy."""


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
    taken: Collection[int] = ()
    """Cuts of the path that were chosen just before, where `fallback.cuts` asks for several."""


class CutPolicy(Protocol):
    def __call__(self, path: Path, context: CutContext) -> int:
        """How many response tokens of `path` a new branch keeps, ``context.low`` to ``context.high``."""


cut_policies: Registry[CutPolicy] = Registry('fallback')


def register_fallback(name: str) -> Callable[[CutPolicy], CutPolicy]:
    """Decorator: make a `CutPolicy` available as ``fallback: <name>``."""
    if name in WITHOUT_CUT:
        raise ValueError(f'fallback {name!r} cuts nothing, so no cut policy can have this name: choose another.')
    return cut_policies.register(name)


@register_fallback('random_segment')
def random_segment(path: Path, context: CutContext) -> int:
    """One of the segment boundaries, each as likely as the others (the paper's)."""
    return context.rng.choice(context.boundaries)


@register_fallback('min_logprob_segment')
def min_logprob_segment(path: Path, context: CutContext) -> int:
    """Before the segment of the lowest mean log-prob, as AT2PO (arXiv 2601.04767) expands turns; of several cuts each
    is before another one."""
    logprobs = _logprobs_by_position(path)
    ends = [*context.boundaries[1:], path.leaf.length]
    means = []
    for start, end in zip(context.boundaries, ends, strict=True):
        known = [value for value in logprobs[start:end] if value is not None]
        means.append((start in context.taken, math.fsum(known) / max(len(known), 1), start))
    return min(means)[2]


@register_fallback('random_token')
def random_token(path: Path, context: CutContext) -> int:
    """Anywhere, each token as likely as the others."""
    return context.rng.randint(context.low, context.high)


@register_fallback('random_block')
def random_block(path: Path, context: CutContext) -> int:
    """A multiple of `block`: misaligned where that is not a multiple of the segment length."""
    block = context.config.fallback.block
    first = -(-context.low // block) * block
    return context.rng.choice(range(first, context.high + 1, block) or [context.low])


@register_fallback('min_logprob_token')
def min_logprob_token(path: Path, context: CutContext) -> int:
    """Before the least probable token, which is sampled anew; of several cuts each is before another token."""
    return _lowest(_logprobs_by_position(path), context)


@register_fallback('max_entropy_token')
def max_entropy_token(path: Path, context: CutContext) -> int:
    """Before the token at which the model was least certain; of several cuts each is before another token."""
    values: list[float | None] = []
    for node in path.leaf.lineage():
        if node.sampled and node.entropies is None:
            raise ValueError('it needs an engine that returns top-k log-probs, and this one does not.')
        values += [-value for value in node.entropies or ()] if node.sampled else [None] * len(node.token_ids)
    return _lowest(values, context)


def _lowest(values: Sequence[float | None], context: CutContext) -> int:
    """The position of the lowest value that may be cut before; a position that is taken only where no other is left."""
    span = enumerate(values[context.low : context.high + 1], context.low)
    sampled = [(position in context.taken, value, position) for position, value in span if value is not None]
    return min(sampled, default=(False, 0.0, context.low))[2]


@register_fallback('logprob_block')
def logprob_block(path: Path, context: CutContext) -> int:
    """The beginning of a block of `block` tokens, drawn by a softmax over the blocks' mean log-probs."""
    logprobs, block = _logprobs_by_position(path), context.config.fallback.block
    starts, means = [], []
    for start in range(context.low, context.high + 1, block):
        known = [value for value in logprobs[start : start + block] if value is not None]
        if known:
            starts.append(start)
            means.append(math.fsum(known) / len(known))
    if not starts:
        return context.low
    sign = -1.0 if context.config.fallback.favour == 'low' else 1.0
    top = max(sign * mean for mean in means)
    return context.rng.choices(starts, [math.exp(sign * mean - top) for mean in means])[0]


def candidates(trajectories: Sequence[Path], config: TreeConfig, rng: random.Random) -> list[int]:
    """Indices of the trajectories that may be cut, in the order in which they are."""
    chosen = [i for i, path in enumerate(trajectories) if path.leaf.length > 0 and not path.is_placeholder]
    if config.fallback.candidates in REASONS:
        chosen = [i for i in chosen if trajectories[i].stop in REASONS[config.fallback.candidates]]
    rng.shuffle(chosen)
    if config.fallback.candidates == 'best_reason_first':
        order: list[StopReason | None] = [*StopReason]
        chosen.sort(key=lambda i: order.index(trajectories[i].stop))
    elif config.fallback.candidates == 'lowest_reward_first':
        rewards = [math.inf if path.reward is None else path.reward for path in trajectories]
        chosen.sort(key=lambda i: rewards[i])
    return chosen


def cut_context(path: Path, config: TreeConfig, rng: random.Random, taken: Collection[int] = ()) -> CutContext:
    """The range in which `path` may be cut, so that its new branch has a token and a depth left to grow."""
    leaf, nodes = path.leaf, _from_root(path)
    allowed = [
        node.length
        for node, after in zip(nodes, nodes[1:])
        if _may_branch(node, after, config) and node.length < leaf.length and _is_boundary(node, after, config)
    ]
    high = leaf.length - 1 if _may_grow(leaf, config) else allowed[-1]
    low = 0
    if config.fallback.window:
        low = max(node.length for node in nodes if node.depth <= max(leaf.depth - config.fallback.window, 0))
        low = min(low, allowed[-1])
    return CutContext(config, rng, low, high, [length for length in allowed if length >= low], taken)


def next_start(path: Path, position: int, config: TreeConfig) -> int:
    """`position`, or the beginning of the next turn where no branch can begin there: a turn that has ended is not
    sampled on, and what an environment said is not cut."""
    nodes = _from_root(path)
    node, after = next((n, m) for n, m in zip(nodes, nodes[1:]) if n.length <= position < m.length)
    if position == node.length:
        fine = _may_branch(node, after, config)
    else:
        fine = after.sampled and _may_grow(after, config)
    if fine:
        return position
    return next(n.length for n in nodes if n.length > position and not n.sampled)


def _from_root(path: Path) -> list[Node]:
    nodes = path.leaf.lineage()
    return [nodes[0].above, *nodes]


def _may_grow(node: Node, config: TreeConfig) -> bool:
    """Whether the depth limit of its turn lets a segment follow."""
    return node.depth - node.turn_start.depth < config.max_depth


def _may_branch(node: Node, after: Node, config: TreeConfig) -> bool:
    """Whether something else may be sampled behind `node` than what follows it: not where a turn has ended."""
    return (after.sampled or node.begins_turn) and _may_grow(node, config)


def _is_boundary(node: Node, after: Node, config: TreeConfig) -> bool:
    """Whether a segment ends here, and paths may fork here by `fork_at`; at the root they always may."""
    if node.depth == after.depth and node.sampled and after.sampled:
        return False  # two parts of a segment: where other paths have split it is a matter of time
    return may_fork(node, config)


def _logprobs_by_position(path: Path) -> list[float | None]:
    """Of every response token, None for an environment's."""
    return [value for node in path.leaf.lineage() for value in node.logprobs or [None] * len(node.token_ids)]
