"""A real model, a real rollout server and the quickstart's real scripts; skipped where swift or vLLM are missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / 'examples' / 'quickstart'
sys.path.insert(0, str(QUICKSTART))
from treepo_swift.lab.services import Service, free_port


def servers_at(ports: list[int]) -> list[str]:
    """Flags of a training that has a server at each of these ports."""
    hosts, groups = ['127.0.0.1'] * len(ports), [free_port() for _ in ports]
    return [
        *('--vllm_server_host', *hosts),
        *('--vllm_server_port', *map(str, ports)),
        *('--vllm_server_group_port', *map(str, groups)),
    ]


def quickstart_script(
    folder: Path, name: str = 'rollout.sh', *, plugins: Sequence[Path] = (), engine: Mapping[str, Any] | None = None
) -> Path:
    """A script of the quickstart, in `folder`, that loads more plugins and gives vLLM's engine more options."""
    text = (QUICKSTART / name).read_text()
    plugin, options = '"$(treepo-swift plugin)"', {'block_size': 32}
    assert plugin in text and json.dumps(options) in text
    text = text.replace(plugin, ' '.join([plugin, *(f'"{path}"' for path in plugins)]))
    text = text.replace(json.dumps(options), json.dumps({**options, **(engine or {})}))
    script = folder / name
    script.write_text(text.replace('$here', str(QUICKSTART)))
    return script


def run_whole(
    command: list[str], *, timeout: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured output, but a command that takes too long ends with all of its children: the
    ranks of a training would go on by themselves, and take the cores of every test after it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as e:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        said = stdout[-3000:] + stderr[-3000:]
        raise TimeoutError(f'{" ".join(command[:3])} ... ran for more than {timeout:.0f} s. It said:\n{said}') from e
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope='session')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model after a few seconds of pre-training: it answers, mostly wrong."""
    target = tmp_path_factory.mktemp('model')
    for script, extra in (
        ('task.py', ['--train', '64', '--heldout', '8']),
        ('make_model.py', ['--steps', '60', '--eval-problems', '2', '--threads', '1']),
    ):
        subprocess.run([sys.executable, str(QUICKSTART / script), '--output', str(target), *extra], check=True)
    return target


@pytest.fixture(scope='session')
def environment(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith('TREEPO_')}
    env.update(
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        MODEL=str(model),
        DATASET=str(model / 'train.jsonl'),
        HF_HUB_OFFLINE='1',
        TRANSFORMERS_OFFLINE='1',
        USE_HF='1',
        SEED='1',
        # Two tests run at a time (tests/run.sh). Threads that wait for each other spin, and on a busy machine that
        # takes many times what they compute; vLLM would bind every engine to the same core.
        OMP_NUM_THREADS='1',
        VLLM_CPU_OMP_THREADS_BIND='nobind',
        # DeepSpeed compiles here. Where it usually does, the lock of a run that was killed while it compiled makes
        # every later run wait for good.
        TORCH_EXTENSIONS_DIR=str(tmp_path_factory.mktemp('torch_extensions')),
    )
    return env


@pytest.fixture(scope='session')
def serve(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Start quickstart's rollout.sh (or what `script` says) and return its port.

    Who asks for the same gets the same server: half of a test is its start. All end with the session.
    """
    yield from _serve(environment, tmp_path_factory)


@pytest.fixture(scope='module')
def serve_briefly(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., int]]:
    """As `serve`, but these servers end with the module: each takes 3 GiB."""
    yield from _serve(environment, tmp_path_factory)


def _serve(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
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
        return run_whole(
            ['bash', str(script), *args],
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
