"""Planted faults: the doctor finds each, and says what to do."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from treepo_swift.cli import doctor
from treepo_swift.compat import versions
from treepo_swift.lab.doctor import machine, packages
from treepo_swift.lab.doctor.command import check_command
from treepo_swift.lab.doctor.finding import Finding, run_checks
from treepo_swift.plugin import FILE

Usage = namedtuple('Usage', 'total used free')
ROLLOUT = (
    f'swift rollout --model m --external_plugins {FILE} --multi_turn_scheduler treepo --vllm_use_async_engine true '
    '--host 127.0.0.1 --port {port}'
)
TRAINING = (
    f'swift rlhf --rlhf_type grpo --model m --external_plugins {FILE} --use_vllm true --vllm_mode server '
    '--vllm_server_host 127.0.0.1 --vllm_server_group_port {port} --max_completion_length 1024'
)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def findings(command: str) -> list[Finding]:
    return list(run_checks([('command', lambda: check_command(command.split()))]))


def bad(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.status != 'ok']


def only(found: list[Finding], status: str, said: str, fix: str) -> None:
    """Nothing but this is wrong."""
    (finding,) = bad(found)
    assert finding.status == status and said in finding.said and fix in finding.fix, finding


@pytest.mark.parametrize('command', [ROLLOUT, TRAINING], ids=['rollout', 'training'])
def test_a_good_command_is_found_good(command, port):
    assert bad(findings(command.format(port=port))) == []


def test_a_port_that_is_taken(port):
    with socket.create_server(('127.0.0.1', port)):
        only(findings(ROLLOUT.format(port=port)), 'FAIL', f'{port} (the server) is taken', 'choose another port')
        only(findings(TRAINING.format(port=port)), 'FAIL', f'{port} (weights', 'choose another port')


@pytest.mark.parametrize(
    'command, old, new, status, said, fix',
    [
        (ROLLOUT, '--vllm_use_async_engine true', '', 'FAIL', 'asynchronous engine', '--vllm_use_async_engine true'),
        (ROLLOUT, '--multi_turn_scheduler treepo', '', 'FAIL', 'grows no trees', '--multi_turn_scheduler treepo'),
        (ROLLOUT, '--host 127.0.0.1', '--host 0.0.0.0', 'warn', 'can replace the weights', 'docs/gpu.md'),
        (ROLLOUT, '--host', '--hosst', 'FAIL', 'does not know --hosst 127.0.0.1', 'spelling'),
        (
            TRAINING,
            '--use_vllm',
            '--multi_turn_scheduler treepo --use_vllm',
            'warn',
            'does nothing here',
            'leave it out',
        ),
        (TRAINING, '--rlhf_type grpo', '--rlhf_type dpo', 'FAIL', 'trees are for GRPO', '--rlhf_type grpo'),
        (TRAINING, '--use_vllm true', '--use_vllm false', 'FAIL', 'on vLLM only', '--use_vllm true'),
        (
            TRAINING,
            'server --vllm',
            'colocate --vllm',
            'FAIL',
            'this run grows no trees',
            '--multi_turn_scheduler treepo',
        ),
        (TRAINING, str(FILE), 'nowhere.py', 'FAIL', 'nowhere.py is no file', 'treepo-swift plugin'),
    ],
)
def test_faults_of_a_command(command, old, new, status, said, fix, port):
    assert command.count(old) == 1
    found = bad(findings(command.replace(old, new).format(port=port)))
    assert any(f.status == status and said in f.said and fix in f.fix for f in found), found


def test_two_schedulers_of_one_name(tmp_path, port):
    """ms-swift's own example plugin beside ours."""
    other = tmp_path / 'theirs.py'
    other.write_text("multi_turns['tree_rollout_scheduler'] = object\n")
    command = ROLLOUT.format(port=port).replace(str(FILE), f'{FILE} {other}')
    only(findings(command), 'FAIL', f'{other} registers a scheduler under the name', 'leave that file out')


def test_a_plugin_file_that_hides_the_package(tmp_path, port):
    copy = tmp_path / 'treepo_swift.py'
    shutil.copy(FILE, copy)
    only(findings(ROLLOUT.format(port=port).replace(str(FILE), str(copy))), 'FAIL', 'hides a package', 'rename it')


