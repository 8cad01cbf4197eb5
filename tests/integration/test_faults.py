"""Every fault that can be injected without a model: what the user sees, and what becomes of the batch.

`docs/reliability.md` has a row for each. A fault of a hook or of the engine is injected in both modes: on a rollout
server, and in colocate mode over an engine that is stepped.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig, RolloutOutput

from tests.builders import EOS, sample, segment_of
from tests.integration.colocate_fakes import Llm, StreamingLlm, SwiftEngine
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from tests.integration.test_scheduler import requests, rollout, scheduler, tree_of
from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Segment
from treepo_swift.core.policies.answers import answer_detectors, register_answer
from treepo_swift.core.policies.branching import branching_policies
from treepo_swift.core.tree import StopReason
from treepo_swift.server import hooks
from treepo_swift.server.colocate import ColocateTrees
from treepo_swift.server.engine import EngineGone
from treepo_swift.server.failures import RolloutError
from treepo_swift.server.scheduler import RolloutFailure, TreeRolloutScheduler
from treepo_swift.wire.note import RequestNote


def config(**faults: Any) -> TreeConfig:
    return TreeConfig(
        segment_length=16, max_depth=4, stop={'answer': 'none'}, faults={'max_failure_fraction': 1.0, **faults}
    )


def said(outputs: list[RolloutOutput]) -> list[tuple[Any, ...]]:
    return [(o.response_token_ids, o.rollout_logprobs, tree_of(o)['nodes'], tree_of(o)['stop']) for o in outputs]


def failed(outputs: list[RolloutOutput]) -> list[str]:
    return [tree_of(o)['error'] for o in outputs if tree_of(o)['stop'] == 'failed']


def on_server(cls: type, batch: list[Any]) -> list[RolloutOutput]:
    engine = FakeEngine()
    try:
        return rollout(batch, scheduler(engine, cls), seed=3)
    finally:
        assert engine.running == 0


def in_colocate(cls: type, batch: list[Any]) -> list[RolloutOutput]:
    llm = Llm()
    settings = TreeConfig.from_dict(batch[0].data_dict['treepo']['config'])
    try:
        return ColocateTrees(SwiftEngine(llm), cls, settings).rollout(
            batch, RequestConfig(max_tokens=64, temperature=1.0, seed=3)
        )
    finally:
        assert not llm.requests


MODES = {'server': on_server, 'colocate': in_colocate}
both_modes = pytest.mark.parametrize('grow', MODES.values(), ids=MODES)

# Hooks.


class Abort(BaseException):
    """Not an `Exception`: what frameworks use to get past ``except Exception``."""


def raises(error: BaseException) -> Callable[..., Any]:
    def hook(*args: Any) -> None:
        raise error

    return hook


def returns(value: Any) -> Callable[..., Any]:
    return lambda *args: value


async def hangs(*args: Any) -> None:
    await asyncio.sleep(60)


async def ignores_cancellation(*args: Any) -> None:
    for _ in range(10):
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass


def as_async(hook: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapped(*args: Any) -> Any:
        return hook(*args)

    return wrapped


HOOKS = {
    'raises': (raises(KeyError('board')), "raised KeyError: 'board'"),
    'raises, async': (as_async(raises(KeyError('board'))), "raised KeyError: 'board'"),
    'raises CancelledError': (raises(asyncio.CancelledError()), 'CancelledError'),
    'raises CancelledError, async': (as_async(raises(asyncio.CancelledError())), 'raised CancelledError'),
    'raises SystemExit': (raises(SystemExit(1)), 'SystemExit(1)'),
    'raises SystemExit, async': (as_async(raises(SystemExit(1))), 'SystemExit(1)'),
    'raises no Exception': (raises(Abort('now')), 'Abort(now)'),
    'raises no Exception, async': (as_async(raises(Abort('now'))), 'Abort(now)'),
    'returns a wrong type': (returns('stop'), "returned 'stop', allowed are a StopReason or None"),
    'hangs': (hangs, 'took more than hook_timeout=0.1 s'),
    'ignores its cancellation': (ignores_cancellation, 'took more than hook_timeout=0.1 s'),
}


@pytest.mark.parametrize('name', HOOKS)
@both_modes
def test_a_hook_that_misbehaves_fails_its_path_and_is_named(name, grow, monkeypatch):
    monkeypatch.setattr(hooks, 'GRACE_SECONDS', 0.05)
    hook, complaint = HOOKS[name]

    class Bad(TreeRolloutScheduler):
        def check_segment(self, path: Any, text: str) -> Any:
            return hook() if path.id == 1 else None

    outputs = grow(Bad, requests(*['a'] * 4, config=config(hook_timeout=0.1)))
    stats = next(tree_of(o)['stats'] for o in outputs if 'stats' in tree_of(o))
    assert stats['failures'] == 1 and not failed(outputs) and len(outputs) == 4

    class Worse(TreeRolloutScheduler):
        def check_segment(self, path: Any, text: str) -> Any:
            return hook()

    with pytest.raises(RolloutError) as caught:
        grow(Worse, requests(*['a'] * 2, config=config(hook_timeout=0.1, max_failure_fraction=0.5)))
    first, cause = str(caught.value).splitlines()
    assert first.startswith('2 of 2 trajectories failed, more than faults.max_failure_fraction=0.5')
    assert 'Worse.check_segment on segment 1 of path ' in cause and complaint in cause and 'What to do: ' in cause


@both_modes
def test_a_hook_that_returns_none_where_it_may_not(grow):
    class Silent(TreeRolloutScheduler):
        def step(self, infer_request: Any, response_choice: Any, current_turn: int) -> None:
            return None

        def check_finished(self, infer_request: Any, response_choice: Any, current_turn: int) -> bool:
            return False

    outputs = grow(Silent, requests(*['a'] * 2, config=config()))
    assert all(
        'Silent.step after turn 1 on path ' in error and 'returned None, allowed' in error for error in failed(outputs)
    )
    assert len(failed(outputs)) == 2


@both_modes
def test_hooks_that_take_all_threads_leave_room_for_the_others(grow, monkeypatch):
    monkeypatch.setattr(hooks, 'MAX_HOOK_THREADS', 2)
    gate = threading.Event()

    class Greedy(TreeRolloutScheduler):
        def check_segment(self, path: Any, text: str) -> None:
            if path.id == 1:
                gate.wait(30)

    try:
        outputs = grow(Greedy, requests(*['a', 'b', 'c', 'd'] * 3, config=config(hook_timeout=0.2)))
    finally:
        gate.set()
    assert len(outputs) == 12 and not failed(outputs)
    assert tree_of(outputs[0])['batch']['hung_hooks'] == 4


@both_modes
def test_a_tool_that_says_ten_megabytes_fills_the_context_and_hurts_nobody(grow):
    class Loud(TreeRolloutScheduler):
        def step(self, infer_request: Any, response_choice: Any, current_turn: int) -> Any:
            if 'loud' in infer_request.messages[0]['content']:
                infer_request.messages.append({'role': 'tool', 'content': 'x' * 10_000_000})
            else:
                infer_request.messages.append({'role': 'user', 'content': 'more'})
            return {'infer_request': infer_request}

        def check_finished(self, infer_request: Any, response_choice: Any, current_turn: int) -> bool:
            return current_turn == 2

    outputs = grow(Loud, requests('loud', 'loud', 'quiet', 'quiet', config=config()))
    assert [tree_of(o)['stop'] == 'context_limit' for o in outputs] == [True, True, False, False]
    assert all(len(str(o.messages)) < 10_000 for o in outputs) and not failed(outputs)


@pytest.mark.parametrize('error', [SystemExit(1), asyncio.CancelledError(), Abort('now')])
def test_policies_and_detectors_that_exit_fail_their_tree_or_path(error, monkeypatch):
    """They run on the server's event loop, where SystemExit would end the process."""
    monkeypatch.setitem(branching_policies._entries, 'exits', raises(error))
    policy = TreeConfig(segment_length=4, branching='exits', faults={'max_failure_fraction': 1.0})
    outputs = rollout(requests(*['a'] * 4, config=policy))
    assert all(f"branching policy 'exits' raised {type(error).__name__}" in text for text in failed(outputs))
    assert failed(outputs)

    monkeypatch.setattr(answer_detectors, '_entries', dict(answer_detectors._entries))
    register_answer('exits')(raises(error))
    detector = TreeConfig(segment_length=4, stop={'answer': 'exits'}, faults={'max_failure_fraction': 1.0})
    outputs = rollout(requests(*['a'] * 2, config=detector))
    assert len(failed(outputs)) == 2 and f'raised {type(error).__name__}' in failed(outputs)[0]


