"""What is uploaded: a wheel and a source archive that PyPI would take, and that work where nothing else is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archives import build

pytest.importorskip('build')
pytest.importorskip('twine')

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **options: object) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope='module')
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel, built from the source archive, and that archive."""
    return build(tmp_path_factory.mktemp('source'))


def test_pypi_would_take_both(archives, tmp_path):
    said = run(sys.executable, '-m', 'twine', 'check', '--strict', *archives, cwd=tmp_path)
    assert said.count('PASSED') == 2


def test_the_commands_work_from_a_wheel_in_an_empty_folder(archives, tmp_path):
    run(sys.executable, '-m', 'venv', 'venv', cwd=tmp_path)
    home = tmp_path / 'empty'
    home.mkdir()
    bare = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV') and 'TREEPO' not in k}
    run(tmp_path / 'venv/bin/pip', 'install', '-q', archives[0], cwd=home, env=bare)
    command = tmp_path / 'venv/bin/treepo-swift'
    plugin = Path(run(command, 'plugin', cwd=home, env=bare).strip())
    assert plugin.read_text() == (ROOT / 'plugin' / 'treepo_plugin.py').read_text()
    # A folder of its own: swift puts it into Python's path.
    assert [path.name for path in plugin.parent.iterdir() if path.suffix == '.py'] == ['treepo_plugin.py']
    assert 'segment_length' in run(command, 'config', '--reference', cwd=home, env=bare)
    doctor = subprocess.run([command, 'doctor'], cwd=home, env=bare, capture_output=True, text=True)
    assert doctor.returncode == 1 and 'ms-swift' in doctor.stdout
    assert list(home.iterdir()) == []


def test_nothing_is_printed_after_a_commands_result(tmp_path):
    """As nanobind does, which tells of leaks when the interpreter has ended."""
    code = (
        'import atexit, os, sys\n'
        'from treepo_swift.compat.quiet_exit import quiet_exit\n'
        'quiet_exit()\n'
        "atexit.register(lambda: print('an exit handler', file=sys.stderr))\n"
        "class Late:\n    def __del__(self):\n        os.write(2, b'leaked 4 instances')\n"
        'late = sys.modules["late"] = Late()\n'
        "print('result')\n"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == 'result\n' and result.stderr == 'an exit handler\n'
    failed = subprocess.run(
        [sys.executable, '-c', f'{code}\nraise ValueError("seen")'], capture_output=True, text=True, cwd=ROOT
    )
    assert failed.returncode == 1 and 'ValueError: seen' in failed.stderr and 'leaked' not in failed.stderr


def test_dockerfiles_are_well_made_and_copy_what_is_there(tmp_path):
    files = sorted((ROOT / 'docker').glob('*.Dockerfile'))
    assert [file.name for file in files] == ['cpu.Dockerfile', 'cuda.Dockerfile']
    linter = shutil.which('hadolint', path=str(Path(sys.executable).parent)) or pytest.skip('hadolint is not installed')
    run(linter, *files, cwd=tmp_path)
    for file in files:
        text = file.read_text()
        for line in re.findall(r'^COPY (.+)$', text, re.MULTILINE):
            assert all((ROOT / source).exists() for source in line.split()[:-1]), line
        for script in re.findall(r'bash ([\w/]+\.sh)|"bash", "([\w/]+\.sh)"', text):
            assert (ROOT / (script[0] or script[1])).is_file()
    # The pair is the one that is tested.
    cuda = files[1].read_text()
    pair = re.search(r'^pair=(\S+)x(\S+)$', (ROOT / 'scripts' / 'cpu_env.sh').read_text(), re.MULTILINE)
    assert f'ARG VLLM=v{pair[1]}\n' in cuda and f'ARG SWIFT={pair[2]}\n' in cuda
