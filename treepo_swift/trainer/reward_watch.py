"""Watches reward functions: one that raises or hangs ends the training on all ranks, with its name.

swift gathers the rewards of all ranks. Where a function raised on one of them, the others would wait there for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from treepo_swift.core.inert import one_line

from . import reward_deadline
from .reward_deadline import (
    GRACE_SECONDS,
    LastResort,
    RewardTimeout,
    end_process,
    interruptible,
    stack_of,
    wait_for_exit,
)

SLOW_SECONDS = 60.0
"""After so many seconds in one function, and again after each as many, a warning says where it stands."""


class RewardWatch:
    """Of one batch on one rank. `errors` says what its reward functions did wrong."""

    def __init__(
        self,
        warn: Callable[[str], None],
        timeout: float | None = None,
        *,
        slow_seconds: float = SLOW_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        end: Callable[[str], None] = end_process,
    ) -> None:
        """A function may run for `timeout` seconds. `end` ends the process; tests give another."""
        self.errors: list[str] = []
        self.left = threading.Event()
        """Set when all ranks have their rewards."""
        self._warn = warn
        self._timeout = timeout
        self._slow_seconds = slow_seconds
        self._grace_seconds = grace_seconds
        self._end = end
        self._last_resort = LastResort()
        self._functions = 1

    def watched(self, functions: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The same functions, none of which raises. Reward models are swift's own business."""
        self._functions = len(functions)
        return [self._wrapped(function, name) for function, name in zip(functions, names)]

    def _wrapped(self, function: Any, name: str) -> Any:
        if isinstance(function, torch.nn.Module):
            return function
        is_async = any(map(asyncio.iscoroutinefunction, (function, getattr(function, '__call__', None))))  # noqa: B004

        async def ask_async(completions: Sequence[str], **kwargs: Any) -> list[Any]:
            scope = asyncio.timeout(self._timeout)
            try:
                with self._timed(name, lambda: None):
                    async with scope:
                        rewards = await function(completions, **kwargs)
                    if scope.expired():
                        raise RewardTimeout
                return checked_rewards(rewards, len(completions))
            except (Exception, SystemExit, RewardTimeout) as e:
                if scope.expired():
                    e = RewardTimeout().with_traceback((e.__cause__ or e).__traceback__)
                return self._failed(name, e, len(completions))

        def ask(completions: Sequence[str], **kwargs: Any) -> list[Any]:
            try:
                with interruptible() as interrupt, self._timed(name, interrupt):
                    rewards = function(completions, **kwargs)
                return checked_rewards(rewards, len(completions))
            except (Exception, SystemExit, RewardTimeout) as e:
                return self._failed(name, e, len(completions))

        return ask_async if is_async else ask

    def _failed(self, name: str, error: BaseException, count: int) -> list[float]:
        problem = one_line(f'raised {type(error).__name__}: {error}', 500) + _place(error)
        if isinstance(error, _WrongRewards):
            problem = str(error)
        told = ''
        if isinstance(error, RewardTimeout):
            problem = f'was stopped after faults.reward_timeout={self._timeout:g} s{_place(error)}'
            told = ' Give what it waits for a time limit of its own, or raise faults.reward_timeout.'
        message = f'Reward function {name!r} {problem}, for a batch of {count} completions.{told}'
        self.errors.append(message)
        if isinstance(error, RewardTimeout):
            threading.Thread(target=self._see_it_end, args=(message,), name='treepo-rewards-end', daemon=True).start()
        return [0.0] * count

    def _see_it_end(self, message: str) -> None:
        """Threads that a stopped function left behind keep the process alive: asyncio and the interpreter wait for
        them. Other functions, here and on other ranks, may need their whole time."""
        assert self._timeout is not None
        if self.left.wait(self._timeout * self._functions + self._grace_seconds):
            wait_for_exit()  # which comes of the error that all ranks have raised
            time.sleep(self._grace_seconds)
            message = 'A reward function was stopped.'
        self._end(f'{message} Threads that it left behind do not end, so this process ends now.')

    @contextmanager
    def _timed(self, name: str, interrupt: Callable[[], None]) -> Iterator[None]:
        """Warn of what is slow. When its time is up, `interrupt` it, and end the process where that does not help."""
        ended, expired, caller = threading.Event(), threading.Event(), threading.get_ident()
        limit = math.inf if self._timeout is None else self._timeout

        def watch() -> None:
            waited = 0.0
            while waited < limit:
                step = min(self._slow_seconds, limit - waited)
                if ended.wait(step):
                    return
                waited += step
                if waited < limit:
                    self._warn(
                        f'treepo: reward function {name!r} has been running for {waited:g} s, and the training waits '
                        f'for it. {_where(caller)} Give what it waits for a time limit of its own.'
                    )
            expired.set()
            until = time.monotonic() + self._grace_seconds
            while time.monotonic() < until:
                interrupt()
                if ended.wait(min(1.0, self._grace_seconds)):
                    return
            self._end(
                f'reward function {name!r} has been running for {limit + self._grace_seconds:g} s, more than '
                f'faults.reward_timeout={limit:g} s allows, and can not be interrupted. This process ends now, and its '
                'launcher ends the other ranks. Mend the function (what it waits for needs a time limit of its own) or '
                f'raise faults.reward_timeout, and resume from the last checkpoint. It stood at:\n{stack_of(caller)}'
            )

        thread = threading.Thread(target=watch, name='treepo-rewards', daemon=True)
        thread.start()
        try:
            with self._last_resort.after(limit + 2 * self._grace_seconds) if self._timeout else nullcontext():
                yield
            if expired.is_set():
                raise RewardTimeout  # it caught that, and what it returned instead may be anything
        finally:
            ended.set()
            thread.join()