# The engine.


def faulty(fault: Callable[[Segment], Segment | None], *, calls: Callable[[int], bool]) -> FakeEngine:
    """An engine whose segments of those calls are not as they should be; None: it raises."""
    engine = FakeEngine()

    def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
        segment = sample(context, max_tokens, 0)
        changed = fault(segment) if calls(engine.calls) else segment
        if changed is None:
            raise RuntimeError('CUDA error')
        return changed

    engine.speak = speak
    return engine


def cancels(segment: Segment) -> Segment:
    raise asyncio.CancelledError


ENGINE = {
    'error': (lambda s: None, 'the engine raised RuntimeError: CUDA error'),
    'cancelled by itself': (cancels, 'the engine raised CancelledError'),
    'nan': (lambda s: replace(s, logprobs=[math.nan] * len(s.token_ids)), 'a log-prob that is not finite'),
    'infinite': (lambda s: replace(s, logprobs=[-math.inf] * len(s.token_ids)), 'a log-prob that is not finite'),
    'counts differ': (lambda s: replace(s, logprobs=s.logprobs[:-1]), 'tokens with'),
    'nothing': (lambda s: Segment([], [], None), 'a segment without a token'),
    'too much': (lambda s: Segment([97] * 500, [-1.0] * 500), 'the engine returned 500 tokens where'),
}


