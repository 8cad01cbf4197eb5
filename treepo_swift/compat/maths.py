"""Checks mathematical answers of hooks in processes of their own, which can be killed.

What a model writes may keep sympy busy for good. A thread that does so can't be ended, and holds the interpreter's
lock, so that one answer would stop the server: `math_verify`'s own time limit needs a main thread.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import LifoQueue
from typing import Any

logger = logging.getLogger(__name__)

SECONDS = 20.0
"""For one answer. math_verify allows itself 15: 5 for each of the two that it parses, and 5 to compare them."""
START_SECONDS = 60.0
"""For a process to load sympy, beside its first answer."""
PROCESSES = min(4, os.cpu_count() or 1)
WORKER = Path(__file__).with_name('maths_worker.py')
_MARK = '_treepo_process'


class MathsProcess:
    """One process; it is started by the first check, and again after one that had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def check(self, completion: str, solution: str, seconds: float) -> float:
        """Raises `TimeoutError`, or `RuntimeError` with what the check raised."""
        fresh = self._process is None or self._process.poll() is not None
        if fresh:
            # -P: the folder of the worker is none to import from.
            self._process = subprocess.Popen(
                [sys.executable, '-P', str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding='ascii',
            )
        job = json.dumps({'completion': completion, 'solution': solution, 'seconds': seconds})
        try:
            answer = json.loads(self._ask(job, seconds + START_SECONDS * fresh))
        except TimeoutError:
            self.kill()
            raise
        except (OSError, ValueError):
            code = self.kill()
            raise RuntimeError(f'the process that checks mathematical answers ended with status {code}') from None
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return float(answer['reward'])

    def _ask(self, job: str, seconds: float) -> str:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(job + '\n')
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        return process.stdout.readline()

    def kill(self) -> int | None:
        """End the process at once, whatever it does; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:
                pass  # What was not written can't be.
        return code


class MathsProcesses:
    """At most `count` of them, which threads share. An answer that takes too long is a wrong one, as in swift."""

    def __init__(self, count: int = PROCESSES, seconds: float = SECONDS) -> None:
        self._idle: LifoQueue[MathsProcess] = LifoQueue()
        for _ in range(count):
            self._idle.put(MathsProcess())
        self._seconds = seconds
        self.killed = 0

    def check(self, completions: Sequence[str], solutions: Sequence[str]) -> list[float]:
        """A reward for each completion, 1.0 or 0.0."""
        return [self._check(*pair) for pair in zip(completions, solutions, strict=True)]

    def _check(self, completion: str, solution: str) -> float:
        process = self._idle.get()
        began = time.monotonic()
        try:
            return process.check(completion, solution, self._seconds)
        except TimeoutError:
            self.killed += 1
            logger.warning(
                'treepo: checking a mathematical answer took more than %.0f s, and its process was killed. The answer '
                'counts as wrong; that was number %d.',
                time.monotonic() - began,
                self.killed,
            )
            return 0.0
        finally:
            self._idle.put(process)

    def kill(self) -> None:
        """End those that are idle."""
        processes = [self._idle.get() for _ in range(self._idle.qsize())]
        for process in processes:
            process.kill()
            self._idle.put(process)


@functools.cache
def shared_processes() -> MathsProcesses:
    return MathsProcesses()


def check_maths_in_processes() -> None:
    """Let swift's `MathAccuracy` do so outside main threads, where there is no other way to stop it.

    With it `MathTipsScheduler` and gym environments that use it. In main threads nothing changes.
    """
    if importlib.util.find_spec('math_verify') is None or importlib.util.find_spec('swift') is None:
        return
    cls: Any = getattr(importlib.import_module('swift.rewards.orm'), 'MathAccuracy', None)
    if cls is not None and not hasattr(cls.__call__, _MARK):
        cls.__call__ = _in_process_outside_main_thread(cls.__call__)


def _in_process_outside_main_thread(check: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(check)
    def call(self: Any, completions: Sequence[str], solution: Sequence[str], **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return check(self, completions, solution, **kwargs)
        return shared_processes().check(completions, solution)

    setattr(call, _MARK, True)
    return call
