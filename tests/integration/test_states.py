"""States of environments: none is used after it was released, all are, once, and as soon as nothing needs them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

pytest.importorskip('swift')

from swift.infer_engine.protocol import RequestConfig

from tests.builders import EOS, sample, segment_of
from tests.flat import changed, flat
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from tests.integration.test_scheduler import requests, rollout, tree_of
from treepo_swift.config import TreeConfig
from treepo_swift.core.tree import StopReason
from treepo_swift.server.scheduler import TreeRolloutScheduler

CONFIG = flat(segment_length=16, max_depth=8, answer='none', stop_at_repetition=False)


def short_turns(context: list[int], max_tokens: int, seed: int):
    """Mostly one segment, sometimes two or three."""
    return sample(context, max_tokens, seed, eos_every=16)


def one_word(context: list[int], max_tokens: int, seed: int):
    return segment_of([97 + (len(context) + seed) % 26, EOS][:max_tokens], StopReason.EOS)


class World(TreeRolloutScheduler):
    """Each state is a list of what its path said; `turns` end a trajectory."""

    turns = 3
    release_seconds = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.said: dict[str, list[str]] = {}
        self.made: Counter[str] = Counter()
        self.released: Counter[str] = Counter()
        self.most_alive = 0

    trajectory_state = ('said',)

    async def on_trajectory_start(self, requests):
        for request in requests:
            self.said[request.uuid] = []
            self.made[request.uuid] += 1

    def fork_state(self, parent_id, child_id):
        assert not self.released[parent_id], f'{parent_id} was released'
        super().fork_state(parent_id, child_id)
        self.made[child_id] += 1

    async def on_turn_end(self, infer_request, response_choice, current_turn):
        said = self.said[infer_request.uuid]
        said.append(response_choice.message.content)
        self.most_alive = max(self.most_alive, len(self.said))
        assert said == [m['content'] for m in infer_request.messages if m['role'] == 'assistant']
        await asyncio.sleep(0.001 * (len(said[-1]) % 3))
        return {'done': len(said) >= self.turns}

    def step(self, infer_request, response_choice, current_turn):
        assert len(self.said[infer_request.uuid]) == current_turn
        infer_request.messages.append({'role': 'user', 'content': 'and then'})
        return {'infer_request': infer_request}

    async def release_state(self, state_id):
        await asyncio.sleep(self.release_seconds)
        self.said.pop(state_id, None)
        self.released[state_id] += 1


def world(cls: type = World, speak=short_turns, **options) -> World:
    target = cls(segment_engine=FakeEngine(speak=speak, **options), tokenizer=FakeTokenizer())
    target.trajectory_state = ('said',)
    return target


def check_released_once(target: World) -> None:
    assert not target.said
    assert set(target.made) <= set(target.released) and set(target.released.values()) == {1}


@pytest.mark.parametrize('fork_state', ['copy', 'replay'])
@pytest.mark.parametrize('fallback', ['random_segment', 'random_token', 'root', 'none'])
@pytest.mark.parametrize('way', ['stream', 'by_segment', 'by_segment_tokens', 'by_trajectory_tokens'])
def test_no_path_fork_or_fallback_misses_its_state(fork_state, fallback, way):
    """Each hook checks that its state is there and says what its own path said."""
    budget = {'budget': way, 'budget_tokens': 320} if way.startswith('by_segment_') or 'trajectory' in way else {}
    fill = {'fallback_fill': 'root'} if fallback == 'none' else {}
    for seed in range(6):
        target = world()
        target.by_segment = way == 'by_segment'
        config = changed(CONFIG, fork_state=fork_state, fallback=fallback, seed=seed, **budget, **fill)
        outputs = rollout(requests(*['a'] * 8, *['b'] * 5, config=config), target, seed=seed)
        stats = [tree_of(o)['stats'] for o in outputs if 'stats' in tree_of(o)]
        assert sum(s['failures'] for s in stats) == 0 and sum(s['turns'] for s in stats) > 0
        check_released_once(target)


@pytest.mark.parametrize('width, fallback', [(1, 'random_segment'), (4, 'none'), (4, 'root')])
def test_a_long_chain_keeps_few_states_alive(width, fallback):
    """A path that has gone on leaves the states of earlier turns to nobody, where no fallback can cut there."""

    class Long(World):
        turns = 25

    target = world(Long, one_word)
    config = changed(CONFIG, fallback=fallback, root_divergence=width, divergence=1, segment_length=16)
    outputs = rollout(requests(*['a'] * width, config=config), target, seed=1)
    assert all(o.rollout_infos['num_turns'] == 25 for o in outputs)
    assert len(target.made) > 25 * width
    # Of each path the turn that it is in and its next, some that are being released, and those at which forks are to be
    # decided when the slowest path is there.
    assert target.most_alive <= 6 * width + 1
    check_released_once(target)


def test_where_fallback_may_cut_anywhere_states_stay_until_the_tree_is_complete():
    target = world()
    rollout(requests(*['a'] * 8, config=changed(CONFIG, root_divergence=8, divergence=1)), target, seed=1)
    assert target.most_alive > 8
    check_released_once(target)


def test_environments_close_together_and_nobody_waits_for_each():
    class Slow(World):
        turns = 10
        release_seconds = 0.05

    def seconds(cls: type) -> tuple[float, World]:
        target = world(cls, one_word)
        target.turns = 10
        began = time.perf_counter()
        rollout(requests(*['a'] * 16, config=changed(CONFIG, root_divergence=16, segment_length=16)), target, seed=1)
        return time.perf_counter() - began, target

    (quick, _), (slow, target) = seconds(World), seconds(Slow)
    assert len(target.released) >= 160
    check_released_once(target)
    # One after the other they take 8 s.
    assert slow - quick < 1.5


def test_a_failed_turn_lets_go_of_its_state():
    class Fails(World):
        def step(self, infer_request, response_choice, current_turn):
            if len(response_choice.message.content) % 2:
                raise KeyError('board')
            return super().step(infer_request, response_choice, current_turn)

    target = world(Fails)
    outputs = rollout(
        requests(*['a'] * 8, config=changed(CONFIG, max_failure_fraction=1.0, fallback='none')), target, seed=3
    )
    stats = next(tree_of(o)['stats'] for o in outputs if 'stats' in tree_of(o))
    assert stats['failures'] > 0
    check_released_once(target)


@pytest.mark.parametrize('stops_at', ['on_turn_end', 'release_state'])
def test_all_states_are_released_when_a_rollout_is_cancelled(stops_at):
    class Stuck(World):
        turns = 2

        async def on_turn_end(self, infer_request, response_choice, current_turn):
            if stops_at == 'on_turn_end' and current_turn == 2:
                reached.set()
                await asyncio.sleep(60)
            return await super().on_turn_end(infer_request, response_choice, current_turn)

        async def release_state(self, state_id):
            reached.set()
            await super().release_state(state_id)

    async def cancelled() -> World:
        nonlocal reached
        reached = asyncio.Event()
        target = world(Stuck)
        target.release_seconds = 0.05
        rolling = asyncio.ensure_future(
            target.rollout(requests(*['a'] * 4, config=CONFIG), RequestConfig(max_tokens=64), use_tqdm=False)
        )
        await reached.wait()
        rolling.cancel()
        await asyncio.gather(rolling, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1
        return target

    reached: asyncio.Event
    target = asyncio.run(cancelled())
    if stops_at == 'on_turn_end':
        check_released_once(target)


def test_a_release_that_fails_hurts_no_path(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)

    class Leaks(World):
        async def release_state(self, state_id):
            raise OSError(f'{state_id} is still open')

    outputs = rollout(requests(*['a'] * 8, config=CONFIG), world(Leaks), seed=1)
    assert all(tree_of(o)['stop'] != 'failed' for o in outputs)
    assert len(messages) == 1 and 'Leaks.release_state for state ' in messages[0]


def test_a_config_says_how_states_fork_in_evaluation_too():
    target = world()
    config = TreeConfig(segment_length=4, max_depth=8, fork_state='replay')
    outputs = rollout(requests('a', 'b', config=config, mode='independent'), target)
    assert all(o.rollout_infos['num_turns'] == 3 for o in outputs)
    # A chain takes its environment on from turn to turn: nothing is copied.
    assert set(target.made) == {'request-0', 'request-1'}
