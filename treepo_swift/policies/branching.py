"""How many branches each live path gets at a segment boundary."""
from __future__ import annotations

import random
from typing import Protocol, Sequence

from ..registry import Registry
from ..tree import Path


class BranchingPolicy(Protocol):
    def __call__(self, live: Sequence[Path], total: int, rng: random.Random) -> list[int]:
        """Split `total` >= len(live) branches over the live paths, at least one each."""


branching_policies: Registry[BranchingPolicy] = Registry('branching policy')


def next_width(*, live: int, finished: int, ended: int, width: int, divergence: int) -> int:
    """Paths that grow after a boundary: ``max(a, min(W - f, d*a + d*e))``.

    `live` (a) paths go on, `finished` (f) trajectories are in, `ended` (e) of the paths stopped since the last
    boundary: the ``d*e`` term hands their unused budget to the live ones (budget transfer, arXiv 2508.17445).
    """
    return max(live, min(width - finished, divergence * live + divergence * ended))


@branching_policies.register('even')
def even(live: Sequence[Path], total: int, rng: random.Random) -> list[int]:
    """The same number for every path; what is left over goes to paths drawn by a seeded shuffle."""
    share, rest = divmod(total, len(live))
    order = list(range(len(live)))
    rng.shuffle(order)
    lucky = set(order[:rest])
    return [share + (index in lucky) for index in range(len(live))]