@pytest.mark.parametrize('name', ENGINE)
def test_an_engine_fault_is_asked_again_once_and_named_where_it_stays(name):
    fault, complaint = ENGINE[name]
    healthy = rollout(requests(*['a'] * 4, config=config()), scheduler(faulty(fault, calls=lambda call: False)), seed=1)
    once = faulty(fault, calls=lambda call: call == 2)
    assert said(rollout(requests(*['a'] * 4, config=config()), scheduler(once), seed=1)) == said(healthy)

    always = faulty(fault, calls=lambda call: True)
    with pytest.raises(RolloutError) as caught:
        rollout(requests(*['a'] * 4, config=config(max_failure_fraction=0.5)), scheduler(always))
    cause = str(caught.value).splitlines()[1]
    assert complaint in cause and '(after 3 attempts)' in cause and 'What to do: ' in cause
    assert always.running == 0


def test_a_request_that_the_engine_lost_is_made_again():
    """It waits for good; the others go on, and when they are done the engine is silent."""
    engine = FakeEngine()
    generate = engine.generate

    async def loses_the_second(*args: Any, **options: Any) -> Any:
        if engine.requests == 1:
            engine.requests += 1
            await asyncio.Event().wait()
        async for segment in generate(*args, **options):
            yield segment

    engine.generate = loses_the_second
    outputs = rollout(requests(*['a'] * 4, config=config(stall_timeout=0.2)), scheduler(engine), seed=1)
    assert not failed(outputs) and engine.running == 0
    assert sum(tree_of(o).get('stats', {}).get('failures', 0) for o in outputs) == 0


