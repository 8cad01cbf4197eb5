"""Advantages of two gloo processes are those of one, for every token, wherever a tree's trajectories sit."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_trainer import advantages, build_trainer, report

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from tests.integration.test_trees_file import Bytes
from treepo_swift.trainer.tree_writer import TreeWriter
from treepo_swift.view import load
from treepo_swift.wire.trace import TracedNode, TreeTrace

TREES, WIDTH = 3, 4
FAILED = 6
"""Index of the one failed trajectory, in the middle tree."""
CASES = [
    dict(estimator='treepo'),
    dict(estimator='treepo', normalisation='group'),
    dict(estimator='progress'),
    dict(estimator='progress', normalisation='group'),
    dict(estimator='spo', normalisation='none'),
    dict(estimator='treerl'),
]


def batch() -> tuple[list[dict[str, Any]], list[float]]:
    """Three trees of four trajectories in global order: over two ranks the middle one is cut in halves."""
    rng = random.Random(0)
    reports, rewards = [], []
    for tree in range(TREES):
        for leaf in range(WIDTH):
            if len(reports) == FAILED:
                reports.append(report(f't{tree}', [], [], 'failed'))
            else:
                reports.append(report(f't{tree}', [1 + leaf // 2, 10 + leaf], [3 + leaf // 2, rng.randint(1, 6)]))
            rewards.append(float(rng.random() < 0.5))
    return reports, rewards


def traces(reports: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The trace of each tree, by the index of its first trajectory: a token a loss token."""
    found: dict[int, dict[str, Any]] = {}
    for first in range(0, len(reports), WIDTH):
        nodes: dict[int, TracedNode] = {}
        for one in reports[first : first + WIDTH]:
            for depth, (node, count) in enumerate(zip(one['nodes'], one['tokens'], strict=True), 1):
                parent = one['nodes'][depth - 2] if depth > 1 else 0
                nodes[node] = TracedNode(node, parent, depth, True, [97] * count, [-1.0] * count, None)
        leaves = [(one['nodes'] or [0])[-1] for one in reports[first : first + WIDTH]]
        found[first] = TreeTrace(reports[first]['id'], [98], [nodes[id] for id in sorted(nodes)], leaves).to_dict()
    return found


def compute(rank: int, world: int, folder: str) -> list[list[list[float]]]:
    """For every case the advantages of this rank's tokens; it holds every `world`-th part of the batch.

    The last case also writes its trees to `folder`.
    """
    reports, rewards = batch()
    part = len(reports) // world
    mine = slice(rank * part, (rank + 1) * part)
    results = []
    for config in CASES:
        for overlong in (False, True):
            trainer, samples = build_trainer(
                reports[mine], rewards[mine], config=config, world=(rank, world), overlong_filter=overlong, steps=2
            )
            for index in (1, 9):
                if mine.start <= index < mine.stop:
                    samples[index - mine.start].finish_reason = 'length'
            if (config, overlong) == (CASES[-1], True):
                trainer._tree_writer = TreeWriter(
                    Path(folder), Bytes(), trainer.tree_config, rank=rank, warn=pytest.fail
                )
                for index, trace in traces(reports).items():
                    if mine.start <= index < mine.stop:
                        samples[index - mine.start].rollout_infos['tree_trace'] = trace
            results.append(advantages(trainer, samples))
            if trainer._tree_writer is not None:
                trainer._tree_writer.close()
            assert trainer._metrics['train']['tree/stop/failed'] == [pytest.approx(1 / len(reports))]
    return results


def two_ranks(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU='1',
    )
    from accelerate import PartialState

    state = PartialState(cpu=True, backend='gloo')
    assert state.num_processes == 2
    torch.save(compute(rank, 2, folder), Path(folder) / f'rank{rank}.pt')
    state.destroy_process_group()


def one_rank(folder: str) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    torch.save(compute(0, 1, f'{folder}/alone'), Path(folder) / 'alone.pt')


def test_two_ranks_agree_with_one(tmp_path, loaded):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ranks = [loaded.Process(target=two_ranks, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    ranks.append(loaded.Process(target=one_rank, args=(str(tmp_path),)))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        process.kill()  # where the other rank has failed
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    first, second, alone = (torch.load(tmp_path / f'{name}.pt') for name in ('rank0', 'rank1', 'alone'))
    assert len(alone) == 2 * len(CASES)
    # The middle tree lies on both ranks; the first one writes it, with what both know.
    written = [[(r.tree, r.trajectories) for r in load(tmp_path / name)] for name in ('', 'alone')]
    assert written[0] == written[1] and [id for id, _ in written[0]] == ['t0', 't1', 't2']
    files = sorted((tmp_path / 'trees').iterdir())
    assert [len(file.read_text().splitlines()) for file in files] == [2, 1]
    for case, (a, b, expected) in enumerate(zip(first, second, alone, strict=True)):
        rows = a + b
        assert len(rows) == len(expected) == TREES * WIDTH
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5), case
        assert expected[FAILED] == [] and any(value != 0 for row in expected for value in row)
