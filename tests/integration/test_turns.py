"""Turns over the fake engine: swift's hooks, exact history, state that forks, and what hooks do wrong."""

from __future__ import annotations

import asyncio
import collections
import copy
import threading
from typing import Any

import pytest

pytest.importorskip('swift')

from swift.infer_engine import protocol
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rollout import MultiTurnScheduler
from swift.rollout.multi_turn import GYMScheduler, MathTipsScheduler

from tests.builders import EOS, decode, logprobs, sample, segment_of
from tests.flat import flat
from tests.integration.fake_engine import SEPARATOR, FakeEngine, FakeTokenizer
from tests.integration.test_scheduler import requests, rollout, tree_of
from treepo_swift.config import TreeConfig
from treepo_swift.core.search import Segment
from treepo_swift.core.tree import StopReason
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.wire.record import Moment, Scored, record_of
from treepo_swift.wire.report import TreeReport
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace

CONFIG = flat(segment_length=4, max_depth=8, answer='none')


def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
    """Short turns: a letter or two that depend on context and seed, and EOS."""
    return sample(context, max_tokens, seed, eos_every=3)


class Chat(MultiTurnScheduler):
    """Answers twice, as users write it for ms-swift."""

    questions = ('really', 'are you sure')

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn > len(self.questions) or super().check_finished(
            infer_request, response_choice, current_turn
        )

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': self.questions[current_turn - 1]})
        return {'infer_request': infer_request, 'rollout_infos': {f'turn {current_turn}': len(infer_request.messages)}}


class ChatTree(TreeRolloutScheduler, Chat):
    pass


class TipsTree(TreeRolloutScheduler, MathTipsScheduler):
    pass


