"""Reward functions that do not return: each kind of waiting ends, on all ranks, with the function's name."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')
pytest.importorskip('vllm')

from tests.integration.test_trainer import FLAT, advantages, build_trainer
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.trainer.reward_deadline import EXIT_STATUS, SIGNAL
from treepo_swift.trainer.reward_watch import RewardWatch

ROOT = Path(__file__).parents[2]
PLACE = r' at test_reward_deadline.py:\d+'
Completions = list[str]


def loops(completions: Completions, **kwargs: Any) -> Any:
    while True:
        pass


def sleeps(completions: Completions, **kwargs: Any) -> Any:
    time.sleep(600)


def waits_for_a_lock(completions: Completions, **kwargs: Any) -> Any:
    threading.Event().wait()


def waits_for_a_server(completions: Completions, **kwargs: Any) -> Any:
    here, there = socket.socketpair()
    here.recv(1)


def tries_again(completions: Completions, **kwargs: Any) -> Any:
    while True:
        try:
            time.sleep(600)
        except Exception:
            continue


def makes_something_up(completions: Completions, **kwargs: Any) -> Any:
    try:
        time.sleep(600)
    except:  # noqa: E722
        return [1.0] * len(completions)


async def sleeps_async(completions: Completions, **kwargs: Any) -> Any:
    await asyncio.sleep(600)


async def makes_something_up_async(completions: Completions, **kwargs: Any) -> Any:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        return [1.0] * len(completions)


PLACES = {
    loops: PLACE,
    sleeps: PLACE,
    waits_for_a_lock: r' at threading.py:\d+ below test_reward_deadline.py:\d+',
    waits_for_a_server: PLACE,
    tries_again: PLACE,
    makes_something_up: '',
    sleeps_async: r' at tasks.py:\d+ below test_reward_deadline.py:\d+',
    makes_something_up_async: '',
}


@pytest.mark.parametrize('function', PLACES)
def test_a_reward_function_that_hangs_ends_the_training_by_its_name(function):
    handler = signal.getsignal(SIGNAL)
    trainer, samples = build_trainer(FLAT, [0.0] * 4)
    trainer.tree_config = TreeConfig(faults={'reward_timeout': 0.2})
    trainer.reward_funcs = [function]
    with pytest.raises(RuntimeError) as caught:
        advantages(trainer, samples)
    caught.match(
        rf"^Reward function 'right' was stopped after faults.reward_timeout=0.2 s{PLACES[function]}, for a batch of 4 "
        'completions. Give what it waits for a time limit of its own, or raise faults.reward_timeout. That was on rank '
        '0; the training ends on all of them. Mend the function, and resume from the last checkpoint.$'
    )
    assert trainer.reward_funcs == [function] and signal.getsignal(SIGNAL) == handler


def test_a_slow_reward_function_that_returns_in_time_is_left_alone():
    def slow(completions: Completions, **kwargs: Any) -> list[float]:
        time.sleep(0.3)
        return [2.0] * len(completions)

    async def slow_async(completions: Completions, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.3)
        return slow(completions)

    told: list[str] = []
    for timeout in (60.0, None):
        watch = RewardWatch(told.append, timeout, slow_seconds=0.1, end=pytest.fail)
        plain, asynchronous = watch.watched([slow, slow_async], ['a', 'b'])
        assert plain(['x']) == asyncio.run(asynchronous(['x'])) == [2.0] and not watch.errors
    assert len(told) >= 4


def test_the_signals_handler_is_as_it_was_also_for_one_that_somebody_set():
    came: list[int] = []
    before = signal.signal(SIGNAL, lambda number, frame: came.append(number))
    try:
        (watched,) = RewardWatch(print, 60.0, end=pytest.fail).watched([lambda completions: [1.0]], ['right'])
        assert watched(['x']) == [1.0]
        signal.raise_signal(SIGNAL)
        assert came == [SIGNAL]
    finally:
        signal.signal(SIGNAL, before)


def test_a_signal_that_is_not_ours_stops_nothing():
    def gets_one(completions: Completions, **kwargs: Any) -> list[float]:
        signal.raise_signal(SIGNAL)
        return [1.0]

    watch = RewardWatch(print, 60.0, end=pytest.fail)
    (watched,) = watch.watched([gets_one], ['right'])
    assert watched(['x']) == [1.0] and not watch.errors


def test_six_hours_is_the_default_and_null_waits_for_good():
    assert TreeConfig().faults.reward_timeout == 21600
    assert TreeConfig(faults={'reward_timeout': None}).faults.reward_timeout is None
    with pytest.raises(ConfigError, match='reward_timeout'):
        TreeConfig(faults={'reward_timeout': 0})


# What can't be interrupted, in processes of their own.

HEADER = """
import asyncio, ctypes, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from treepo_swift.trainer import reward_watch
from treepo_swift.trainer.reward_watch import watched_rewards

