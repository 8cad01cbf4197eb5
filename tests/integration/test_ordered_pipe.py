"""swift's rollout server hears a second client while the weights of the first are processed."""

from __future__ import annotations

import asyncio
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
from swift.pipelines.infer.rollout import SwiftRolloutDeploy

from treepo_swift.server import ordered_pipe
from treepo_swift.server.ordered_pipe import OrderedPipe


def work(worker, commands: int, seconds: float) -> None:
    """As swift's worker: one command after the other; rollouts have large answers."""
    for _ in range(commands):
        command = worker.recv()
        time.sleep(seconds)
        if command['type'] == 'call':
            rollout = command['method'] == 'async_infer'
            worker.send([('answer', request) for request in command['kwargs']['infer_requests']] if rollout else True)


def deployed(seconds: float, commands: int) -> tuple[SwiftRolloutDeploy, threading.Thread, Connection]:
    ours, theirs = Pipe()
    deploy = object.__new__(SwiftRolloutDeploy)
    deploy.use_async_engine, deploy.num_connections = True, 1
    deploy.connections = [OrderedPipe(ours)]
    thread = threading.Thread(target=work, args=(theirs, commands, seconds), daemon=True)
    thread.start()
    return deploy, thread, theirs


def test_each_client_gets_the_answer_to_its_own_command():
    deploy, thread, worker = deployed(0.02, 41)

    async def both() -> None:
        for round in range(10):
            processing = asyncio.ensure_future(deploy.process_weights_after_loading())
            await asyncio.sleep(0.001 * (round % 3))
            texts = [f'{round} {i} ' + 'x' * 20_000 for i in range(20)]
            assert await deploy.infer(texts[:10]) == [('answer', text) for text in texts[:10]]
            assert await processing == {'message': 'Weights processed after loading'}
            assert await deploy.infer(texts[10:]) == [('answer', text) for text in texts[10:]]
            assert 'True' in (await deploy.reset_prefix_cache())['message']
        deploy.connections[0].send({'type': 'fire_and_forget', 'method': 'none'})

    asyncio.run(asyncio.wait_for(both(), 60))
    thread.join(10)
    assert not thread.is_alive() and not worker.poll() and not deploy.connections[0].poll()


def test_a_worker_that_dies_is_told_to_all_who_wait():
    ours, theirs = Pipe()
    pipe = OrderedPipe(ours)
    pipe.send({'type': 'call'})
    first = pipe.recv
    pipe.send({'type': 'call'})
    second = pipe.recv
    theirs.close()
    for receive in (first, second):
        with pytest.raises((EOFError, ConnectionResetError)):
            receive()


def test_what_comes_without_a_command_is_received_as_ever():
    ours, theirs = Pipe()
    theirs.send({'status': 'ready'})
    assert OrderedPipe(ours).recv() == {'status': 'ready'}


def test_the_plugin_gives_the_servers_process_such_pipes_once(monkeypatch):
    def start(self) -> None:
        self.connections = ['a', 'b']

    monkeypatch.setattr(SwiftRolloutDeploy, '_start_data_parallel_workers', start)
    ordered_pipe.order_answers()
    ordered_pipe.order_answers()
    deploy = SimpleNamespace()
    SwiftRolloutDeploy._start_data_parallel_workers(deploy)
    assert [pipe._connection for pipe in deploy.connections] == ['a', 'b']
    monkeypatch.delitem(ordered_pipe.sys.modules, ordered_pipe.DEPLOY)
    ordered_pipe.order_answers()
