"""The quickstart by the wheel: in a folder that holds the example alone, nothing of the repository can be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.archives import build
from tests.e2e.conftest import QUICKSTART, ROOT, run_whole

pytest.importorskip('build')
pytestmark = pytest.mark.skipif(not os.environ.get('LONG'), reason='two minutes: LONG=1 runs it')

SWIFT = '#!{python}\nimport sys\n\nfrom swift.cli.main import cli_main\n\nsys.exit(cli_main())\n'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (made,) = build(tmp_path_factory.mktemp('source'), '--wheel')
    return made


@pytest.fixture
def python(wheel: Path, tmp_path: Path) -> Path:
    """An environment with the wheel. The extra's packages are those that are installed here: they are gigabytes."""
    # With PYTHONPATH pip sees what a build left beside the repository's package, and installs nothing.
    bare = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run([sys.executable, '-m', 'venv', 'venv'], cwd=tmp_path, check=True)
    found = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([found, '-m', 'pip', 'install', '-q', '--no-deps', wheel], cwd=tmp_path, check=True, env=bare)
    site = subprocess.run(
        [found, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True, capture_output=True
    )
    # A folder that a .pth names comes last, and .pth files there, such as the repository's own, are not read.
    Path(site.stdout.decode().strip(), 'here.pth').write_text(sysconfig.get_path('purelib') + '\n')
    swift = found.with_name('swift')
    swift.write_text(SWIFT.format(python=found))
    swift.chmod(0o755)
    return found


def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(python, model, environment, tmp_path):
    folder = tmp_path / 'empty'
    shutil.copytree(QUICKSTART, folder / 'quickstart', ignore=shutil.ignore_patterns('__pycache__'))
    output = folder / 'output'
    # The model is there, made by the same scripts in less time; what it solves is of no interest here.
    shutil.copytree(model, output / 'base')
    shutil.copytree(model, output / 'data')
    (output / 'base-heldout.json').write_text('{"accuracy": 0.0}')
    env = {k: v for k, v in environment.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'MODEL', 'DATASET')}
    env['PATH'] = f'{python.parent}{os.pathsep}{os.environ["PATH"]}'

    def says(*command: str | Path) -> Path:
        done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())

    installed = says(python, '-c', 'import treepo_swift; print(treepo_swift.__file__)')
    plugin = says(python.with_name('treepo-swift'), 'plugin')
    assert installed.is_relative_to(tmp_path / 'venv') and plugin.is_relative_to(tmp_path / 'venv')
    command = ['env', '-C', folder, python, 'quickstart/run.py', '--output', output, '--steps', '1']
    done = run_whole(list(map(str, command)), timeout=400, env=env)
    logs = '\n'.join(log.read_text()[-3000:] for log in output.rglob('*.log'))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    # Both processes took the wheel's plugin file, and the last thing on the screen is the result.
    run = output / 'seed-42-steps-1'
    assert all(str(plugin) in (run / name).read_text() for name in ('rollout.log', 'train.log'))
    assert str(ROOT / 'treepo_swift') not in logs
    assert done.stdout.rstrip().splitlines()[-1].startswith('  time')
