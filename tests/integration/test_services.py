"""The quickstart leaves no process behind, whatever happens, and says which log to read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / 'examples' / 'quickstart'
sys.path.insert(0, str(QUICKSTART))
from treepo_swift.lab.services import Service, ServiceFailed, free_port


def alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_children_of_children_end_with_the_block(tmp_path):
    log = tmp_path / 'x.log'
    with pytest.raises(KeyboardInterrupt):
        with Service('It', ['bash', '-c', 'sleep 600 & echo $!; sleep 600'], log=log, env=dict(os.environ)) as service:
            assert wait_for(lambda: log.read_text().strip().isdigit())
            assert service.check() is None
            raise KeyboardInterrupt
    assert not alive(int(log.read_text())) and not alive(service.process.pid)


def test_an_early_end_names_status_and_log(tmp_path):
    log = tmp_path / 'x.log'
    with Service('The server', ['bash', '-c', 'echo out of memory; exit 3'], log=log, env=dict(os.environ)) as service:
        with pytest.raises(ServiceFailed, match=r'The server ended with status 3(.|\n)*out of memory(.|\n)*x.log'):
            service.wait_for_health(free_port(), timeout=30)


def test_run_ends_everything_on_a_polite_kill(tmp_path):
    """run.py with a server that never gets ready (a stub on PATH), killed as a job system would."""
    output = tmp_path / 'out'
    for path in (output / 'base' / 'model.safetensors', output / 'data' / 'train.jsonl'):
        path.parent.mkdir(parents=True)
        path.touch()
    (output / 'base-heldout.json').write_text('{"accuracy": 0.5}')
    code = f"""
import sys; sys.path.insert(0, {str(QUICKSTART)!r}); sys.argv = ["run.py", "--output", {str(output)!r}]
import run, pathlib; run.HERE = pathlib.Path({str(tmp_path)!r}); sys.exit(run.main())"""
    (tmp_path / 'rollout.sh').write_text('sleep 600 & echo $!; wait')
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    log = output / 'seed-42-steps-40' / 'rollout.log'
    assert wait_for(lambda: log.is_file() and log.read_text().strip().isdigit())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert 'no process is left' in process.stderr.read()
    assert not alive(int(log.read_text()))
