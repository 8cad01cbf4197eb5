"""How the branches of a segment boundary are spread over the live paths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from treepo_swift.config import TreeConfig
from treepo_swift.core.registry import Registry
from treepo_swift.core.tree import Node, Path


@dataclass(frozen=True, slots=True)
class BranchContext:
    """What a branching policy may look at besides the paths."""

    config: TreeConfig
    rng: random.Random
    """The tree's own generator: all randomness of a policy comes from it."""
    progress: float = 0.0
    """Share of the training that is done, 0 to 1."""

    @property
    def temperature(self) -> float:
        """The softmax temperature at this point of the training."""
        branching = self.config.branching
        return scheduled(branching.temperature, branching.schedule, self.progress)


class BranchingPolicy(Protocol):
    def __call__(self, live: Sequence[Path], total: int, context: BranchContext) -> list[int]:
        """Split `total` >= len(live) branches over the live paths, at least one each."""


branching_policies: Registry[BranchingPolicy] = Registry('branching policy')


def register_branching(name: str) -> Callable[[BranchingPolicy], BranchingPolicy]:
    """Decorator: make a `BranchingPolicy` available as ``branching: <name>``."""
    return branching_policies.register(name)


@register_branching('even')
def even(live: Sequence[Path], total: int, context: BranchContext) -> list[int]:
    """The same number for every path; what is left over goes to paths drawn by a seeded shuffle."""
    return split_branches([1.0] * len(live), total, context.rng)


@register_branching('logprob')
def logprob(live: Sequence[Path], total: int, context: BranchContext) -> list[int]:
    """By a softmax over each path's log-prob score (arXiv 2508.17445, section 4.4)."""
    scores = [path_score(path, context.config.branching.score) for path in live]
    return split_branches(softmax(scores, context), total, context.rng)


@register_branching('entropy')
def entropy(live: Sequence[Path], total: int, context: BranchContext) -> list[int]:
    """By a softmax over the mean token entropy of each path's last segment; high entropy is low certainty."""
    lasts = [last_segment(path) for path in live]
    values = []
    for nodes in lasts:
        entropies = [node.entropies for node in nodes if node.entropies is not None]
        if len(entropies) < len(nodes):
            raise ValueError('branching: entropy needs an engine that returns top-k log-probs, and this one does not.')
        values.append([*chain.from_iterable(entropies)])
    scores = [-math.fsum(entropies) / max(len(entropies), 1) for entropies in values]
    return split_branches(softmax(scores, context), total, context.rng)


def path_score(path: Path, kind: str) -> float:
    """``sum`` or ``mean`` of the path's log-probs, or the mean over its ``last_segment``; 0 without tokens."""
    nodes = last_segment(path) if kind == 'last_segment' else path.leaf.lineage()
    total = math.fsum(value for node in nodes for value in node.logprobs)
    return total if kind == 'sum' else total / max(sum(len(node.logprobs) for node in nodes), 1)


def last_segment(path: Path) -> list[Node]:
    """The parts of what was sampled last, before what an environment may have said to it; empty where nothing was."""
    node = path.leaf
    while not node.sampled:
        node = node.above
    parts: list[Node] = []
    while node.parent is not None and node.sampled and node.depth == (parts or [node])[0].depth:
        parts.append(node)
        node = node.parent
    return parts[::-1]


def softmax(scores: Sequence[float], context: BranchContext) -> list[float]:
    """Weights that favour low or high scores as the config says; they sum to 1."""
    sign = -1.0 if context.config.branching.favour == 'low' else 1.0
    scaled = [sign * score / context.temperature for score in scores]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    total = sum(weights)
    return [weight / total for weight in weights]


def split_branches(weights: Sequence[float], total: int, rng: random.Random) -> list[int]:
    """One for each, and the rest in proportion to `weights` by largest remainder; ties are drawn."""
    spare = total - len(weights)
    scale = spare / sum(weights)
    counts = [int(weight * scale + 1e-9) for weight in weights]
    order = list(range(len(weights)))
    rng.shuffle(order)
    order.sort(key=lambda i: round(counts[i] - weights[i] * scale, 9))
    for i in order[: spare - sum(counts)]:
        counts[i] += 1
    return [1 + count for count in counts]


def scheduled(value: float | tuple[float, float], schedule: str, progress: float) -> float:
    """A fixed value, or a pair's value at `progress` (0 to 1) of the way from its start to its end.

    ``linear``; ``cosine`` starts and ends slowly; ``sinusoid`` starts fast and ends slowly.
    """
    if not isinstance(value, tuple):
        return value
    progress = min(max(progress, 0.0), 1.0)
    shape = {
        'linear': progress,
        'cosine': (1 - math.cos(math.pi * progress)) / 2,
        'sinusoid': math.sin(math.pi / 2 * progress),
    }
    return value[0] + (value[1] - value[0]) * shape[schedule]


def may_fork(node: Node, config: TreeConfig) -> bool:
    """Whether `fork_at` lets paths fork at the end of `node`; at the root they always may."""
    return node.parent is None or config.fork_at == 'both' or (config.fork_at == 'turn') == node.begins_turn
