"""Two DDP processes, one of which shares nothing: both make as many forwards, and gradients are the plain path's."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from tests.integration.test_shared_logprobs import assert_same_gradients, build
from tests.integration.test_shared_trainer import build_trainer, group_rows, micro_batch

NOTHING_SHARED = [(1, [1, 2, 3, 4]), (1, [5, 6, 7]), (1, [8, 9, 1, 2, 3])]


def gradients(rank: int, enabled: bool) -> tuple[dict[str, Any], int, list[float]]:
    """Of a loss over both ranks, after old log-probs, twice; with the number of forwards of this rank."""
    inner = build('Qwen2').train()
    model = torch.nn.parallel.DistributedDataParallel(inner)
    trainer = build_trainer(model, shared={'enabled': enabled})
    trainer.accelerator.num_processes = 2
    forwards: list[Any] = []
    inner.register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    for rows in (NOTHING_SHARED if rank else group_rows(), group_rows() if rank else NOTHING_SHARED):
        inputs, batch = micro_batch(rows, masked=False)
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(model, dict(inputs), batch)
        logprobs, _ = trainer._get_per_token_logps_and_entropies(model, dict(inputs), batch)
        (logprobs * batch.completion_mask).sum().backward()
    found = {name: parameter.grad for name, parameter in inner.named_parameters()}
    return found, len(forwards), trainer._metrics['train']['tree/train_token_ratio']


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
    torch.save([gradients(rank, enabled) for enabled in (True, False)], Path(folder) / f'rank{rank}.pt')
    state.destroy_process_group()


def test_two_ranks_of_which_one_falls_back(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2)]
    for (found, forwards, ratios), (plain, plain_forwards, _) in ranks:
        assert_same_gradients(found, plain, 1e-6)
        # Once both ways in the first pass, to compare them.
        assert (forwards, plain_forwards) == (5, 4) and 1.0 in ratios and max(ratios) > 1.5
