"""What holds whatever goes wrong: random schedules of faults, each of them seeded.

`FUZZ=20` tries twenty times as many (CONTRIBUTING.md).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip('swift')
pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig

from tests.builders import grow, sample
from tests.fuzz import examples
from tests.integration.colocate_fakes import Llm, SwiftEngine
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from tests.integration.test_scheduler import requests, tree_of
from treepo_swift.advantage.batch import tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Segment
from treepo_swift.core.tree import StopReason, response_ids
from treepo_swift.server import hooks
from treepo_swift.server.batch import RolloutBatch
from treepo_swift.server.colocate import ColocateTrees
from treepo_swift.server.engine import EngineGone
from treepo_swift.server.failures import RolloutError
from treepo_swift.server.grower import CpuClock
from treepo_swift.server.scheduler import RolloutFailure, TreeRolloutScheduler
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.report import TreeReport


@dataclass(frozen=True)
class Schedule:
    """Which calls go wrong, and how: each call draws from the seed and a name of its own."""

    seed: int
    rate: float
    kinds: tuple[str, ...]

    def fault(self, call: str) -> str | None:
        dice = random.Random(f'{self.seed}:{call}')
        return dice.choice(self.kinds) if self.kinds and dice.random() < self.rate else None


ENGINE = ('raises', 'cancels', 'nan', 'counts', 'nothing', 'lost')
HOOKS = ('raises', 'cancels', 'exits', 'rubbish', 'hangs')
ESTIMATORS = ('treepo', 'grpo', 'rloo', 'reinforce_plus_plus', 'progress', 'spo', 'treerl')


class Faulty(FakeEngine):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__(max_model_len=200)
        self.schedule = schedule
        self.speak = self.say

    def say(self, context: list[int], max_tokens: int, seed: int) -> Segment:
        segment = sample(context, max_tokens, 0)
        fault = self.schedule.fault(f'engine {self.calls}')
        if fault == 'raises':
            raise RuntimeError('CUDA error')
        if fault == 'cancels':
            raise asyncio.CancelledError
        if fault == 'nan':
            return replace(segment, logprobs=[math.nan] * len(segment.token_ids))
        if fault == 'counts':
            return replace(segment, logprobs=segment.logprobs[1:])
        return Segment([], []) if fault == 'nothing' else segment

    async def generate(self, *args: Any, **options: Any) -> Any:
        if self.schedule.fault(f'request {self.requests}') == 'lost':
            self.requests += 1
            await asyncio.sleep(60)
        async for segment in super().generate(*args, **options):
            yield segment


class Shop(TreeRolloutScheduler):
    """Turns with a state that forks, and hooks of which some misbehave."""

    schedule: Schedule
    calls = 0
    trajectory_state = ('baskets',)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.baskets: dict[str, int] = {}

    async def misbehave(self, hook: str) -> Any:
        self.calls += 1
        fault = self.schedule.fault(f'{hook} {self.calls}')
        if fault == 'raises':
            raise KeyError('\x1b[2Jboard')
        if fault == 'cancels':
            raise asyncio.CancelledError
        if fault == 'exits':
            raise SystemExit(1)
        if fault == 'hangs':
            await asyncio.sleep(60)
        return 'rubbish' if fault == 'rubbish' else None

    async def on_trajectory_start(self, requests: list[Any]) -> None:
        for request in requests:
            self.baskets[request.uuid] = 0
        await self.misbehave('start')

    async def check_segment(self, path: Any, text: str) -> Any:
        return await self.misbehave('check')

    async def on_turn_end(self, infer_request: Any, response_choice: Any, current_turn: int) -> Any:
        self.baskets[infer_request.uuid] += 1
        assert self.baskets[infer_request.uuid] == current_turn
        return await self.misbehave('end') or {'done': current_turn == 2}

    async def step(self, infer_request: Any, response_choice: Any, current_turn: int) -> Any:
        infer_request.messages.append({'role': 'user', 'content': 'and'})
        return await self.misbehave('step') or {'infer_request': infer_request}

    async def release_state(self, state_id: str) -> None:
        self.baskets.pop(state_id, None)
        await self.misbehave('release')


@st.composite
def schedules(draw: Any, kinds: tuple[str, ...]) -> Schedule:
    chosen = draw(st.lists(st.sampled_from(kinds), max_size=3, unique=True))
    return Schedule(draw(st.integers(0, 2**32)), draw(st.sampled_from([0.02, 0.1, 0.3, 1.0])), tuple(sorted(chosen)))


@st.composite
def configs(draw: Any) -> TreeConfig:
    budget = draw(st.sampled_from(['by_width', 'by_width', 'by_segment_tokens', 'by_trajectory_tokens']))
    return TreeConfig(
        segment_length=draw(st.integers(4, 16)),
        max_depth=draw(st.integers(1, 4)),
        divergence=draw(st.integers(1, 3)),
        root_divergence=draw(st.integers(1, 4)),
        branching=draw(st.sampled_from(['even', 'logprob', 'entropy'])),
        budget=budget if budget == 'by_width' else {'policy': budget, 'tokens': 400},
        fallback=draw(st.sampled_from(['random_segment', 'random_token', 'root', 'none'])),
        fork_state=draw(st.sampled_from(['copy', 'replay'])),
        faults={
            'max_retries': draw(st.integers(0, 2)),
            'max_failure_fraction': draw(st.sampled_from([0.5, 1.0])),
            'hook_timeout': 0.02,
            'stall_timeout': 0.1,
        },
    )


async def serve(target: TreeRolloutScheduler, batch: list[Any]) -> Any:
    """One batch, after which nothing of it may be alive."""
    answer = await target.async_infer(batch, RequestConfig(max_tokens=40, seed=1))
    assert len(asyncio.all_tasks()) == 1 and asyncio.current_task().cancelling() == 0
    assert target._engine.running == 0, "the engine's own count of requests: weights may be synced now"
    return answer


def check_outputs(batch: list[Any], outputs: list[Any], config: TreeConfig) -> None:
    assert [o.response.id for o in outputs] == [r.uuid for r in batch]
    reports = [TreeReport.from_dict(tree_of(o)) for o in outputs]
    for output, report in zip(outputs, reports, strict=True):
        mask = [value for turn in output.response_loss_mask for value in turn]
        values = [value for turn in output.rollout_logprobs for value in turn]
        assert [len(m) for m in output.response_loss_mask] == [len(i) for i in output.response_token_ids]
        assert len(values) == sum(mask) == report.loss_tokens and all(map(math.isfinite, values))
        assert (report.error is not None) == report.is_placeholder and '\x1b' not in (report.error or '')
        assert report.stop is not StopReason.FAILED or (report.nodes == [] and len(report.error) > 10)
    check_baselines(reports, config)


def check_baselines(reports: list[TreeReport], config: TreeConfig) -> None:
    """No advantage comes from a leaf that failed: it gets 0, and its reward changes nothing for the others."""
    dice = random.Random(0)
    rewards = [dice.choice([0.0, 0.5, 1.0]) for _ in reports]
    absurd = [1e6 if r.is_placeholder else reward for r, reward in zip(reports, rewards, strict=True)]
    lengths = [r.loss_tokens for r in reports]
    grown = Counter(r.id for r in reports if not r.is_placeholder)
    asked = Counter(r.id for r in reports)
    # The only one that is left of its tree has nothing to be compared with.
    left_alone = [r.id for r in reports if grown[r.id] == 1 and asked[r.id] > 1]
    healthy = [i for i, r in enumerate(reports) if not r.is_placeholder and r.id not in left_alone]
    for estimator in ESTIMATORS:
        settings = config.replace(advantage={'estimator': estimator})
        values = tree_advantages(reports, rewards, lengths, settings)
        assert values == tree_advantages(reports, absurd, lengths, settings)
        alone = tree_advantages(*([part[i] for i in healthy] for part in (reports, rewards, lengths)), settings)
        assert [values[i] for i in healthy] == alone
        assert all(v.mean == 0 and not any(v.values) for i, v in enumerate(values) if i not in healthy)
        assert all(map(math.isfinite, [v.mean for v in values]))


QUICK = TreeConfig(segment_length=4, faults={'hook_timeout': 0.02, 'stall_timeout': 0.1})
PROMPTS = st.lists(st.sampled_from(['a', 'b', 'c', 'unencodable', 'x' * 190, 'x' * 250]), min_size=1, max_size=3)


@given(PROMPTS, st.integers(1, 5), configs(), schedules(ENGINE), schedules(HOOKS), st.booleans(), st.booleans())
@examples(25)
@example(['a'], 2, QUICK, Schedule(0, 1.0, ('cancels',)), Schedule(0, 0, ()), True, False)
@example(['a'], 2, QUICK, Schedule(0, 0, ()), Schedule(0, 1.0, ('exits',)), True, True)
def test_invariants_hold_whatever_goes_wrong(prompts, width, config, engine, faults, turns, by_segment):
    before, hooks.GRACE_SECONDS = hooks.GRACE_SECONDS, 0.02
    try:
        target = (Shop if turns else TreeRolloutScheduler)(segment_engine=Faulty(engine), tokenizer=FakeTokenizer())
        target.schedule, target.by_segment = faults, by_segment
        batch = requests(*[prompt for prompt in prompts for _ in range(width)], config=config, num_generations=width)
        answer = asyncio.run(serve(target, batch))
    finally:
        hooks.GRACE_SECONDS = before
    if isinstance(answer, RolloutFailure):
        assert answer.message.startswith('RolloutError: '), 'nothing unexpected'
        assert len(answer.message.split()) > 8 and 'None' not in answer.message and '\x1b' not in answer.message
    else:
        check_outputs(batch, answer, config)
    # What is left of the environments is none's.
    assert not turns or not target.baskets or 'hangs' in faults.kinds or 'start' in str(answer)


@given(PROMPTS, st.integers(1, 4), schedules(HOOKS), st.integers(0, 400))
@examples(10)
@example(['a'], 3, Schedule(0, 0.3, HOOKS), 0)
@example(['a', 'b'], 3, Schedule(0, 0, ()), 25)
def test_invariants_hold_in_colocate_mode_too(prompts, width, faults, last_step):
    """Hooks misbehave, and the engine may fail for good in a step."""

    def step(number: int) -> bool:
        if number == last_step:
            raise MemoryError('out of memory')
        return True

    class Colocated(Shop):
        schedule = faults

    config = QUICK.replace(max_depth=3, fallback='root')
    llm = Llm(before_step=step)
    before, hooks.GRACE_SECONDS = hooks.GRACE_SECONDS, 0.02
    batch = requests(*[prompt for prompt in prompts for _ in range(width)], config=config, num_generations=width)
    trees = ColocateTrees(SwiftEngine(llm), Colocated, config)
    try:
        check_outputs(batch, trees.rollout(batch, RequestConfig(max_tokens=24, temperature=1.0, seed=1)), config)
    except (RolloutError, EngineGone) as e:
        assert len(str(e).split()) > 8 and '\x1b' not in str(e)
    finally:
        hooks.GRACE_SECONDS = before
    assert trees._stepped.running == 0 and (not llm.requests or llm.steps == last_step)


@given(st.lists(st.sampled_from('abc'), min_size=1, max_size=3), st.integers(1, 6), configs(), st.integers(0, 99))
@examples(40)
def test_without_faults_the_trees_are_those_of_a_bare_search(prompts, width, config, seed):
    """A driver without retries, deadlines, checks or counts grows the same trees to the last bit."""
    if config.budget.policy == 'by_segment_tokens':
        config = config.replace(budget='by_width')
    batch = requests(*[prompt for prompt in prompts for _ in range(width)], config=config, num_generations=width)
    target = TreeRolloutScheduler(segment_engine=FakeEngine(), tokenizer=FakeTokenizer())
    request_config = RequestConfig(max_tokens=40, seed=seed)
    outputs = asyncio.run(target.rollout(batch, request_config, use_tqdm=False))

    notes = [RequestNote(config=config.to_dict(), num_generations=width) for _ in batch]
    bare = RolloutBatch(target._server(), config, [strip(r) for r in batch], notes, request_config, CpuClock())
    for group in bare._group():
        search = bare._new_search(group)
        prompt = list(batch[group.members[0]].messages[0]['content'].encode())
        search.set_prompt(prompt)
        grow(search, answer=lambda r: sample(prompt + response_ids(r.prefix), r.max_tokens, r.seed))  # noqa: B023
        for position, path in zip(group.members, search.tree.trajectories, strict=True):
            report = tree_of(outputs[position])
            assert report['stop'] == path.stop.value
            if not path.is_placeholder:
                assert outputs[position].response_token_ids == [response_ids(path.leaf)]
                assert report['nodes'] == [node.id for node in path.leaf.lineage()]


def strip(request: Any) -> Any:
    return replace(request, data_dict={})


def test_when_a_batch_ends_its_requests_have_ended_whatever_ended_it():
    """swift syncs weights as soon as `async_infer` has returned: nothing may still sample with the old ones."""

    class Lingers(FakeEngine):
        """As vLLM: a request that is left has ended only when its abort has been worked off."""

        async def generate(self, *args: Any, **options: Any) -> Any:
            self.open += 1
            try:
                async for segment in super().generate(*args, **options):
                    yield segment
            finally:
                for _ in range(20):
                    await asyncio.sleep(0)
                self.open -= 1

        open = 0

    def end(how: str) -> None:
        engine = Lingers()

        class Ends(TreeRolloutScheduler):
            async def check_segment(self, path: Any, text: str) -> Any:
                if how == 'fails' and path.leaf.depth == 2:
                    raise KeyError('board')
                if how == 'bug' and path.leaf.depth == 2:
                    engine.completion = None
                return StopReason.HOOK if how == 'stops' and path.leaf.depth == 2 else None

        async def run() -> None:
            target = Ends(segment_engine=engine, tokenizer=FakeTokenizer())
            batch = requests(*'aaaabbbb', config=TreeConfig(segment_length=4, max_depth=8))
            task = asyncio.ensure_future(target.async_infer(batch, RequestConfig(max_tokens=32)))
            if how == 'cancelled':
                while engine.open < 4:
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait({task})
            assert engine.open == engine.running == 0 and engine.requests > 3, how

        asyncio.run(run())

    for how in ('well', 'stops', 'fails', 'bug', 'cancelled'):
        end(how)