def test_a_tree_that_does_not_fit_the_model(tmp_path, port, monkeypatch):
    (tmp_path / 'config.json').write_text('{"max_position_embeddings": 2048}')
    monkeypatch.setenv('TREEPO_SEGMENT_LENGTH', '512')
    monkeypatch.setenv('TREEPO_MAX_DEPTH', '8')
    command = ROLLOUT.format(port=port).replace('--model m', f'--model {tmp_path}')
    only(findings(command), 'FAIL', f'4096 tokens is over the context of {tmp_path} = 2048', 'mend it there')


def test_segments_that_do_not_fit_the_kv_block(port, monkeypatch):
    monkeypatch.setenv('TREEPO_SEGMENT_LENGTH', '100')
    command = ROLLOUT.format(port=port) + ' --vllm_engine_kwargs {"block_size":32}'
    only(findings(command), 'warn', 'segment_length 100 is no multiple of the KV block of 32', 'segment_length: 96')


def test_an_unknown_setting(port, monkeypatch):
    monkeypatch.setenv('TREEPO_SEGMENT_LENGHT', '64')
    only(findings(ROLLOUT.format(port=port)), 'FAIL', 'TREEPO_SEGMENT_LENGHT', '--reference')


def test_missing_old_and_untested_packages(monkeypatch):
    monkeypatch.setattr(versions, 'installed_version', lambda name: {'vllm': '0.19.0'}.get(name))
    found = {f.name: f for f in packages.packages()}
    assert found['ms-swift'].status == 'FAIL' and 'not installed' in found['ms-swift'].said
    assert found['vllm'].status == 'warn' and '0.19.0 is outside >=0.20.2' in found['vllm'].said
    monkeypatch.setattr(versions, 'installed_version', lambda name: '99.0' if name == 'vllm' else '4.6.0')
    monkeypatch.setattr(packages.metadata, 'version', lambda name: '0.1')
    found = {f.name: f for f in packages.packages()}
    assert found['pair'].status == 'warn' and found['torch'].status == 'warn' and 'pip install' in found['torch'].fix


def test_a_gpu_build_of_vllm_without_a_gpu(monkeypatch):
    monkeypatch.setattr('treepo_swift.compat.cpu.is_cpu_only', lambda: True)
    monkeypatch.setattr(packages.metadata, 'distributions', lambda: [SimpleNamespace(metadata={'Name': 'vllm'})])
    finding = packages.accelerator()
    assert finding.status == 'FAIL' and 'GPU build' in finding.said and 'cpu_env.sh' in finding.fix


def test_a_torchvision_that_does_not_load(monkeypatch):
    monkeypatch.setattr('treepo_swift.compat.cpu.is_cpu_only', lambda: True)
    monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    finding = packages.torchvision()
    assert finding.status == 'FAIL' and 'pip uninstall torchvision' in finding.fix


def test_a_file_that_hides_a_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packages.name_clashes().status == 'ok'
    (tmp_path / 'swift.py').write_text('')
    finding = packages.name_clashes()
    assert (
        finding.status == 'FAIL' and 'swift.py hides the package swift' in finding.said and finding.fix == 'rename it'
    )


def test_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda path: Usage(1, 1, 64 * 2**20))
    assert machine.disk(tmp_path / 'not' / 'yet').status == 'warn'
    assert machine.shared_memory().status == 'warn' and '--ipc=host' in machine.shared_memory().fix
    monkeypatch.setattr(machine, 'LITTLE_MEMORY', 2**60)
    assert machine.memory().status == 'warn'


def test_a_check_that_raises_is_a_finding():
    def broken() -> Finding:
        raise ValueError('who knows')

    (finding,) = run_checks([('odd', broken)])
    assert finding.status == 'FAIL' and finding.said == 'ValueError: who knows'


def test_json_and_the_exit_status(capsys, port, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checks = [('python', packages.python)]
    monkeypatch.setattr(packages, 'checks', lambda: checks)
    args: Any = SimpleNamespace(json=True, started=['--', *ROLLOUT.format(port=port).split()])
    assert doctor.run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert {'name': 'python', 'status': 'ok', 'said': sys.version.split()[0], 'fix': ''} in found
    args.started = ['--', 'swift', 'train']
    assert doctor.run(args) == 1
    assert any(f['status'] == 'FAIL' and 'swift rollout ...' in f['fix'] for f in json.loads(capsys.readouterr().out))


def test_this_machine_is_fit(capsys, tmp_path, monkeypatch):
    """The whole of it, where the tests run: a failure here is one of the installation."""
    monkeypatch.chdir(tmp_path)
    status = doctor.run(SimpleNamespace(json=False, started=[]))
    said = capsys.readouterr().out
    assert status == 0 and 'registers the schedulers treepo' in said, said
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
