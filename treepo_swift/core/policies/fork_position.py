"""Where the forks of a boundary start: at the end of the segment that has just ended, or inside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from treepo_swift.config import TreeConfig
from treepo_swift.core.registry import Registry
from treepo_swift.core.tree import Node, Path

from .branching import last_segment

BOUNDARY = 'boundary'
"""The value of `fork_position` that asks no policy."""


@dataclass(frozen=True, slots=True)
class PositionContext:
    """What a fork position policy may look at besides the path."""

    config: TreeConfig
    rng: random.Random
    """The tree's own generator: all randomness of a policy comes from it."""
    low: int
    """Fewest response tokens that a fork may keep: the segment's first."""
    high: int
    """Most of them: up to the end of the segment, where forks start without a policy."""
    segment: Sequence[Node]
    """The segment that has just ended; more than one node where it was split before."""

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens that a fork can sample anew: at index i that of the fork which keeps ``low + i``."""
        return [value for node in self.segment for value in node.logprobs][1:]

    @property
    def entropies(self) -> list[float]:
        """Likewise, in nats. Raises ``ValueError`` where the engine was not asked for log-probs of other tokens."""
        values = [value for node in self.segment for value in node.entropies or ()][1:]
        if len(values) != self.high - self.low:
            raise ValueError('entropies need an engine that returns top-k log-probs, and fork_position.top_k above 0.')
        return values


class ForkPosition(Protocol):
    def __call__(self, path: Path, context: PositionContext) -> int:
        """How many response tokens of the live `path` its forks keep, ``context.low`` to ``context.high``."""


fork_positions: Registry[ForkPosition] = Registry('fork position')


def register_fork_position(name: str) -> Callable[[ForkPosition], ForkPosition]:
    """Decorator: make a `ForkPosition` available as ``fork_position: <name>``."""
    if name == BOUNDARY:
        raise ValueError(f'fork position {name!r} asks no policy, so none can have this name: choose another.')
    return fork_positions.register(name)


@register_fork_position('min_logprob_token')
def min_logprob_token(path: Path, context: PositionContext) -> int:
    """Before the segment's least probable token, which is sampled anew; ties are drawn."""
    return context.low + _first(context.logprobs, min, context.rng)


@register_fork_position('max_entropy_token')
def max_entropy_token(path: Path, context: PositionContext) -> int:
    """Before the token at which the model was least certain, as in TreeRL (arXiv 2506.11902); ties are drawn."""
    return context.low + _first(context.entropies, max, context.rng)


def _first(values: Sequence[float], best: Callable[[Sequence[float]], float], rng: random.Random) -> int:
    wanted = best(values)
    return rng.choice([index for index, value in enumerate(values) if value == wanted])


def position_context(path: Path, config: TreeConfig, rng: random.Random) -> PositionContext | None:
    """Where the forks of a live path may start; None where that is the boundary in any case.

    So it is where a turn begins: what an environment said is not cut, and a fork before it would do without it. And so
    it is where the segment has a single token.
    """
    if path.leaf.begins_turn:
        return None
    segment = last_segment(path)
    low, high = segment[0].above.length + 1, path.leaf.length
    return PositionContext(config, rng, low, high, segment) if low < high else None
