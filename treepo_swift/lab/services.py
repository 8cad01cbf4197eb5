"""Child processes that leave nothing behind: each in a process group of its own, its output in a log file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

GRACE_SECONDS = 10


class ServiceFailed(RuntimeError):
    """A child process ended when it should not have; the message names its log and shows its end."""


class Service:
    """A command with a log, as a context manager that ends the command and all of its children."""

    def __init__(self, name: str, command: list[str], *, log: Path, env: dict[str, str]) -> None:
        self.name, self.command, self.log, self.env = name, command, log, env

    def __enter__(self) -> Service:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open('w') as output:
            # A killed server can leave vLLM's engine and worker behind; a group is ended as a whole.
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.env,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and _group_lives(self.process):
                time.sleep(0.1)

    def check(self) -> int | None:
        """The exit status, None while it runs; raises `ServiceFailed` for any but 0."""
        status = self.process.poll()
        if status:
            raise ServiceFailed(
                f'{self.name} ended with status {status}. The end of its log:\n\n{self.tail()}\n\n'
                f'The whole log: {self.log}'
            )
        return status

    def tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors='replace').replace('\r', '\n').rstrip()
        return '\n'.join(line[:300] for line in text.splitlines()[-lines:])

    def wait_for_health(self, port: int, *, timeout: float) -> None:
        """Return when ``/health`` answers; raise `ServiceFailed` when the process ends or `timeout` seconds pass."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.check() is not None:
                raise ServiceFailed(f'{self.name} ended before it served anything. Its log: {self.log}')
            try:
                with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServiceFailed(f'{self.name} was not ready after {timeout:.0f} s. Its log: {self.log}')


def guarded(work: Callable[[], None], if_stopped: str) -> int:
    """Exit status of `work`: a service that failed or a user who stopped it ends with a message, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends the children too, like Ctrl-C
    try:
        work()
    except ServiceFailed as e:
        print(f'\n{e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'\nStopped; no process is left. {if_stopped}', file=sys.stderr)
        return 130
    return 0


def offline_environment(base: Path, data: Path) -> dict[str, str]:
    """Environment of the scripts here. The model is a local folder: nothing is to be looked up on a hub."""
    return {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'HF_HUB_OFFLINE': '1',
        'TRANSFORMERS_OFFLINE': '1',
        'USE_HF': '1',
        'MODEL': str(base),
        'DATASET': str(data),
        # torch's own port, so that two trainings on one machine do not meet.
        'MASTER_PORT': str(free_port()),
    }


def _group_lives(process: subprocess.Popen) -> bool:
    process.poll()  # reaps the leader, or the group would never be empty
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A port that nobody listens on now. swift takes the next free one silently when the asked one is busy."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
