"""Deadlines of hooks, threads that hang, and failures counted by kind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip('swift')

from swift.infer_engine.protocol import RequestConfig

from tests.builders import segment_of
from tests.integration.fake_engine import FakeEngine
from tests.integration.test_scheduler import requests, rollout, scheduler, tree_of
from treepo_swift.config import TreeConfig
from treepo_swift.core.tree import StopReason
from treepo_swift.server import hooks
from treepo_swift.server.hooks import HookError, HookRunner
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.wire.groups import group_requests, prompt_key, prompt_text


@pytest.fixture
def few_threads(monkeypatch) -> int:
    monkeypatch.setattr(hooks, 'MAX_HOOK_THREADS', 4)
    return 4


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hanging hooks wait for; opened when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def new_threads() -> Callable[[], int]:
    """Counts the threads of hooks that this test has started."""
    before = set(threading.enumerate())
    return lambda: sum(t.name.startswith('treepo-hook') for t in set(threading.enumerate()) - before)


async def call_all(runner: HookRunner, hook, count: int, timeout: float) -> list:
    calls = (runner.call(hook, index, timeout=timeout, where='here') for index in range(count))
    return await asyncio.gather(*calls, return_exceptions=True)


def until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_deadline_counts_from_when_the_hook_runs(few_threads):
    """Five waves of 0.1 s in four threads: none is slow, though the last wave ends after 0.5 s."""

    def slow(index: int) -> int:
        time.sleep(0.1)
        return index

    async def run() -> list:
        began = time.monotonic()
        results = await call_all(HookRunner(), slow, 20, timeout=0.25)
        assert time.monotonic() - began > 0.45
        return results

    assert asyncio.run(run()) == list(range(20))


def test_a_hook_that_is_slow_after_it_has_waited_is_late(few_threads):
    def slow(index: int) -> int:
        time.sleep(0.1 if index < 4 else 3)
        return index

    results = asyncio.run(call_all(HookRunner(), slow, 5, timeout=1.5))
    assert results[:4] == [0, 1, 2, 3]
    assert isinstance(results[4], HookError) and 'took more than hook_timeout=1.5 s' in str(results[4])


def test_a_thread_that_hangs_is_replaced_and_counted_until_it_returns(few_threads, new_threads, gate):
    runner = HookRunner()

    def hang(index: int) -> None:
        gate.wait(30)

    def fine(index: int) -> str:
        return 'fine'

    async def run() -> None:
        late = await call_all(runner, hang, 3 * few_threads, timeout=0.05)
        assert all(isinstance(error, HookError) for error in late)
        assert runner.hung.total() == 3 * few_threads
        assert await call_all(runner, fine, 2 * few_threads, timeout=5.0) == ['fine'] * 2 * few_threads

    asyncio.run(run())
    gate.set()
    until(lambda: not runner.hung)
    # Those that came back are too many: they end.
    until(lambda: new_threads() <= few_threads)
    assert asyncio.run(call_all(runner, fine, 8, timeout=5.0)) == ['fine'] * 8


def test_threads_that_come_back_late_are_kept_only_where_there_is_no_other(new_threads, gate):
    runner = HookRunner()
    late = asyncio.run(call_all(runner, lambda index: gate.wait(60), 10, timeout=0.05))
    assert all(isinstance(error, HookError) for error in late) and runner.hung.total() == 10
    gate.set()
    until(lambda: not runner.hung and new_threads() == 1)


def test_what_a_late_hook_raises_is_nobodys_lost_error(caplog):
    async def late() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise KeyError('board')

    with pytest.raises(HookError, match='took more than'):
        asyncio.run(HookRunner().call(late, timeout=0.02, where='here'))
    gc.collect()
    assert 'never retrieved' not in caplog.text


def test_threads_are_made_when_they_are_needed_used_again_and_end(monkeypatch, new_threads):
    monkeypatch.setattr(hooks, 'IDLE_SECONDS', 0.2)
    runner, seen = HookRunner(), set()
    assert not new_threads()

    async def run() -> None:
        for _ in range(10):
            seen.add(await runner.call(threading.get_ident, timeout=5.0, where='here'))
        assert new_threads() == 1

    asyncio.run(run())
    assert len(seen) == 1
    until(lambda: not new_threads())


def test_hooks_that_wait_for_a_thread_end_with_their_batch(few_threads, gate):
    runner, began = HookRunner(), []

    def hook(index: int) -> None:
        began.append(index)
        gate.wait(30)

    async def run() -> None:
        batch = asyncio.ensure_future(call_all(runner, hook, 20, timeout=0.5))
        while len(began) < few_threads:
            await asyncio.sleep(0.005)
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
        # Those that run can not be stopped. When they are late, others run in their place.
        assert not runner.hung
        assert await runner.call(lambda: 'next', timeout=5.0, where='here') == 'next'
        while runner.hung.total() < few_threads:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert sorted(began) == [0, 1, 2, 3]
    gate.set()
    until(lambda: not runner.hung)


def test_async_hooks_that_do_not_end_are_counted_too(monkeypatch):
    monkeypatch.setattr(hooks, 'GRACE_SECONDS', 0.05)
    runner = HookRunner()

    async def stubborn() -> None:
        for _ in range(20):
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass

    async def run() -> None:
        with pytest.raises(HookError, match='took more than hook_timeout=0.05 s'):
            await runner.call(stubborn, timeout=0.05, where='here', name='Shop.step')
        assert runner.hung == {'Shop.step': 1}
        await asyncio.sleep(0.5)
        assert not runner.hung

    asyncio.run(run())


def test_an_async_hook_that_exits_does_not_end_the_server():
    class Exits(TreeRolloutScheduler):
        async def check_segment(self, path, text):
            raise SystemExit(3)

    config = TreeConfig(segment_length=16, faults={'max_failure_fraction': 1.0})
    outputs = rollout(requests('a', 'a', config=config), scheduler(cls=Exits))
    assert all('SystemExit(3)' in tree_of(o)['error'] for o in outputs)


def test_a_timeout_of_the_hooks_own_is_not_ours():
    def hook() -> None:
        raise TimeoutError('the tool did not answer')

    with pytest.raises(HookError, match='raised TimeoutError: the tool did not answer'):
        asyncio.run(HookRunner().call(hook, timeout=5.0, where='here'))


def test_a_hook_that_hangs_does_not_keep_the_process():
    program = """
