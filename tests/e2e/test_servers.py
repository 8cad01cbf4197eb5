"""Rollout servers that die in mid-batch, by the real CLI and real vLLM: the training goes on while one lives."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip('vllm')

from tests.e2e import test_options
from tests.e2e.conftest import Service, free_port, quickstart_script, servers_at

HERE = Path(__file__).parent
DEATHS = [('worker', 0), ('engine', 1), ('server', 3)]
"""Which process of each server dies, and in the rollout of which step. The last is alone by then."""


def test_servers_that_die_are_left_out_until_none_is_left(environment, train, tmp_path):
    # A gigabyte less each: three of them run at a time.
    script = quickstart_script(tmp_path, plugins=[HERE / 'dying.py'], engine={'num_gpu_blocks_override': 512})
    with ExitStack() as stack:
        ports, servers = [], []
        for number, (process, batch) in enumerate(DEATHS):
            ports.append(free_port())
            env = {'PORT': str(ports[-1]), 'DIES': process, 'DIES_AT': str(batch)}
            service = Service(
                f'server {number}', ['bash', str(script)], log=tmp_path / f'{number}.log', env={**environment, **env}
            )
            servers.append(stack.enter_context(service))
        for server, port in zip(servers, ports, strict=True):
            server.wait_for_health(port, timeout=300)
        result = train(ports[0], *servers_at(ports), '--per_device_train_batch_size', '40', steps=9)
    said = result.stdout + result.stderr
    # Three batches were whole; the fourth found no server any more.
    assert result.returncode != 0
    rows = test_options.read_rows(tmp_path / 'train')
    steps = [(row['tree/trees'], row['tree/failures']) for row in rows if 'tree/trees' in row]
    assert steps == [(5, 0)] * 3, said[-5000:]
    for port in ports[:2]:
        assert f'the rollout server http://127.0.0.1:{port} is dead' in said, said[-8000:]
    assert f'No rollout server is left. The rollout server http://127.0.0.1:{ports[2]}' in said, said[-5000:]
