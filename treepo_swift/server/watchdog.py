"""Turns a rollout that stands still into an error that says where it stands.

For trees in the trainer's process: there a hang is a training that says nothing any more, on all ranks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from .failures import RolloutError

T = TypeVar('T')

LOOKS = 10
"""How often the watchdog looks within the time that it allows."""
GRACE_SECONDS = 5.0
"""How long what stands still may take to end when it is cancelled."""
SHOWN = 5
"""Places that an error names."""
EXIT_STATUS = 70
"""Of a process that could only be ended."""


class RolloutStalled(RolloutError):
    """A rollout made no progress for longer than `faults.stall_timeout`."""


def where_tasks_wait() -> Counter[str]:
    """The places at which tasks of the running loop wait, ours excepted: how many tasks at each."""
    mine = asyncio.current_task()
    return Counter(_innermost(task.get_coro()) for task in asyncio.all_tasks() if task is not mine)


def _innermost(waiting: Any) -> str:
    """Where a coroutine, or what it awaits, stands."""
    place = 'somewhere'
    while waiting is not None:
        frame = getattr(waiting, 'cr_frame', None) or getattr(waiting, 'ag_frame', None)
        if frame is not None:
            code = frame.f_code
            place = f'{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})'
        waiting = getattr(waiting, 'cr_await', None) or getattr(waiting, 'ag_await', None)
    return place


class Watchdog:
    """Guards one rollout at a time.

    Two things can stand still. Where the event loop runs and nothing comes of it (`progress` does not change), the
    rollout is cancelled and `RolloutStalled` names what its tasks wait for. Where the loop itself stands, in a step of
    the engine or in an async hook that blocks, nobody can raise an error there: a thread writes down where it stands
    and ends the process, so that a launcher ends the other ranks.
    """

    def __init__(self, seconds: float, progress: Callable[[], object], describe: Callable[[], str]) -> None:
        """`progress` is anything that changes while the rollout goes on; `describe` says what is under way."""
        self._seconds = seconds
        self._progress = progress
        self._describe = describe
        self._beat = time.monotonic()
        """When the event loop was last seen to run."""

    async def guard(self, rollout: Coroutine[Any, Any, T]) -> T:
        """What `rollout` returns or raises. Nothing of it is alive then."""
        ended = threading.Event()
        self._beat = time.monotonic()
        thread = threading.Thread(
            target=self._watch_loop, args=(ended, threading.get_ident()), name='treepo-watchdog', daemon=True
        )
        thread.start()
        task = asyncio.ensure_future(rollout)
        try:
            await self._watch(task)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=GRACE_SECONDS)
            ended.set()
            thread.join()

    async def _watch(self, task: asyncio.Future[Any]) -> None:
        """Return when `task` has ended; raise where it has stood still for too long."""
        seen, since = self._progress(), time.monotonic()
        while not task.done():
            await asyncio.wait({task}, timeout=self._seconds / LOOKS)
            now = self._beat = time.monotonic()
            if (progress := self._progress()) != seen:
                seen, since = progress, now
            elif not task.done() and now - since > self._seconds:
                places = ''.join(f'\n  {n} x {place}' for place, n in where_tasks_wait().most_common(SHOWN))
                raise RolloutStalled(
                    f'The rollout has made no progress for faults.stall_timeout={self._seconds:g} s. '
                    f'{self._describe()} Its tasks wait at:{places}'
                )

    def _watch_loop(self, ended: threading.Event, thread: int) -> None:
        while not ended.wait(self._seconds / LOOKS):
            if time.monotonic() - self._beat > self._seconds:
                frame = sys._current_frames().get(thread)
                stack = ''.join(traceback.format_stack(frame)) if frame else '(its thread has ended)'
                print(
                    f'treepo: the rollout has stood in one place for faults.stall_timeout={self._seconds:g} s, where '
                    f'no error can be raised. {self._describe()} This process ends now. It stood at:\n{stack}',
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_STATUS)
