"""Watches reward functions: one that raises ends the training on all ranks with its name, one that hangs is named too.

swift gathers the rewards of all ranks. Where a function raised on one of them, the others would wait there for good.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from treepo_swift.core.inert import one_line

SLOW_SECONDS = 60.0
"""After so many seconds in one function, and again after each as many, a warning says where it stands."""


class RewardWatch:
    """Of one batch on one rank. `errors` says what its reward functions did wrong."""

    def __init__(self, warn: Callable[[str], None], slow_seconds: float = SLOW_SECONDS) -> None:
        self.errors: list[str] = []
        self._warn = warn
        self._slow_seconds = slow_seconds

    def watched(self, functions: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The same functions, none of which raises. Reward models are swift's own business."""
        return [self._wrapped(function, name) for function, name in zip(functions, names)]

    def _wrapped(self, function: Any, name: str) -> Any:
        if isinstance(function, torch.nn.Module):
            return function
        is_async = any(map(asyncio.iscoroutinefunction, (function, getattr(function, '__call__', None))))  # noqa: B004

        async def ask_async(completions: Sequence[str], **kwargs: Any) -> list[Any]:
            try:
                with self._timed(name):
                    return checked_rewards(await function(completions, **kwargs), len(completions))
            except (Exception, SystemExit) as e:
                return self._failed(name, e, len(completions))

        def ask(completions: Sequence[str], **kwargs: Any) -> list[Any]:
            try:
                with self._timed(name):
                    return checked_rewards(function(completions, **kwargs), len(completions))
            except (Exception, SystemExit) as e:
                return self._failed(name, e, len(completions))

        return ask_async if is_async else ask

    def _failed(self, name: str, error: BaseException, count: int) -> list[float]:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = '' if frame is None else f' at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}'
        problem = one_line(f'raised {type(error).__name__}: {error}', 500)
        if isinstance(error, _WrongRewards):
            problem, place = str(error), ''
        self.errors.append(f'Reward function {name!r} {problem}{place}, for a batch of {count} completions.')
        return [0.0] * count

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        ended, caller = threading.Event(), threading.get_ident()

        def watch() -> None:
            waited = 0.0
            while not ended.wait(self._slow_seconds):
                waited += self._slow_seconds
                self._warn(
                    f'treepo: reward function {name!r} has been running for {waited:g} s, and the training waits for '
                    f'it. {_where(caller)} Give what it waits for a time limit of its own.'
                )

        thread = threading.Thread(target=watch, name='treepo-rewards', daemon=True)
        thread.start()
        try:
            yield
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
    trainer: Any, warn: Callable[[str], None], gather: Callable[[list[Any]], list[Any]]
) -> Iterator[None]:
    """Within the block `trainer.reward_funcs` are watched; at its end all ranks raise where one of theirs failed.

    All ranks go through it at the same time. `gather` puts the ranks' lists one behind the other, on every rank.
    """
    functions, watch = trainer.reward_funcs, RewardWatch(warn)
    trainer.reward_funcs = watch.watched(functions, trainer.reward_func_names)
    try:
        yield
    finally:
        trainer.reward_funcs = functions
    for rank, errors in enumerate(gather([watch.errors])):
        if errors:
            raise RuntimeError(
                f'{errors[0]} That was on rank {rank}; the training ends on all of them. Mend the function, and resume '
                'from the last checkpoint.'
            )


def _where(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ''
    code = frame.f_code
    return f'It stands at {Path(code.co_filename).name}:{frame.f_lineno}, in {code.co_qualname}.'
