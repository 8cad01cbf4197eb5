"""Time the advantage estimators, which run on every training step."""

from __future__ import annotations

import random
import time
import tracemalloc
from statistics import median
from typing import Any

from treepo_swift.advantage import estimate_segments, registered_estimators


def measure(*, trajectories: int = 100_000, depth: int = 14, width: int = 16, repeats: int = 3) -> list[dict[str, Any]]:
    """A row for each estimator, on binary trees that are shuffled as they are when ranks gather them."""
    paths, rewards = batch(trajectories, depth, width)
    rows = []
    for name in registered_estimators():
        seconds = []
        for _ in range(repeats):
            started = time.process_time()
            estimate_segments(paths, rewards, estimator=name)
            seconds.append(time.process_time() - started)
        tracemalloc.start()
        estimate_segments(paths, rewards, estimator=name)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        rows.append({'estimator': name, 'CPU s': round(median(seconds), 2), 'peak MiB': round(peak)})
    return rows


def batch(trajectories: int, depth: int, width: int) -> tuple[list[list[object]], list[float]]:
    """Paths that fork in two at each level until the tree is `width` wide, and rewards of 0 and 1."""
    rng = random.Random(0)
    paths: list[list[object]] = []
    for index in range(trajectories):
        tree, leaf = divmod(index, width)
        nodes = [level * width + leaf * min(2**level, width) // width for level in range(1, depth + 1)]
        paths.append([f'tree-{tree}', *nodes])
    rng.shuffle(paths)
    return paths, [float(rng.random() < 0.5) for _ in paths]
