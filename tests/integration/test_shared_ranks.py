"""Two DDP processes, one of which shares nothing: both make as many forwards, and gradients are the plain path's."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from swift.rlhf_trainers import GRPOTrainer

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


def joined_gradients(rank: int, enabled: bool) -> tuple[dict[str, Any], int]:
    """Of two optimizer steps of two micro-batches each, averaged over both ranks; only the first rank's go together.
    With the number of forwards of this rank."""
    inner = build('Qwen2').train()
    model = torch.nn.parallel.DistributedDataParallel(inner)
    trainer = build_trainer(model, shared={'enabled': enabled, 'max_tokens': 1000}, gradient_accumulation_steps=2)
    trainer.accelerator.num_processes = 2
    forwards: list[Any] = []
    inner.register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    rows = [*NOTHING_SHARED, (1, [10, 11, 12])] if rank else group_rows()
    batches = []
    for i in range(0, len(rows), len(rows) // 2):
        inputs, batch = micro_batch(rows[i : i + len(rows) // 2], masked=False)
        batches.append({'model_inputs': inputs, 'grpo_batch': batch})

    def training_step(self: Any, model: Any, batch: Any, num_items_in_batch: Any = None) -> None:
        logprobs, _ = self._get_per_token_logps_and_entropies(model, dict(batch['model_inputs']), batch['grpo_batch'])
        (logprobs * batch['grpo_batch'].completion_mask).sum().backward()

    GRPOTrainer.training_step = training_step
    for _ in range(2):
        trainer._find_following(batches)
        for i, batch in enumerate(batches):
            trainer.accelerator.sync_gradients = i == 1
            with nullcontext() if i else model.no_sync():
                trainer.training_step(model, batch)
    return {name: parameter.grad for name, parameter in inner.named_parameters()}, len(forwards)


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
    torch.save(
        [(*gradients(rank, enabled), *joined_gradients(rank, enabled)) for enabled in (True, False)],
        Path(folder) / f'rank{rank}.pt',
    )
    state.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found, with sharing and without."""
    folder = tmp_path_factory.mktemp('ranks')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(2)]


def test_two_ranks_of_which_one_falls_back(ranks):
    for (found, forwards, ratios, *_), (plain, plain_forwards, *_) in ranks:
        assert_same_gradients(found, plain, 1e-6)
        # Once both ways in the first pass, to compare them.
        assert (forwards, plain_forwards) == (5, 4) and 1.0 in ratios and max(ratios) > 1.5


def test_one_rank_joins_micro_batches_and_the_other_does_not(ranks):
    for rank, ((*_, found, forwards), (*_, plain, plain_forwards)) in enumerate(ranks):
        assert_same_gradients(found, plain, 1e-6)
        # The first pass is also computed both ways, to compare them; then one forward a step, or one a micro-batch.
        assert (forwards, plain_forwards) == ((2, 4)[rank] + 2, 4)
    ours, theirs = (ranks[rank][0][-2] for rank in range(2))
    assert_same_gradients(ours, theirs, 1e-12)
