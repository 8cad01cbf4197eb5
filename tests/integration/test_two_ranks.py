"""Grouping and whitening over two gloo processes agree with one process, wherever a tree's trajectories sit."""
from __future__ import annotations

import os
import random
import socket
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

NUM_GENERATIONS = 4


def batch() -> tuple[list[dict], list[float], list[int]]:
    """Three trees of four trajectories, one of them failed: reports, rewards and loss tokens in global order."""
    rng = random.Random(0)
    reports, rewards, lengths = [], [], []
    for tree in range(3):
        for leaf in range(NUM_GENERATIONS):
            failed = (tree, leaf) == (1, 2)
            nodes = [] if failed else [1 + leaf // 2, 10 + leaf]
            reports.append({
                'id': f't{tree}',
                'nodes': nodes,
                'tokens': [4] * len(nodes),
                'depth': len(nodes),
                'stop': 'failed' if failed else 'eos',
                'fallback_from': None
            })
            rewards.append(float(rng.random() < .5))
            lengths.append(0 if failed else rng.randint(1, 9))
    return reports, rewards, lengths


def compute(rank: int, world: int) -> list[float]:
    """What `TreeGRPOTrainer._compute_advantages` gives on this rank, which holds every `world`-th part of the batch."""
    from treepo_swift.config import TreeConfig
    from treepo_swift.trainer import TreeGRPOTrainer
    reports, rewards, lengths = batch()
    part = len(reports) // world
    mine = slice(rank * part, (rank + 1) * part)
    trainer = object.__new__(TreeGRPOTrainer)
    trainer.__dict__.update(
        tree_config=TreeConfig(),
        model=SimpleNamespace(training=True),
        num_generations=NUM_GENERATIONS,
        num_generations_eval=NUM_GENERATIONS,
        dynamic_num_samples=False,
        kl_in_reward=False,
        beta=0.0,
        advantage_estimator='grpo',
        scale_rewards='group',
        reward_weights=torch.ones(1),
        reward_func_names=['r'],
        overlong_filter=False,
        _metrics={'train': defaultdict(list)},
        _logs={'rewards': defaultdict(list)})
    mask = torch.zeros(part, 9, dtype=torch.bool)
    for row, length in enumerate(lengths[mine]):
        mask[row, :length] = True
    encoded = [{'grpo_batch': SimpleNamespace(completion_mask=mask)}]
    samples = [SimpleNamespace(rollout_infos={'tree': report}) for report in reports[mine]]
    values = trainer._compute_advantages(samples, torch.tensor(rewards)[:, None], encoded)
    assert trainer._metrics['train']['tree/stop/failed'] == [pytest.approx(1 / 12)]
    return values.tolist()


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU='1')
    from accelerate import PartialState
    state = PartialState(cpu=True, backend='gloo')
    assert state.num_processes == 2
    torch.save(compute(rank, 2), Path(folder) / f'rank{rank}.pt')
    state.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2)]
    torch.multiprocessing.spawn(single, args=(str(tmp_path), ), nprocs=1)
    alone = torch.load(tmp_path / 'alone.pt')
    assert ranks[0] == pytest.approx(ranks[1]) and ranks[0] == pytest.approx(alone)
    assert len(alone) == 12 and alone[6] == 0.0 and any(value != 0 for value in alone)


def single(rank: int, folder: str) -> None:
    from accelerate import PartialState
    PartialState(cpu=True)
    torch.save(compute(0, 1), Path(folder) / 'alone.pt')


def test_samples_without_trees_train_as_plain_grpo():
    from accelerate import PartialState
    from swift.rlhf_trainers import GRPOTrainer

    from treepo_swift.trainer import TreeGRPOTrainer
    PartialState(cpu=True)
    rewards = torch.tensor([1., 0, 0, 1, 0, 0, 0, 1])[:, None]

    def build(cls):
        trainer = object.__new__(cls)
        trainer.__dict__.update(
            model=SimpleNamespace(training=True),
            num_generations=4,
            num_generations_eval=4,
            dynamic_num_samples=False,
            kl_in_reward=False,
            beta=0.0,
            advantage_estimator='grpo',
            scale_rewards='group',
            reward_weights=torch.ones(1),
            reward_func_names=['r'],
            _metrics={'train': defaultdict(list)},
            _logs={'rewards': defaultdict(list)})
        return trainer

    samples = [SimpleNamespace(rollout_infos={'num_turns': 1}) for _ in range(8)]
    ours, plain = build(TreeGRPOTrainer), build(GRPOTrainer)
    assert torch.equal(ours._compute_advantages(samples, rewards, []), plain._compute_advantages(samples, rewards, []))
    assert ours._metrics == plain._metrics
    samples[0].rollout_infos['tree'] = {'id': 't'}
    with pytest.raises(RuntimeError, match='7 of 8 samples of a batch came without a tree'):
        ours._compute_advantages(samples, rewards, [])
