"""Where the forks of a boundary start: at the end of the segment that has just ended, or inside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from treepo_swift.config import TreeConfig
from treepo_swift.core.registry import Registry
from treepo_swift.core.tree import Node, Path

from .branching import last_segment, may_fork

BOUNDARY = 'boundary'
"""The value of `fork_position` that asks no policy."""


@dataclass(frozen=True, slots=True)
class PositionContext:
    """What a fork position policy may look at besides the path."""

    config: TreeConfig
    rng: random.Random
    """The tree's own generator: all randomness of a policy comes from it."""
    low: int
    """Fewest response tokens that a fork may keep: up to where the segment begins."""
    high: int
    """Most of them: up to the end of the segment, where forks start without a policy."""
    segment: Sequence[Node]
    """The segment that has just ended; more than one node where it was split before."""
    first_branches: int
    """Branches that begin at the root, so far."""

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens that a fork can sample anew: at index i that of the fork which keeps ``low + i``."""
        return [value for node in self.segment for value in node.logprobs][self.low - self.high :]

    @property
    def entropies(self) -> list[float]:
        """Likewise, in nats. Raises ``ValueError`` where the engine was not asked for log-probs of other tokens."""
        values = [value for node in self.segment for value in node.entropies or ()][self.low - self.high :]
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


@register_fork_position('first_token_entropy')
def first_token_entropy(path: Path, context: PositionContext) -> int:
    """At the root while it has fewer branches than the first token has choices (``e^entropy``), else at the boundary.

    Forks may begin there where a path's first segment has just ended. What first branches say differs where their first
    token was a choice; where it was none they begin alike, and a fork further down shares more.
    """
    is_choice = context.low == 0 and context.first_branches < round(math.exp(context.entropies[0]))
    return 0 if is_choice else context.high


def _first(values: Sequence[float], best: Callable[[Sequence[float]], float], rng: random.Random) -> int:
    wanted = best(values)
    return rng.choice([index for index, value in enumerate(values) if value == wanted])


def position_context(path: Path, config: TreeConfig, rng: random.Random, first_branches: int) -> PositionContext | None:
    """Where the forks of a live path may start; None where that is the boundary in any case.

    So it is where a turn begins: what an environment said is not cut, and a fork before it would do without it. Where
    `fork_at` lets nothing fork at the segment's beginning, its first token is kept.
    """
    if path.leaf.begins_turn:
        return None
    segment = last_segment(path)
    start, high = segment[0].above, path.leaf.length
    low = start.length if may_fork(start, config) else start.length + 1
    return PositionContext(config, rng, low, high, segment, first_branches) if low < high else None