class Mute(FakeEngine):
    async def generate(self, *args: Any, **options: Any) -> Any:
        self.requests += 1
        self.running += 1
        try:
            await asyncio.sleep(60)
            yield
        finally:
            self.running -= 1


def test_an_engine_that_hangs_ends_the_batch_in_bounded_time():
    engine = Mute()
    with pytest.raises(RolloutError, match='said nothing to anybody for faults.stall_timeout=0.1 s') as caught:
        rollout(requests(*['a'] * 2, config=config(stall_timeout=0.1, max_failure_fraction=0.5)), scheduler(engine))
    assert 'the engine fell silent' in str(caught.value) and engine.running == 0


def test_an_engine_that_works_is_never_taken_for_one_that_hangs():
    """A request that waits for a slot far longer than `stall_timeout`: others have answers meanwhile."""
    slot = asyncio.Semaphore(1)

    class OneAtATime(FakeEngine):
        async def generate(self, *args: Any, **options: Any) -> Any:
            async with slot:
                async for segment in super().generate(*args, **options):
                    await asyncio.sleep(0.03)
                    yield segment

    engine = OneAtATime(speak=lambda context, most, seed: segment_of([97] * most))
    outputs = rollout(requests(*'aabbccdd', config=config(stall_timeout=0.25, max_retries=0)), scheduler(engine))
    assert not failed(outputs)

    # And an answer that comes whole says nothing for long; only the engine's own count tells that it works.
    class Whole(FakeEngine):
        async def generate(self, *args: Any, **options: Any) -> Any:
            for _ in range(30):
                await asyncio.sleep(0.02)
                self.answers += 1
            async for segment in super().generate(*args, **options):
                yield segment

    outputs = rollout(requests('a', config=config(stall_timeout=0.25, max_retries=0)), scheduler(Whole()))
    assert not failed(outputs)


class Vllm(StreamingLlm):
    """Requests by number may raise, or end with another finish reason; remembers their ids."""

    def __init__(self, fault: Callable[[int], BaseException | str | None]) -> None:
        super().__init__(random.Random(0))
        self.fault, self.ids = fault, []

    async def generate(self, inputs: Any, sampling: Any, request_id: str, **options: Any) -> Any:
        self.ids.append(request_id)
        fault = self.fault(len(self.ids))
        if isinstance(fault, BaseException):
            raise fault
        async for output in super().generate(inputs, sampling, request_id, **options):
            if fault:
                output.outputs[0].finish_reason, output.finished = fault, True
            yield output


def over_vllm(fault: Callable[[int], BaseException | str | None], batch: list[Any]) -> tuple[Vllm, Any]:
    vllm = Vllm(fault)
    target = TreeRolloutScheduler(infer_engine=SwiftEngine(vllm))
    target._server().engine._engine.template.max_length = None
    return vllm, asyncio.run(target.async_infer(batch, RequestConfig(max_tokens=64, temperature=1.0, seed=3)))


@pytest.mark.parametrize('fault', [RuntimeError('out of memory'), 'abort', 'error'])
def test_a_request_that_vllm_fails_or_aborts_is_made_again_under_a_new_id(fault):
    vllm, outputs = over_vllm(lambda number: fault if number == 2 else None, requests(*['a'] * 4, config=config()))
    assert not failed(outputs) and len(set(vllm.ids)) == len(vllm.ids)
    assert said(outputs) == said(over_vllm(lambda number: None, requests(*['a'] * 4, config=config()))[1])


def test_a_dead_engine_core_ends_the_batch_at_once_and_says_what_to_do():
    from vllm.v1.engine.exceptions import EngineDeadError

    vllm, failure = over_vllm(
        lambda number: EngineDeadError() if number > 2 else None, requests(*'aabb', config=config())
    )
    assert isinstance(failure, RolloutFailure)
    assert failure.message.startswith("EngineGone: vLLM's engine has died (EngineDeadError: ")
    assert 'Restart `swift rollout`' in failure.message and len(vllm.ids) <= 4, 'nobody is asked again'