def talk(
    cls: type = ChatTree,
    width: int = 8,
    *,
    config: TreeConfig = CONFIG,
    max_turns: int | None = None,
    engine: FakeEngine | None = None,
    prompt: str = 'prompt',
    data: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[RolloutOutput]:
    target = cls(
        segment_engine=engine or FakeEngine(speak=speak), max_turns=max_turns, tokenizer=FakeTokenizer(), **kwargs
    )
    batch = requests(*[prompt] * width, config=config)
    for request in batch:
        request.data_dict.update(data or {})
    return rollout(batch, target, seed=1)


def check_laws(outputs: list[RolloutOutput]) -> None:
    for output in outputs:
        assert len(output.response_token_ids) == len(output.response_loss_mask) == len(output.rollout_logprobs)
        for ids, mask, values in zip(output.response_token_ids, output.response_loss_mask, output.rollout_logprobs):
            assert len(ids) == len(mask) and sum(mask) == len(values)
            # The fake engine's log-prob belongs to its token: nothing that was not sampled is trained on.
            assert values == pytest.approx(logprobs([token for token, trained in zip(ids, mask) if trained]))
        assert sum(map(sum, output.response_loss_mask)) == sum(tree_of(output)['tokens'])


def test_a_turn_goes_on_from_all_tokens_of_the_turn_before():
    engine = FakeEngine(speak=speak)
    outputs = talk(engine=engine)
    check_laws(outputs)
    assert tree_of(outputs[0])['stats']['forks'] > 0
    for output in outputs:
        assert output.rollout_infos['num_turns'] == 3 == len(output.response_token_ids)
        assert [m['role'] for m in output.messages] == ['user', 'assistant'] * 3
        context = list(b'prompt')
        for ids, question in zip(output.response_token_ids, [*ChatTree.questions, None]):
            assert context in engine.inputs
            context += ids
            if question:
                context += [SEPARATOR, *question.encode()]
        assert [m['content'] for m in output.messages if m['role'] == 'assistant'] == [
            decode(ids) for ids in output.response_token_ids
        ]
        assert output.rollout_infos['turn 1'] == 3 and output.rollout_infos['turn 2'] == 5


@pytest.mark.parametrize('by_segment', [False, True])
@pytest.mark.parametrize(
    'fork_at, fork_position',
    [('both', 'boundary'), ('segment', 'boundary'), ('turn', 'boundary'), ('both', 'min_logprob_token')],
)
def test_shared_nodes_mean_shared_turns(by_segment, fork_at, fork_position):
    tree = type('Tree', (ChatTree,), {'by_segment': by_segment})
    config = flat(segment_length=2, max_depth=8, answer='none', fork_at=fork_at, root_divergence=1)
    if fork_position != 'boundary':
        config = config.replace(segment_length=3, fork_position=fork_position)
    outputs = talk(tree, config=config)
    check_laws(outputs)
    for a in outputs:
        for b in outputs:
            shared = 0
            for x, y, count in zip(tree_of(a)['nodes'], tree_of(b)['nodes'], tree_of(a)['tokens']):
                if x != y:
                    break
                shared += count
            sampled = [[token for ids in o.response_token_ids for token in ids] for o in (a, b)]
            assert sampled[0][:shared] == sampled[1][:shared]
    assert len({str(o.response_token_ids) for o in outputs}) > 4


def whole_turn(context: list[int], max_tokens: int, seed: int = 0) -> Segment:
    ids: list[int] = []
    while len(ids) < max_tokens and ids[-1:] != [EOS]:
        ids += speak(context + ids, min(4, max_tokens - len(ids)), 5).token_ids
    return segment_of(ids, StopReason.EOS if ids[-1] == EOS else None)


class SwiftEngine:
    """What swift's own `MultiTurnScheduler.run` asks of an engine, over the same fake language."""

    template = None

    def __init__(self) -> None:
        self.inner = FakeEngine(speak=speak)
        self.tokenizer = FakeTokenizer()

    async def infer_async(self, request, request_config):
        prompt = await self.inner.encode(request)
        segment = whole_turn(prompt.token_ids, request_config.max_tokens)
        ids = segment.token_ids
        reason = 'stop' if segment.stop else 'length'
        content = {'content': [{'logprob': value} for value in logprobs(ids)]}
        message = protocol.ChatMessage('assistant', decode(ids))
        choice = protocol.ChatCompletionResponseChoice(0, message, reason, content, token_ids=ids)
        return protocol.ChatCompletionResponse('fake', [choice], protocol.UsageInfo(0, 0, 0), id=request.uuid)


class Calculator(MultiTurnScheduler):
    """Goes on in its own message, as the tool-call scheduler of swift's examples does."""

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn == 3

    def step(self, infer_request, response_choice, current_turn):
        said = list(f'={current_turn}'.encode())
        infer_request.messages[-1]['content'] += f'={current_turn}'
        ids = response_choice.token_ids
        mask = [1] * len(ids) + [0] * len(said)
        ids.extend(said)
        return {
            'infer_request': infer_request,
            'response_token_ids': ids,
            'response_loss_mask': mask,
            'rollout_infos': {'said': current_turn},
        }


@pytest.mark.parametrize('scheduler', [Chat, MathTipsScheduler, Calculator])
@pytest.mark.parametrize('max_turns', [None, 2])
def test_a_tree_of_one_says_what_swift_says(scheduler, max_turns):
    """The same scheduler under swift's own `run` and as a tree of width 1, with the same language."""
    options = {'acc_function': lambda completions, solutions: [0.0]} if scheduler is MathTipsScheduler else {}
    swift = scheduler(SwiftEngine(), max_turns, tokenizer=FakeTokenizer(), **options)
    request = RolloutInferRequest(
        messages=[{'role': 'user', 'content': 'prompt'}], uuid='r', data_dict={'solution': '7'}
    )
    config = RequestConfig(max_tokens=64)
    expected = asyncio.run(swift.run(copy.deepcopy(request), config))

    tree = type('Tree', (TreeRolloutScheduler, scheduler), {})
    (got,) = talk(tree, 1, engine=FakeEngine(speak=whole_turn), max_turns=max_turns, data={'solution': '7'}, **options)
    assert got.response_token_ids == expected.response_token_ids
    assert got.response_loss_mask == expected.response_loss_mask
    assert [list(map(float, turn)) for turn in got.rollout_logprobs] == expected.rollout_logprobs
    infos = {key: value for key, value in got.rollout_infos.items() if key != 'tree'}
    assert infos == expected.rollout_infos
    assert [m['role'] for m in got.messages] == [m['role'] for m in expected.messages]
    assert got.messages[-1] == expected.messages[-1]
    assert got.response.choices[0].finish_reason == expected.response.choices[0].finish_reason


def test_inserted_tokens_are_masked_and_shared_by_the_forks_behind_them():
    outputs = talk(TipsTree, acc_function=lambda completions, solutions: [0.0], data={'solution': '7'})
    check_laws(outputs)
    tips = list(MathTipsScheduler.tips_prompt.encode())
    for output in outputs:
        (ids,), (mask,) = output.response_token_ids, output.response_loss_mask
        assert output.rollout_infos['num_turns'] == 2
        begin = mask.index(0)
        assert ids[begin : begin + len(tips)] == tips and mask[begin : begin + len(tips)] == [0] * len(tips)
        assert sum(mask) == len(mask) - len(tips)


def test_max_turns_and_real_limits_end_a_trajectory():
    class Endless(TreeRolloutScheduler):
        seen: list[tuple[str, int]] = []

        def check_finished(self, infer_request, response_choice, current_turn):
            self.seen.append((response_choice.finish_reason, current_turn))
            return super().check_finished(infer_request, response_choice, current_turn)

        def step(self, infer_request, response_choice, current_turn):
            infer_request.messages.append({'role': 'user', 'content': 'go on'})
            return {'infer_request': infer_request}

    outputs = talk(Endless, max_turns=4)
    assert {o.rollout_infos['num_turns'] for o in outputs} == {4}
    assert {reason for reason, _ in Endless.seen} == {'stop'}
    endless = talk(Endless, 2, engine=FakeEngine(speak=speak, max_model_len=80))
    assert {tree_of(o)['stop'] for o in endless} == {'context_limit'}
    assert {o.response.choices[0].finish_reason for o in endless} == {'length'}
    assert all(o.messages[-1]['role'] == 'assistant' for o in endless)
    check_laws(endless)
    # A turn that uses up its own tokens is of length `length`, which ends it by swift's own rule.
    Endless.seen.clear()
    long = talk(Endless, 2, engine=FakeEngine(speak=lambda c, n, s: segment_of([97 + s % 20] * n)))
    assert {reason for reason, _ in Endless.seen} == {'length'} and {o.rollout_infos['num_turns'] for o in long} == {1}


def test_an_early_stop_ends_the_turn_and_not_the_trajectory():
    """The answer of a first turn is not the last word, and does not end the second turn again."""

    def boxes_at_once(context, max_tokens, seed):
        ids = list(b'\\boxed{1}') if SEPARATOR not in context else [*b'no', EOS]
        return segment_of(ids[:max_tokens], StopReason.EOS if ids[-1] == EOS else None)

    class Again(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            return current_turn == 2

        def step(self, infer_request, response_choice, current_turn):
            infer_request.messages.append({'role': 'user', 'content': 'again'})
            return {'infer_request': infer_request}

    engine = FakeEngine(speak=boxes_at_once)
    outputs = talk(Again, 4, config=flat(segment_length=16, max_depth=4), engine=engine)
    for output in outputs:
        assert [decode(ids) for ids in output.response_token_ids] == ['\\boxed{1}', 'no']
        assert tree_of(output)['stop'] == 'eos'


# State that forks.


class Counter(TreeRolloutScheduler):
    """An environment that counts what it was told; a plain dict by uuid, as swift's GYMScheduler has."""

    copyable = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told: dict[str, list[str]] = {}
        self.started = 0

    async def on_trajectory_start(self, requests):
        for request in requests:
            self.started += 1
            self.told[request.uuid] = [] if self.copyable else [threading.Lock()]
            request.messages = [{'role': 'user', 'content': 'count with me'}]

    async def on_turn_end(self, infer_request, response_choice, current_turn):
        mine = self.told[infer_request.uuid]
        mine.append(response_choice.message.content)
        texts = [entry for entry in mine if isinstance(entry, str)]
        return {'done': len(texts) == 3, 'rollout_infos': {'texts': texts, 'total_reward': float(len(texts))}}

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': f'{len(self.told[infer_request.uuid])}'})
        return {'infer_request': infer_request}


class Uncopyable(Counter):
    copyable = False


@pytest.mark.parametrize('fork_position', ['boundary', 'max_entropy_token'])
@pytest.mark.parametrize('fork_state', ['copy', 'replay'])
def test_state_forks_with_its_path_and_is_released(fork_state, fork_position):
    config = flat(segment_length=4, max_depth=8, answer='none', fork_state=fork_state)
    if fork_position != 'boundary':
        # Forks only inside segments of turns: each begins anew from the state that its turn began with.
        config = config.replace(fork_position=fork_position, root_divergence=1, fork_at='segment', segment_length=3)
    target = (Counter if fork_state == 'copy' else Uncopyable)(
        segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer()
    )
    outputs = rollout(requests(*['a'] * 8, config=config), target, seed=1)
    check_laws(outputs)
    for output in outputs:
        said = [m['content'] for m in output.messages if m['role'] == 'assistant']
        assert output.rollout_infos['texts'] == said and len(said) == 3
        assert output.messages[0]['content'] == 'count with me'
    assert not target.told
    stats = tree_of(outputs[0])['stats']
    assert stats['forks'] > 0
    assert (stats['replayed_turns'] > 0) == (fork_state == 'replay')
    assert target.started > 1 if fork_state == 'replay' else target.started == 1


class Game(TreeRolloutScheduler):
    """Says a reward with its last turn: whether the reply to its question had an even first byte."""

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn == 2

    def on_turn_end(self, infer_request, response_choice, current_turn):
        won = response_choice.token_ids[0] % 2 == 0
        return {'rollout_infos': {'total_reward': float(won)} if current_turn == 2 else {}}

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': 'go on'})
        return {'infer_request': infer_request}


def test_paths_that_failed_are_sampled_more_densely_where_the_reward_is_known_in_time():
    config = flat(
        segment_length=8,
        max_depth=2,
        answer='none',
        root_divergence=8,
        pacing={1: 8},
        divergence=1,
        fork_at='turn',
        fallback_candidates='lowest_reward_first',
        fallback_cuts=3,
    )
    outputs = talk(Game, 17, config=config)
    reports = [tree_of(output) for output in outputs]
    rewards = [output.rollout_infos['total_reward'] for output in outputs]
    assert set(rewards) == {0.0, 1.0}
    chains = [i for i, report in enumerate(reports) if report['fallback_from'] is None]
    lost = {i for i in chains if rewards[i] == 0}
    cut = [report['fallback_from'] for report in reports if report['fallback_from'] is not None]
    # Nine branches are missing, three for each of three chains: none of a chain that has won.
    assert len(chains) == 8 and len(lost) >= 3 and len(cut) == 9
    assert set(cut) <= lost and set(collections.Counter(cut).values()) == {3}


def test_copied_and_replayed_state_grow_the_same_tree():
    def grown(cls, fork_state):
        config = flat(segment_length=4, max_depth=8, answer='none', fork_state=fork_state)
        return [(o.response_token_ids, o.messages, o.rollout_infos['texts']) for o in talk(cls, config=config)]

    # The locked list counts its lock: one more than the copy's.
    copied, replayed = grown(Counter, 'copy'), grown(Counter, 'replay')
    assert copied == replayed


def test_state_that_can_not_be_copied_says_so():
    outputs = talk(Uncopyable, 2, config=flat(segment_length=4, answer='none', max_failure_fraction=1.0))
    error = tree_of(outputs[0])['error']
    assert 'Uncopyable.fork_state after turn 1 on path' in error and 'fork_state: replay' in error


def test_an_environment_that_does_not_repeat_itself_can_not_be_replayed():
    class Moody(Counter):
        asked = 0

        def step(self, infer_request, response_choice, current_turn):
            type(self).asked += 1
            infer_request.messages.append({'role': 'user', 'content': f'{self.asked}'})
            return {'infer_request': infer_request}

    config = flat(segment_length=4, answer='none', fork_state='replay', max_failure_fraction=1.0)
    outputs = talk(Moody, config=config)
    stats = next(tree_of(o)['stats'] for o in outputs if 'stats' in tree_of(o))
    errors = [tree_of(o)['error'] for o in outputs if 'error' in tree_of(o)]
    assert stats['failures'] > 0 and all('Moody.step' in e and 'played again' in e for e in errors)


def test_states_are_released_when_a_rollout_is_cancelled():
    class Slow(Counter):
        async def on_turn_end(self, infer_request, response_choice, current_turn):
            await asyncio.sleep(60)

    target = Slow(segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer())

    async def cancelled():
        task = asyncio.ensure_future(
            target.rollout(requests(*['a'] * 4, config=CONFIG), RequestConfig(max_tokens=64), use_tqdm=False)
        )
        while not any('/' in state for state in target.told):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    assert not target.told


def test_state_that_a_step_began_forks_and_is_released_too():
    class Lazy(TreeRolloutScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen, self.others = {}, {'a': 1}

        def check_finished(self, infer_request, response_choice, current_turn):
            return current_turn == 3

        def step(self, infer_request, response_choice, current_turn):
            mine = self.seen.setdefault(infer_request.uuid, [])
            mine.append(response_choice.message.content)
            infer_request.messages.append({'role': 'user', 'content': '/'.join(mine)})
            return {'infer_request': infer_request}

    def grown(fork_state):
        target = Lazy(segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer())
        config = flat(segment_length=4, max_depth=8, answer='none', fork_state=fork_state)
        outputs = rollout(requests(*['a'] * 8, config=config), target, seed=1)
        assert not target.seen and target.others == {'a': 1}
        for output in outputs:
            said = [m['content'] for m in output.messages if m['role'] == 'assistant']
            assert output.messages[-2]['content'] == '/'.join(said[:2])
        return [output.messages for output in outputs]

    assert grown('copy') == grown('replay')


class FakeGame:
    """A gym environment that wants three answers; rewards differ from step to step."""

    def __init__(self, config):
        self.answers: list[str] = []

    async def reset(self, request):
        return 'play', {}, ''

    async def step(self, messages):
        self.answers.append(messages[-1]['content'])
        reward = float(len(self.answers[-1]))
        return f'next {len(self.answers)}', reward, len(self.answers) == 3, {}

    async def close(self):
        pass


def test_swifts_gym_scheduler_is_a_tree_by_its_base_class():
    from treepo_swift.server.gym import TreeGymScheduler

    class Game(TreeGymScheduler):
        def _create_env(self, env_config):
            return FakeGame(env_config)

    outputs = talk(Game)
    check_laws(outputs)
    for output in outputs:
        said = [m['content'] for m in output.messages if m['role'] == 'assistant']
        assert output.rollout_infos['step_rewards'] == [float(len(text)) for text in said]
        assert output.rollout_infos['total_reward'] == sum(output.rollout_infos['step_rewards'])
        assert output.rollout_infos['gym_done'] and output.rollout_infos['num_turns'] == 3
        assert [m['content'] for m in output.messages if m['role'] == 'user'] == ['play', 'next 1', 'next 2']
    assert issubclass(Game, GYMScheduler)


# What hooks do wrong.


def lenient(**kwargs: Any) -> TreeConfig:
    return flat(segment_length=4, max_depth=8, answer='none', max_failure_fraction=1.0, **kwargs)


def rewrites(request, choice, turn):
    request.messages[0]['content'] = 'something else'
    request.messages.append({'role': 'user', 'content': 'x'})
    return {'infer_request': request}


def appends(request, choice, turn, **more):
    request.messages.append({'role': 'user', 'content': 'x'})
    return {'infer_request': request, **more}


def changes_text(request, choice, turn):
    request.messages[-1]['content'] += ' and more'
    return appends(request, choice, turn)


WRONG_STEPS = {
    'raises': (lambda r, c, t: 1 / 0, 'raised ZeroDivisionError'),
    'wrong type': (lambda r, c, t: [r], 'allowed is a dict whose "infer_request"'),
    'no request': (lambda r, c, t: {}, 'allowed is a dict whose "infer_request"'),
    'rewrites history': (rewrites, 'rewrote the history at message 0'),
    'no messages': (lambda r, c, t: {'infer_request': RolloutInferRequest(messages=None)}, 'allowed is a list'),
    'strange messages': (
        lambda r, c, t: {'infer_request': RolloutInferRequest(messages=[*r.messages, 5])},
        "'int' object has no attribute 'get'",
    ),
    'drops history': (lambda r, c, t: {'infer_request': RolloutInferRequest(messages=[])}, 'rewrote the history'),
    'changes the text': (changes_text, 'changed the text of the reply without "response_token_ids"'),
    'mask length': (
        lambda r, c, t: appends(r, c, t, response_token_ids=c.token_ids, response_loss_mask=[1, 1, 1] * 9),
        'a response_loss_mask of 27 values',
    ),
    'mask values': (
        lambda r, c, t: appends(r, c, t, response_loss_mask=[2] * len(c.token_ids)),
        'allowed is a list of 0 and 1',
    ),
    'trains on its own tokens': (
        lambda r, c, t: appends(
            r, c, t, response_token_ids=[*c.token_ids, 65], response_loss_mask=[1] * (len(c.token_ids) + 1)
        ),
        'its response_loss_mask trains on token',
    ),
    'no token ids': (lambda r, c, t: appends(r, c, t, response_token_ids='text'), 'allowed is a list of token ids'),
    'log-probs': (lambda r, c, t: appends(r, c, t, rollout_logprobs=[0.5]), 'returned 1 rollout_logprobs'),
    'infos': (lambda r, c, t: appends(r, c, t, rollout_infos={'x': object()}), 'can not be sent as JSON'),
    'not a number': (lambda r, c, t: appends(r, c, t, rollout_infos={'x': float('nan')}), 'can not be sent as JSON'),
    'our infos': (lambda r, c, t: appends(r, c, t, rollout_infos={'tree': 1}), "without the key 'tree'"),
    'prefill': (
        lambda r, c, t: {'infer_request': r, 'x': r.messages.append({'role': 'assistant', 'content': 'I think'})},
        'appended an assistant message of its own',
    ),
    'unencodable': (
        lambda r, c, t: {'infer_request': r, 'x': r.messages.append({'role': 'user', 'content': 'unencodable'})},
        'the template can not encode',
    ),
}


@pytest.mark.parametrize('name', WRONG_STEPS)
def test_a_wrong_step_fails_its_own_path_and_is_named(name):
    step, complaint = WRONG_STEPS[name]

    class Wrong(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            return len(response_choice.token_ids) % 3 > 0 and current_turn == 1

        def step(self, infer_request, response_choice, current_turn):
            return step(infer_request, response_choice, current_turn)

    for seed in range(20):
        outputs = talk(Wrong, config=lenient(seed=seed))
        stats = next(tree_of(o)['stats'] for o in outputs if 'stats' in tree_of(o))
        failed = [tree_of(o)['error'] for o in outputs if 'error' in tree_of(o)]
        assert all('Wrong' in error and 'after turn 1 on path' in error and complaint in error for error in failed)
        assert all('Wrong.step' in error for error in failed) or name == 'strange messages'
        if stats['failures'] and len(failed) < 8:
            return  # The others' trajectories are healthy.
    assert name in failed or failed, f'{name} never failed'


@pytest.mark.parametrize(
    'hook, result, complaint',
    [
        ('on_turn_end', None, 'Wrong.on_turn_end after turn 1 on path'),
        ('on_turn_end', {'rollout_infos': [1]}, 'allowed is a dict'),
    ],
)
def test_other_hooks_that_return_rubbish_are_named_too(hook, result, complaint):
    class Wrong(ChatTree):
        async def on_turn_end(self, infer_request, response_choice, current_turn):
            return result

    outputs = talk(Wrong, 2, config=lenient())
    assert all(complaint in tree_of(o)['error'] for o in outputs)


def test_swifts_placeholder_starts_no_environment():
    """A server without requests this time gets one of these, to ignore the answer."""
    from treepo_swift.server.scheduler import SWIFT_PLACEHOLDER

    target = Counter(segment_engine=FakeEngine(speak=whole_turn), tokenizer=FakeTokenizer())
    outputs = rollout([RolloutInferRequest(messages=list(SWIFT_PLACEHOLDER), uuid='x')], target)
    assert len(outputs) == 1 and target.started == 0


def test_an_environment_that_can_not_start_fails_its_tree_and_no_other():
    class Picky(ChatTree):
        async def on_trajectory_start(self, requests):
            if requests[0].messages[0]['content'] == 'bad':
                raise RuntimeError('no such level')

    batch = requests(*['bad'] * 2, *['good'] * 4, config=lenient())
    target = Picky(segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer())
    outputs = rollout(batch, target, seed=1)
    assert [tree_of(o)['stop'] == 'failed' for o in outputs] == [True] * 2 + [False] * 4
    assert (
        'Picky.on_trajectory_start at the root of tree request-0: raised RuntimeError: no such level'
        in tree_of(outputs[0])['error']
    )


@pytest.mark.parametrize('kind', ['async', 'sync'])
def test_two_hundred_slow_tools_run_at_the_same_time(kind):
    """None of them ends before all of them have begun."""
    count, begun = 200, []
    everybody, barrier = asyncio.Event(), threading.Barrier(count)

    class Sync(ChatTree):
        questions = ('go on',)

        def step(self, infer_request, response_choice, current_turn):
            barrier.wait(timeout=50)
            return super().step(infer_request, response_choice, current_turn)

    class Async(ChatTree):
        questions = ('go on',)

        async def step(self, infer_request, response_choice, current_turn):
            begun.append(infer_request.uuid)
            if len(begun) == count:
                everybody.set()
            await everybody.wait()
            return super().step(infer_request, response_choice, current_turn)

    target = (Sync if kind == 'sync' else Async)(
        segment_engine=FakeEngine(speak=lambda c, n, s: segment_of([97 + s % 20, EOS], StopReason.EOS)),
        tokenizer=FakeTokenizer(),
    )
    outputs = rollout(requests(*[f'p{i}' for i in range(count)], config=CONFIG), target, seed=1)
    assert all(o.rollout_infos['num_turns'] == 2 for o in outputs)


def test_images_of_a_step_reach_the_engine_and_overrides_the_trainer():
    class Looks(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            return current_turn == 2

        def step(self, infer_request, response_choice, current_turn):
            infer_request.images.append('second.png')
            infer_request.messages.append({'role': 'tool', 'content': 'look'})
            return {'infer_request': infer_request, 'rollout_infos': {'images': list(infer_request.images)}}

    engine = FakeEngine(speak=speak)
    target = Looks(segment_engine=engine, tokenizer=FakeTokenizer())
    batch = requests(*['a'] * 4, config=CONFIG)
    for request in batch:
        request.images = ['first.png']
    outputs = rollout(batch, target, seed=1)
    assert all(o.rollout_infos['images'] == ['first.png', 'second.png'] for o in outputs)
    seen = {str(prompt.engine_inputs) for prompt in engine.prompts}
    assert seen == {"{'images': ['first.png']}", "{'images': ['first.png', 'second.png']}"}
    assert all(prompt.token_ids == [97] for prompt in engine.prompts)


def test_evaluation_and_single_requests_take_turns_too():
    target = ChatTree(segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer())
    outputs = rollout(requests('a', 'b', mode='independent'), target)
    assert all(o.rollout_infos['num_turns'] == 3 and 'tree' not in o.rollout_infos for o in outputs)


def test_a_trace_holds_what_environments_said():
    batch = requests(*['prompt'] * 4, config=CONFIG)
    for request in batch:
        request.data_dict['treepo'] = {**request.data_dict['treepo'], 'trace': True}
    outputs = rollout(batch, ChatTree(segment_engine=FakeEngine(speak=speak), tokenizer=FakeTokenizer()), seed=1)
    trace = TreeTrace.from_dict(outputs[0].rollout_infos[TRACE_KEY])
    said = [node for node in trace.nodes if not node.sampled]
    assert {decode(node.token_ids).strip('|') for node in said} == {*ChatTree.questions}
    assert not any(node.logprobs for node in said)
    scored = [Scored(TreeReport.from_dict(tree_of(o)), 1.0, {'right': 1.0}, 0.5, None) for o in outputs]
    record = record_of(trace, scored, Moment('now', 1, 'train', 'treepo', 'whiten'))
    for path, output in zip(record.paths(), outputs, strict=True):
        sampled = [token for node in path if node.kind == 'segment' for token in node.tokens]
        assert sampled == [token for turn in output.response_token_ids for token in turn]
        assert [node.kind for node in path].count('environment') == 2