import asyncio, time
from treepo_swift.server.hooks import HookError, HookRunner
try:
    asyncio.run(HookRunner().call(time.sleep, 600, timeout=0.1, where='here'))
except HookError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'took more than hook_timeout' in done.stdout, done.stderr


# In rollouts.


def letters(context: list[int], max_tokens: int, seed: int):
    return segment_of([97 + seed % 26] * max_tokens)


def config(**faults) -> TreeConfig:
    return TreeConfig(
        segment_length=16,
        max_depth=2,
        root_divergence=2,
        stop={'answer': 'none', 'repetition': 'none'},
        faults={'max_failure_fraction': 1.0, **faults},
    )


class Hangs(TreeRolloutScheduler):
    """Hangs on the first path of prompts that begin with h."""

    gate: threading.Event

    def check_segment(self, path, text):
        if path.id == 1 and text[0] == 'h':
            self.gate.wait(30)


def hanging(gate: threading.Event) -> Hangs:
    def speak(context: list[int], max_tokens: int, seed: int):
        return segment_of([context[0]] * max_tokens)

    target = scheduler(FakeEngine(speak=speak), Hangs)
    target.gate = gate
    return target


def test_hung_hooks_are_reported_and_told_once(gate, monkeypatch):
    messages = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)
    target = hanging(gate)

    def batch(*prompts: str) -> int:
        outputs = rollout(requests(*prompts, config=config(hook_timeout=0.05)), target)
        assert len(outputs) == len(prompts)
        return tree_of(outputs[0])['batch']['hung_hooks']

    assert batch(*['h'] * 4, *['a'] * 4) == 1
    assert batch(*['h1'] * 4, *['h2'] * 4) == 3
    hung = [message for message in messages if 'have not come back' in message]
    assert len(hung) == 1 and 'Hangs.check_segment: 1 calls' in hung[0]
    gate.set()
    until(lambda: not target._hooks.hung)
    assert batch(*['a'] * 4) == 0


def test_too_many_hung_hooks_stop_the_rollout_with_one_error(gate):
    target = hanging(gate)
    prompts = [f'h{index}' for index in range(6) for _ in range(2)]
    batch = requests(*prompts, config=config(hook_timeout=0.05, max_hung_hooks=2))
    failure = asyncio.run(target.async_infer(batch, RequestConfig(max_tokens=32), use_tqdm=False))
    assert 'HungHooksError: Hangs.check_segment: ' in failure.message
    assert 'max_hung_hooks=2' in failure.message and 'restart `swift rollout`' in failure.message