def test_an_engine_that_raises_in_a_step_ends_a_colocated_rollout():
    def fail(step: int) -> bool:
        raise MemoryError('out of memory')

    with pytest.raises(EngineGone, match='raised MemoryError in a step, and can not be used any more'):
        ColocateTrees(SwiftEngine(Llm(before_step=fail)), TreeRolloutScheduler, config()).rollout(
            requests(*['a'] * 4, config=config()), RequestConfig(max_tokens=64, temperature=1.0)
        )


@pytest.mark.parametrize('segment', [Segment([], [], StopReason.EOS), segment_of([EOS], StopReason.EOS)])
def test_an_empty_response_is_an_answer_of_no_text(segment):
    outputs = rollout(requests(*['a'] * 4, config=config()), scheduler(FakeEngine(speak=lambda *args: segment)))
    assert [tree_of(o)['stop'] for o in outputs] == ['eos'] * 4 and not failed(outputs)
    assert all(o.response.choices[0].message.content == '' for o in outputs)
    assert all(o.response_loss_mask == [[1] * len(segment.token_ids)] for o in outputs)


def test_a_context_that_fills_up_in_mid_path_ends_the_path():
    engine = FakeEngine(max_model_len=40, speak=lambda context, most, seed: segment_of([97 + seed % 9] * most))
    shallow = TreeConfig(segment_length=16, max_depth=2, stop={'answer': 'none', 'repetition': 'none'})
    outputs = rollout(requests(*['x' * 20] * 4, config=shallow), scheduler(engine))
    assert {(tree_of(o)['stop'], len(o.response_token_ids[0])) for o in outputs} == {('context_limit', 20)}
    assert {o.response.choices[0].finish_reason for o in outputs} == {'length'}


# Requests and batches.


@pytest.mark.parametrize('uuid', ['same', None])
def test_equal_or_missing_request_ids_share_no_baseline_and_no_state(uuid):
    class Remembers(TreeRolloutScheduler):
        trajectory_state = ('said',)

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.said: dict[str, str] = {}

        async def on_trajectory_start(self, requests: list[Any]) -> None:
            for request in requests:
                assert request.uuid not in self.said
                self.said[request.uuid] = request.messages[0]['content']

        async def on_turn_end(self, request: Any, choice: Any, turn: int) -> Any:
            assert self.said[request.uuid] == request.messages[0]['content']
            return {'done': True}

    batch = requests(*'aabb', config=config())
    for request in batch:
        request.uuid = uuid
    outputs = rollout(batch, Remembers(segment_engine=FakeEngine(), tokenizer=FakeTokenizer()))
    ids = [tree_of(o)['id'] for o in outputs]
    assert ids[0] == ids[1] != ids[2] == ids[3] and not failed(outputs)
    assert [o.response.id for o in outputs] == ([uuid] * 4 if uuid else ids)