reward_watch.RewardWatch.__init__.__kwdefaults__['grace_seconds'] = 0.5

def score(function, gather=lambda values: values):
    trainer = SimpleNamespace(reward_funcs=[function], reward_func_names=['right'])
    with watched_rewards(trainer, print, gather, 0.5):
        (watched,) = trainer.reward_funcs
        rewards = watched(['a'])
        gather(asyncio.run(rewards) if asyncio.iscoroutine(rewards) else rewards)
"""
GIL = 'def hangs(completions):\n    ctypes.PyDLL(None).sleep(600)\n'
STUBBORN = """
def hangs(completions):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
"""
STUBBORN_ASYNC = """
async def hangs(completions):
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""
BLOCKING_ASYNC = 'async def hangs(completions):\n    time.sleep(600)\n'
POOL = 'def hangs(completions):\n    ThreadPoolExecutor(1).submit(time.sleep, 600).result()\n'
TO_THREAD = 'async def hangs(completions):\n    await asyncio.to_thread(time.sleep, 600)\n'
STANDS = ("function 'right' has been running for 1 s, more than faults.reward_timeout=0.5 s", 'in hangs')
STOPPED = ("Reward function 'right' was stopped after faults.reward_timeout=0.5 s", 'this process ends now')
ENDED = {
    'holds the lock of the interpreter': (GIL, 1, ('Timeout (0:00:01.500000)!', 'in hangs')),
    'catches everything': (STUBBORN, EXIT_STATUS, STANDS),
    'async, catches its cancellation': (STUBBORN_ASYNC, EXIT_STATUS, ('faults.reward_timeout=0.5 s allows',)),
    'async, blocks the event loop': (BLOCKING_ASYNC, EXIT_STATUS, STANDS),
    'waits in a pool of threads': (POOL, EXIT_STATUS, (*STOPPED, 'That was on rank 0; the training ends on all')),
    'async, waits in a thread': (TO_THREAD, EXIT_STATUS, STOPPED),
}


def written(folder: Path, code: str) -> str:
    file = folder / 'training.py'
    file.write_text(HEADER + textwrap.dedent(code))
    return str(file)


@pytest.mark.parametrize('how', ENDED)
def test_what_can_not_be_interrupted_ends_with_its_process(how, tmp_path):
    code, status, told = ENDED[how]
    command = [sys.executable, written(tmp_path, f'{code}\nscore(hangs)\n')]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == status, ended.stderr
    for part in told:
        assert part in ended.stderr


def environment() -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': str(ROOT)}


TWO_RANKS = """
import torch.distributed as dist

dist.init_process_group('gloo')
rank = dist.get_rank()

def gather(values):
    found = [None, None]
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]

def healthy(completions):
    return [1.0]

try:
    score(hangs if rank else healthy, gather)
except RuntimeError as e:
    print(f'rank {rank} says: {e}', file=sys.stderr, flush=True)
    raise
"""


@pytest.mark.parametrize('how', ['sleeps', 'holds the lock of the interpreter'])
def test_two_ranks_one_of_which_hangs_both_end(how, tmp_path):
    code = GIL if how in ENDED else 'def hangs(completions):\n    time.sleep(600)\n'
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    command = [*run, written(tmp_path, code + TWO_RANKS)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    if how == 'sleeps':
        for rank in (0, 1):
            assert (
                f"rank {rank} says: Reward function 'right' was stopped after faults.reward_timeout=0.5 s at train"
                in (ended.stderr)
            )
        assert 'That was on rank 1' in ended.stderr
    else:
        assert 'Timeout (0:00:01.500000)!' in ended.stderr and 'in hangs' in ended.stderr