class _WrongRewards(ValueError):
    """What a reward function returned is no list of rewards."""


def checked_rewards(rewards: Any, count: int) -> list[Any]:
    """As a list of `count` numbers, or None where a function has nothing to say."""
    try:
        values = [None if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError):
        raise _WrongRewards(f'returned {one_line(repr(rewards), 200)}, allowed is a list of numbers or None') from None
    if len(values) != count:
        raise _WrongRewards(f'returned {len(values)} rewards for {count} completions')
    return values


@contextmanager
def watched_rewards(
    trainer: Any,
    warn: Callable[[str], None],
    gather: Callable[[list[Any]], list[Any]],
    timeout: float | None = None,
) -> Iterator[None]:
    """Within the block `trainer.reward_funcs` are watched; at its end all ranks raise where one of theirs failed.

    A function may take `timeout` seconds. All ranks go through it at the same time. `gather` puts the ranks' lists one
    behind the other, on every rank.
    """
    functions, watch = trainer.reward_funcs, RewardWatch(warn, timeout)
    trainer.reward_funcs = watch.watched(functions, trainer.reward_func_names)
    try:
        yield
    finally:
        trainer.reward_funcs = functions
        watch.left.set()
    for rank, errors in enumerate(gather([watch.errors])):
        if errors:
            raise RuntimeError(
                f'{errors[0]} That was on rank {rank}; the training ends on all of them. Mend the function, and resume '
                'from the last checkpoint.'
            )


def _place(error: BaseException) -> str:
    """Where it was raised, and where in the function that was, if that is another file."""
    ours = (__file__, reward_deadline.__file__, contextlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
    if not frames:
        return ''
    inner, own = frames[-1], [f for f in frames if f.filename == frames[0].filename][-1]
    places = dict.fromkeys(f'{Path(f.filename).name}:{f.lineno}' for f in (inner, own))
    return f' at {" below ".join(places)}'


def _where(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ''
    code = frame.f_code
    return f'It stands at {Path(code.co_filename).name}:{frame.f_lineno}, in {code.co_qualname}.'