@pytest.mark.parametrize('fault', ['hook', 'hang', 'engine', 'gone', 'bug', 'too long', 'unencodable'])
def test_the_batch_after_a_failed_one_is_what_it_would_have_been(fault):
    gate = threading.Event()

    class Fails(TreeRolloutScheduler):
        def check_segment(self, path: Any, text: str) -> None:
            if self.broken == 'hook':
                raise KeyError('board')
            if self.broken == 'hang':
                gate.wait(30)

    def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
        if target.broken == 'engine':
            raise RuntimeError('CUDA error')
        if target.broken == 'gone':
            raise EngineGone('the engine has died: restart it, and resume the training')
        if target.broken == 'bug':
            target._engine.completion = raises(AssertionError())
        return sample(context, max_tokens, seed)

    target = scheduler(FakeEngine(speak=speak, max_model_len=300), Fails)
    completion = target._engine.completion
    strict = TreeConfig(segment_length=16, max_depth=4, faults={'hook_timeout': 0.1, 'max_hung_hooks': 1})
    prompts = {'too long': 'x' * 500, 'unencodable': 'unencodable'}
    bad = [prompts.get(fault, letter) for letter in 'aaaabbbb']

    async def serve(bad: list[str], broken: str) -> list[Any]:
        """As swift's worker does: one batch after the other, in one task."""
        answers = []
        for prompts, target.broken in ((bad, broken), ('ccccdddd', '')):
            batch = requests(*prompts, config=strict)
            answers.append(await target.async_infer(batch, RequestConfig(max_tokens=64, seed=5)))
            assert target._engine.running == 0 and asyncio.current_task().cancelling() == 0
            target._engine.completion = completion
            gate.set()
        return answers

    _, healthy = asyncio.run(serve(list('aaaabbbb'), ''))
    gate.clear()
    failure, after = asyncio.run(serve(bad, fault))
    assert isinstance(failure, RolloutFailure), failure
    assert said(after) == said(healthy)
    # A sentence, and no bare name, number or None.
    assert len(failure.message.split()) > 8 and 'None' not in failure.message
    assert fault != 'bug' or 'an error that treepo did not expect: AssertionError at' in failure.message


@pytest.mark.parametrize(
    'change, said',
    [
        ({'protocol': 99}, 'RefusedRequest: The trainer speaks treepo protocol 99'),
        ({'mode': 'forest'}, "RefusedRequest: mode='forest' in a treepo request: allowed are tree"),
        ({'leaves': 8}, "RefusedRequest: 'leaves' in a treepo request, which this version does not know"),
        ({'config': {'branching': 'odd', 'max_depth': 2}}, "ConfigError: Unknown branching policy 'odd': allowed are"),
        ({'config': {'depth': 3}}, "ConfigError: the trainer's TreeConfig: unknown key 'depth'"),
    ],
)
def test_a_request_that_can_not_be_served_is_refused_in_a_sentence(change, said):
    batch = requests(*'aa', config=config())
    for request in batch:
        request.data_dict['treepo'].update(change)
    failure = asyncio.run(scheduler().async_infer(batch, RequestConfig(max_tokens=64)))
    assert isinstance(failure, RolloutFailure) and failure.message.startswith(said)


def test_a_resumed_run_gets_the_trees_that_it_would_have_got():
    """Seeds follow the trainer's step: a fresh server and trainer at step 5 grow what step 5 grew before."""

    def step(target: TreeRolloutScheduler, number: int) -> list[Any]:
        note = RequestNote(config=config().to_dict(), step=number, num_generations=4).to_dict()
        batch = [replace(request, data_dict={'treepo': note}) for request in requests(*'aaaabbbb')]
        return said(rollout(batch, target, seed=1))

    whole = scheduler()
    grown = [step(whole, number) for number in range(7)]
    resumed = scheduler()
    assert [step(resumed, number) for number in (5, 6)] == grown[5:]
    assert grown[4] != grown[5]


def test_a_batch_that_is_cancelled_leaves_nothing_and_the_next_is_served():
    target = scheduler()

    async def serve() -> list[Any]:
        healthy = await target.rollout(requests(*'aabb', config=config()), RequestConfig(max_tokens=64, seed=5))
        task = asyncio.ensure_future(
            target.async_infer(requests(*'aabb', config=config()), RequestConfig(max_tokens=64, seed=5))
        )
        while not target._engine.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert target._engine.running == 0 and len(asyncio.all_tasks()) == 1
        after = await target.rollout(requests(*'aabb', config=config()), RequestConfig(max_tokens=64, seed=5))
        assert said(after) == said(healthy)
        return after

    assert len(asyncio.run(serve())) == 4
