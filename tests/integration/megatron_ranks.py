"""Runs a function as the ranks of a Megatron training: processes of their own, with `megatron_stub` and gloo."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

TREES = {'TREEPO_SEGMENT_LENGTH': '8', 'TREEPO_MAX_DEPTH': '4'}


class Ranks:
    def __init__(self, processes: ForkServerContext) -> None:
        self._processes = processes

    def run(
        self,
        body: Callable[..., Any],
        *given: Any,
        world: int = 1,
        stages: int = 1,
        trees: dict[str, str] | None = None,
    ) -> list[Any]:
        """What ``body(world, folder, *given)`` returned on every rank; a rank's exception is in its place.

        `trees` are settings of the tree config beside `TREES`.
        """
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                **TREES,
                **(trees or {}),
                'WORLD_SIZE': str(world),
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
                'ACCELERATE_USE_CPU': '1',
            }
            started = [
                self._processes.Process(target=_rank, args=(body, given, rank, world, stages, environment, folder))
                for rank in range(world)
            ]
            for process in started:
                process.start()
            for process in started:
                process.join(60)
                process.kill()  # where another rank has failed
            results = [Path(folder) / f'rank{rank}' for rank in range(world)]
            return [pickle.loads(p.read_bytes()) if p.exists() else RuntimeError('no answer') for p in results]

    def all(self, *args: Any, **options: Any) -> list[Any]:
        """As `run`, and no rank may fail."""
        results = self.run(*args, **options)
        for rank, result in enumerate(results):
            if isinstance(result, Exception):
                pytest.fail(f'rank {rank}: {result}\n{getattr(result, "told", "")}')
        return results


def _rank(
    body: Callable[..., Any],
    given: tuple[Any, ...],
    rank: int,
    world: int,
    stages: int,
    environment: dict[str, str],
    folder: str,
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    from tests.integration import megatron_stub

    torch.set_num_threads(1)
    megatron_stub.install()
    torch.distributed.init_process_group('gloo', rank=rank, world_size=world)
    megatron_stub.use_groups(megatron_stub.Mpu(stages=stages))
    from accelerate import PartialState

    PartialState(cpu=True, **({'backend': 'gloo'} if world > 1 else {}))
    try:
        result = body(world, folder, *given)
    except Exception as e:
        result = e
        result.told = traceback.format_exc()
    answer = Path(folder) / f'rank{rank}'
    answer.with_suffix('.part').write_bytes(pickle.dumps(result))
    answer.with_suffix('.part').rename(answer)
    if not isinstance(result, Exception):
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)
