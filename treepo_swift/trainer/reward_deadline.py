"""What ends a reward function that does not return.

On the main thread a signal raises `RewardTimeout` in it: that reaches loops in Python, sleeps, and waits for sockets,
locks and processes. An async function is cancelled by its event loop. What ignores that, or is in C code, can only be
ended with its process. C code that never gives the interpreter's lock back lets no thread of ours run; there
faulthandler's thread, which needs no lock, writes the stack and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 10.0
"""How long a function may take to end when it was told to."""
EXIT_STATUS = 70
"""Of a process that could only be ended."""
SIGNAL = signal.SIGURG
"""Does nothing where nobody handles it, so one that comes late hurts nobody; math_verify has SIGALRM, SLURM SIGUSR1."""


class RewardTimeout(BaseException):
    """Raised in a reward function whose time is up. No `Exception`, or one that tries again for ever would catch it."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Within the block another thread may call what this yields: it raises `RewardTimeout` there.

    On other threads than the main one, where no signal is handled, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    thread, within, asked = threading.get_ident(), True, False

    def stop(number: int, frame: FrameType | None) -> None:
        if within and asked:  # the kernel sends it too, for a socket that wants it
            raise RewardTimeout

    def interrupt() -> None:
        nonlocal asked
        asked = True
        signal.pthread_kill(thread, SIGNAL)

    before = signal.signal(SIGNAL, stop)
    try:
        yield interrupt
    finally:
        within = False
        signal.signal(SIGNAL, before or signal.SIG_DFL)


class LastResort:
    """Ends the process where a function holds the interpreter's lock for good. Async functions run side by side.

    faulthandler has one timer for a process: one that somebody else has set is lost.
    """

    def __init__(self) -> None:
        self._running = 0

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        try:
            stderr = sys.__stderr__.fileno() if sys.__stderr__ else 2
        except (OSError, ValueError):
            stderr = 2
        faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                faulthandler.cancel_dump_traceback_later()


def end_process(message: str) -> None:
    print(f'treepo: {message}', file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)


def stack_of(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return ''.join(traceback.format_stack(frame)) if frame else '(its thread has ended)'


def wait_for_exit() -> None:
    """Return when the interpreter shuts down, which waits for threads that are no daemons."""
    while True:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        if frame is None or frame.f_code is threading._shutdown.__code__:  # type: ignore[attr-defined]
            return
        time.sleep(1)
