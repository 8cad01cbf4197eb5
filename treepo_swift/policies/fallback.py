"""Where new branches start when a tree has no live path left and is still too narrow."""
from __future__ import annotations

import random
from typing import Sequence

from ..tree import Node, Path, StopReason

FALLBACK_REASONS = frozenset({StopReason.ANSWER, StopReason.EOS})
"""Only paths that came to an end of their own show a prefix worth another try."""


def random_segment(trajectories: Sequence[Path], root: Node, *, needed: int, divergence: int,
                   rng: random.Random) -> list[tuple[Node, int]]:
    """Choose at most `needed` starts as (node to continue from, index of the trajectory it was cut from).

    Candidates are the trajectories that ended with an answer or EOS, in random order. Each is cut at one of its
    segment boundaries, uniformly, the root included and its own end excluded, and gives up to `divergence`
    branches. Without a candidate the root gives them, with index -1.
    """
    candidates = [index for index, path in enumerate(trajectories) if path.stop in FALLBACK_REASONS]
    if not candidates:
        return [(root, -1)] * min(divergence, needed)
    rng.shuffle(candidates)
    starts: list[tuple[Node, int]] = []
    for index in candidates:
        boundaries = [root, *trajectories[index].leaf.lineage()[:-1]]
        cut = rng.choice(boundaries)
        starts += [(cut, index)] * min(divergence, needed - len(starts))
        if len(starts) == needed:
            break
    return starts