def test_failed_paths_are_told_by_kind(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)

    class Raises(TreeRolloutScheduler):
        def check_segment(self, path, text):
            if path.id % 2:
                raise KeyError(f'board {path.id} {text}')

    target = scheduler(FakeEngine(speak=letters), Raises)
    for batch in range(3):
        messages.clear()
        rollout(requests(*['a'] * 4, *['b'] * 4, *['c'] * 4, config=config()), target)
        told = [message for message in messages if 'paths failed in this batch' in message]
        assert len(told) == 1 and ' x Raises.check_segment raised KeyError, e.g. Raises.check_segment on' in told[0]
        # The first message of a kind comes at once, and never again.
        assert len(messages) == (2 if batch == 0 else 1)


def test_one_error_names_the_kinds_and_not_every_path():
    class Raises(TreeRolloutScheduler):
        def check_segment(self, path, text):
            raise KeyError('board')

    strict = config(max_failure_fraction=0.5)
    with pytest.raises(RuntimeError, match='8 of 8 trajectories failed') as caught:
        rollout(requests(*['a'] * 4, *['b'] * 4, config=strict), scheduler(cls=Raises))
    causes = str(caught.value).splitlines()[1:]
    assert len(causes) == 1 and causes[0].startswith('  8 x Raises.check_segment raised KeyError, e.g. Raises.')


def test_what_is_kept_of_a_prompt_is_small():
    batch = requests('a', 'a', 'b')
    for request in batch:
        request.images = ['data:image/png;base64,' + 'A' * 1_000_000]
    groups = group_requests([prompt_key(request) for request in batch], [None] * 3)
    assert [group.members for group in groups] == [(0, 1), (2,)]
    assert all(len(group.key) <= 64 for group in groups) and len(prompt_text(batch[0])) > 1_000_000
    batch[1].images = []
    assert prompt_key(batch[0]) != prompt_key(batch[1])


# Evaluation.


def test_evaluation_is_as_long_as_the_trainers_trees_and_follows_its_faults():
    class Slow(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            time.sleep(0.3)
            return True

    trees = config(hook_timeout=0.05)
    target = scheduler(FakeEngine(speak=letters), Slow)
    late = rollout(requests('a', 'b', config=trees, mode='independent'), target, max_tokens=500)
    assert all(o.response_loss_mask == [[0]] for o in late)

    plain = rollout(
        requests('a', 'b', config=trees, mode='independent'), scheduler(FakeEngine(speak=letters)), max_tokens=500
    )
    assert [len(o.response_token_ids[0]) for o in plain] == [32, 32]
    assert {o.response.choices[0].finish_reason for o in plain} == {'length'}
    short = rollout(
        requests('a', 'b', config=trees, mode='independent'), scheduler(FakeEngine(speak=letters)), max_tokens=20
    )
    assert [len(o.response_token_ids[0]) for o in short] == [20, 20]


def test_evaluation_without_a_config_keeps_its_own_length(monkeypatch):
    monkeypatch.setenv('TREEPO_CHECKS__REQUIRE_TRAINER', 'false')
    batch = requests('a', 'b', mode='independent')
    for request in batch:
        request.data_dict['treepo'].pop('config', None)
    outputs = rollout(batch, scheduler(FakeEngine(speak=letters)), max_tokens=500)
    assert [len(o.response_token_ids[0]) for o in outputs] == [500, 500]
    assert {StopReason.TOKEN_LIMIT.finish_reason} == {o.response.choices[0].finish_reason for o in outputs}


def test_trees_that_give_up_are_told_by_kind_too(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)
    target = scheduler(FakeEngine(speak=letters, max_model_len=90))
    lenient = config()
    for length in range(100, 110):
        rollout(requests(*['x' * length] * 2, *[f'unencodable {length}'] * 2, config=lenient), target)
    # Each kind once, and a sentence for each batch.
    assert len(messages) == 2 + 10 and len(target._warned) == 2
    assert '1 x the prompt leaves no room for a response, e.g.' in messages[-1]
    assert '1 x the prompt could not be encoded, e.g.' in messages[-1]
