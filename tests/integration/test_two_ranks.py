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


def compute(rank: int, world: int) -> list[list[list[float]]]:
    """For every case the advantages of this rank's tokens; it holds every `world`-th part of the batch."""
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
            results.append(advantages(trainer, samples))
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
    torch.save(compute(rank, 2), Path(folder) / f'rank{rank}.pt')
    state.destroy_process_group()


def one_rank(folder: str) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    torch.save(compute(0, 1), Path(folder) / 'alone.pt')


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
    for case, (a, b, expected) in enumerate(zip(first, second, alone, strict=True)):
        rows = a + b
        assert len(rows) == len(expected) == TREES * WIDTH
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5), case
        assert expected[FAILED] == [] and any(value != 0 for row in expected for value in row)
