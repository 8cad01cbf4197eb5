"""Time the parts of the package that run on every step."""
from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from statistics import median

from ..advantage import estimate_segments, registered_estimators


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--trajectories', type=int, default=100_000, help='of a batch (default 100000)')
    parser.add_argument('--depth', type=int, default=14, help='nodes of a path (default 14)')
    parser.add_argument('--width', type=int, default=16, help='trajectories of a tree (default 16)')
    parser.add_argument('--repeats', type=int, default=3, help='runs of each, of which the median counts (default 3)')


def run(args: argparse.Namespace) -> int:
    """Advantage estimators on binary trees, shuffled as they are when ranks gather them."""
    if min(args.trajectories, args.depth, args.width, args.repeats) < 1:
        print('treepo-swift bench: all numbers must be at least 1')
        return 1
    paths, rewards = batch(args.trajectories, args.depth, args.width)
    print(f'{args.trajectories:,} trajectories, {args.depth} nodes each, trees of width {args.width}')
    print(f'{"estimator":22}{"CPU s":>8}{"peak MiB":>10}')
    for name in registered_estimators():
        seconds = []
        for _ in range(args.repeats):
            started = time.process_time()
            estimate_segments(paths, rewards, estimator=name)
            seconds.append(time.process_time() - started)
        tracemalloc.start()
        estimate_segments(paths, rewards, estimator=name)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(f'{name:22}{median(seconds):8.2f}{peak:10.0f}')
    return 0


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
