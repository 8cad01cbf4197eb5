"""A real model, a real rollout server and the quickstart's real scripts; skipped where swift or vLLM are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / 'examples' / 'quickstart'
sys.path.insert(0, str(QUICKSTART))
from services import Service, free_port


@pytest.fixture(scope='session')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model after a few seconds of pre-training: it answers, mostly wrong."""
    target = tmp_path_factory.mktemp('model')
    for script, extra in (
        ('task.py', ['--train', '64', '--heldout', '8']),
        ('make_model.py', ['--steps', '60', '--eval-problems', '2']),
    ):
        subprocess.run([sys.executable, str(QUICKSTART / script), '--output', str(target), *extra], check=True)
    return target


@pytest.fixture(scope='session')
def environment(model: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith('TREEPO_')}
    env.update(
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        MODEL=str(model),
        DATASET=str(model / 'train.jsonl'),
        HF_HUB_OFFLINE='1',
        TRANSFORMERS_OFFLINE='1',
        USE_HF='1',
        SEED='1',
    )
    return env


@pytest.fixture(scope='session')
def serve(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Start quickstart's rollout.sh (or what `script` says) and return its port.

    Who asks for the same gets the same server: half of a test is its start. All end with the session.
    """
    services: list[Any] = []
    ports: dict[tuple[Path, tuple[tuple[str, str], ...]], int] = {}

    def start(*, script: Path = QUICKSTART / 'rollout.sh', **env: str) -> int:
        asked = (script, tuple(sorted(env.items())))
        if asked not in ports:
            port = free_port()
            service = Service(
                'The rollout server',
                ['bash', str(script)],
                log=tmp_path_factory.mktemp('server') / 'rollout.log',
                env={**environment, 'PORT': str(port), **env},
            )
            services.append(service)
            service.__enter__().wait_for_health(port, timeout=240)
            ports[asked] = port
        return ports[asked]

    yield start
    for service in services:
        service.__exit__(None, None, None)


@pytest.fixture
def train(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run quickstart's train.sh (or what `script` says) with more arguments and return what it printed."""

    def run(
        port: int, *args: str, script: Path = QUICKSTART / 'train.sh', steps: int = 3, **env: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['bash', str(script), *args],
            capture_output=True,
            text=True,
            timeout=400,
            env={
                **environment,
                'PORT': str(port),
                'GROUP_PORT': str(free_port()),
                'MASTER_PORT': str(free_port()),
                'STEPS': str(steps),
                'OUTPUT': str(tmp_path / 'train'),
                **env,
            },
        )

    return run
