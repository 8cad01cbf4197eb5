"""A rollout of ``--async_generate`` that fails ends the training on every rank, in swift's own code and in ours."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.test_trainer import build_trainer
from treepo_swift.compat.capabilities import SwiftFeatures, swift_features

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

MESSAGE = 'Server 0 failed: 500, RolloutError: 8 of 8 trajectories failed'
PATIENCE = timedelta(seconds=60)
"""How long a rank waits for one that has gone; then it raises another error than ours."""


class FailingClient:
    def infer(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(MESSAGE)


def build(rank: int, world: int) -> tuple[Any, list[Any]]:
    """What swift's asynchronous rollout needs of a trainer: no model, and servers that always fail."""
    from swift.rlhf_trainers.rollout_mixin import RolloutTrainerArgumentsMixin

    trainer, samples = build_trainer(
        [None] * 4,
        [0.0] * 4,
        world=(rank, world),
        executor=ThreadPoolExecutor(1),
        train_queue=Queue(),
        eval_queue=Queue(),
        _async_futures={},
        async_generate=True,
        vllm_mode='server',
        use_fast_infer=True,
        multi_turn_scheduler=None,
        vllm_client=FailingClient(),
        request_config=SimpleNamespace(seed=None, max_tokens=8),
        _last_loaded_step=0,
        resample_encode_failed_inputs=lambda inputs: inputs,
        to_samples=lambda inputs: inputs,
    )
    trainer.args = object.__new__(RolloutTrainerArgumentsMixin)
    trainer.args.__dict__.update(async_generate=True, vllm_mode='server', sleep_level=0, max_turns=None)
    trainer.template.truncation_strategy = 'left'
    trainer._preprocess_inputs = lambda inputs: inputs
    trainer._engine_infer = lambda requests, request_config: trainer.vllm_client.infer(requests, request_config)
    return trainer, samples


def first_rollout(trainer: Any, samples: list[Any]) -> None:
    """It is asked for where the training begins, in the main thread."""
    trainer._prefetch([samples])
    trainer._fast_infer(samples)


def later_rollout(trainer: Any, samples: list[Any]) -> None:
    trainer.async_generate_rollout(samples)
    trainer._fast_infer(samples)


def evaluation(trainer: Any, samples: list[Any]) -> None:
    """Its first rollout, while the training's are healthy."""
    from swift.rlhf_trainers.rollout_mixin import DataCache

    trainer.train_queue.put(DataCache([]))
    trainer.control.should_evaluate = True
    first_rollout(trainer, samples)


WAYS = (first_rollout, later_rollout, evaluation)


def train(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU='1',
    )
    from accelerate import PartialState

    PartialState(cpu=True, backend='gloo', timeout=PATIENCE)
    outcomes = {}
    for way in WAYS:
        try:
            way(*build(rank, world))
            outcomes[way.__name__] = 'went on'
        except Exception as e:
            outcomes[way.__name__] = f'{type(e).__name__}: {e}'
        Path(folder, f'{rank}.json').write_text(json.dumps(outcomes))
        torch.distributed.barrier()  # nobody begins the next while another is in this one's collectives
    torch.distributed.destroy_process_group()


def test_a_failed_rollout_is_raised_on_all_ranks(tmp_path):
    if not swift_features().async_errors:
        pytest.skip('this ms-swift hands no failure of an asynchronous rollout to other ranks; 4.6.0 and newer do')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(train, args=(2, port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        outcomes = json.loads((tmp_path / f'{rank}.json').read_text())
        assert list(outcomes) == [way.__name__ for way in WAYS]
        for way, outcome in outcomes.items():
            assert MESSAGE in outcome, (rank, way, outcome)
            assert rank == 0 or 'rank 0' in outcome


def test_where_swift_hands_no_failure_on_the_first_rollout_raises_where_it_failed(monkeypatch):
    monkeypatch.setattr('treepo_swift.trainer.trainer.swift_features', lambda: SwiftFeatures(async_errors=False))
    trainer, samples = build(0, 1)
    with pytest.raises(RuntimeError, match='Server 0 failed'):
        trainer._prefetch([samples])
