"""swift's own rollout server over real HTTP, with the fake engine in place of its worker process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from swift.pipelines.infer.rollout import SwiftRolloutDeploy

from treepo_swift.server.scheduler import TreeRolloutScheduler


class Worker:
    """What swift's server has of its worker process: a pipe. Batches are answered by `scheduler` in a thread."""

    def __init__(self, scheduler: TreeRolloutScheduler) -> None:
        self.scheduler = scheduler
        self.dies: Callable[[dict[str, Any]], bool] = lambda command: False
        """Whether the process ends when it gets this command; as a pipe's other end then does."""
        self.dead = False
        self.batches: list[list[dict[str, Any]]] = []
        """The requests of every batch, probes left out."""
        self._process = ThreadPoolExecutor(1)
        self._answers: Queue[Future[Any]] = Queue()

    def send(self, command: dict[str, Any]) -> None:
        if self.dead:
            raise BrokenPipeError('Broken pipe')
        kwargs = command['kwargs']
        if command['method'] == 'async_infer' and not is_probe(kwargs['infer_requests']):
            self.batches.append(kwargs['infer_requests'])
        if self.dies(command):
            self.dead = True
            return
        self._answers.put(self._process.submit(self._work, command['method'], kwargs))

    def _work(self, method: str, kwargs: dict[str, Any]) -> Any:
        try:
            return asyncio.run(getattr(self.scheduler, method)(**kwargs))
        except Exception:
            return None

    def recv(self) -> Any:
        if self.dead:
            raise EOFError
        return self._answers.get_nowait().result()


def is_probe(requests: list[Any]) -> bool:
    return any((_data(request) or {}).get('treepo', {}).get('mode') == 'probe' for request in requests)


def _data(request: Any) -> dict[str, Any] | None:
    return request['data_dict'] if isinstance(request, dict) else request.data_dict


@contextmanager
def serving(scheduler: TreeRolloutScheduler, *, api_key: str | None = None) -> Iterator[SimpleNamespace]:
    """A running server: its `url` and its `worker`; `stop` ends it as a killed process ends, with open connections."""
    deploy = object.__new__(SwiftRolloutDeploy)
    deploy.args = SimpleNamespace(
        api_key=api_key, multi_turn_scheduler='treepo', vllm_enable_lora=False, host='127.0.0.1'
    )
    deploy.app = FastAPI()
    deploy.use_async_engine, deploy.use_gym_env, deploy.num_connections = True, False, 1
    worker = Worker(scheduler)
    deploy.connections = [worker]
    deploy._register_rl_rollout_app()
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    server = uvicorn.Server(uvicorn.Config(deploy.app, log_level='critical'))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, 'the server did not start'
        time.sleep(0.01)

    def stop() -> None:
        server.force_exit = server.should_exit = True
        thread.join(30)

    try:
        yield SimpleNamespace(url=f'http://127.0.0.1:{listener.getsockname()[1]}', worker=worker, stop=stop)
    finally:
        stop()
