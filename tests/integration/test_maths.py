"""Mathematical answers are checked where they can be stopped: a runaway one costs its time limit, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip('swift')
pytest.importorskip('math_verify')

from treepo_swift.compat.maths import MathsProcess, MathsProcesses
from treepo_swift.server.hooks import HookRunner

RUNAWAY = r'\boxed{9^{9^{9^{9}}}}'
"""One power in C, where no signal is heard."""


@pytest.fixture
def processes() -> Iterator[MathsProcesses]:
    made = MathsProcesses(1, seconds=3.0)
    yield made
    made.kill()


def test_answers_are_those_of_swift(processes):
    from swift.rewards.orm import MathAccuracy

    answers = [r'It is \boxed{\frac{1}{2}}', r'\boxed{0.5}', r'\boxed{2}', 'no idea', '\ud800', 'x' * 100_000]
    solutions = [r'\boxed{0.5}', r'\frac12', '1', '1', '1', '1']
    assert processes.check(answers, solutions) == MathAccuracy()(answers, solutions)


def test_a_runaway_answer_is_wrong_and_the_next_is_checked(processes):
    processes.check(['1'], ['1'])  # Now it has loaded.
    began = time.monotonic()
    assert processes.check([RUNAWAY, r'\boxed{3}'], [r'\boxed{1}', r'\boxed{3}']) == [0.0, 1.0]
    assert time.monotonic() - began < 60 and processes.killed == 1


def test_a_process_that_dies_is_named_and_another_takes_its_place(processes):
    process = MathsProcess()
    process.check('1', '1', 60)
    process._process.kill()
    process._process.wait()
    assert process.check(r'\boxed{3}', r'\boxed{3}', 60) == 1.0
    process.kill()


def test_a_check_that_is_never_done_is_killed(monkeypatch, tmp_path):
    """Whatever it does: here it does not even listen to a polite signal."""
    worker = tmp_path / 'worker.py'
    worker.write_text(
        textwrap.dedent("""
        import signal, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for line in sys.stdin:
            if 'hang' in line:
                while True: pass
            print('{"reward": 1.0}', flush=True)
        """)
    )
    monkeypatch.setattr('treepo_swift.compat.maths.WORKER', worker)
    monkeypatch.setattr('treepo_swift.compat.maths.START_SECONDS', 5.0)
    processes = MathsProcesses(1, seconds=0.3)
    assert processes.check(['a', 'hang', 'b'], ['1'] * 3) == [1.0, 0.0, 1.0] and processes.killed == 1
    (process,) = processes._idle.queue
    child = process._process
    processes.kill()
    assert child.poll() is not None


def test_a_worker_ends_with_the_process_that_started_it():
    """By the end of its input where it waits; where it computes, by its CPU limit."""
    program = """
import os
from treepo_swift.compat.maths import MathsProcess
process = MathsProcess()
process.check('1', '1', 60)
print(process._process.pid, flush=True)
os._exit(0)
"""
    pid = int(subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120).stdout)
    deadline = time.monotonic() + 20
    while subprocess.run(['kill', '-0', str(pid)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_swifts_check_goes_there_from_a_hook_and_nowhere_else(monkeypatch, processes):
    from swift.rewards.orm import MathAccuracy

    runner = HookRunner()
    monkeypatch.setattr('treepo_swift.compat.maths.shared_processes', lambda: processes)
    asked = []
    monkeypatch.setattr(processes, 'check', lambda *args: asked.append(args) or [1.0])
    accuracy = MathAccuracy()

    def hook() -> list[float]:
        assert threading.current_thread() is not threading.main_thread()
        return accuracy(['1'], ['1'])

    assert asyncio.run(runner.call(hook, timeout=60.0, where='here')) == [1.0] and len(asked) == 1
    assert accuracy([r'\boxed{1}'], [r'\boxed{1}']) == [1.0] and len(asked) == 1
