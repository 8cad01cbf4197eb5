"""The scheduler with swift's real request and output objects, over an engine that needs no model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import random
import threading
import time
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('swift')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput

from tests.builders import EOS, decode, logprobs, sample, segment_of
from tests.flat import changed, flat
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.policies.answers import register_answer
from treepo_swift.core.search import Segment
from treepo_swift.core.tree import StopReason
from treepo_swift.server.engine import EngineError
from treepo_swift.server.scheduler import RolloutError, RolloutFailure, TreeRolloutScheduler
from treepo_swift.wire.note import PROTOCOL, RequestNote
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace

CONFIG = flat(segment_length=16, max_depth=4)


def scheduler(engine: FakeEngine | None = None, cls: type = TreeRolloutScheduler) -> TreeRolloutScheduler:
    return cls(segment_engine=engine or FakeEngine(), tokenizer=FakeTokenizer())


def requests(
    *prompts: str, config: TreeConfig = CONFIG, num_generations: int | None = None, mode: str = 'tree'
) -> list[RolloutInferRequest]:
    note = RequestNote(mode=mode, config=config.to_dict(), num_generations=num_generations).to_dict()
    return [
        RolloutInferRequest(
            messages=[{'role': 'user', 'content': prompt}], uuid=f'request-{index}', data_dict={'treepo': note}
        )
        for index, prompt in enumerate(prompts)
    ]


def rollout(
    batch: list[RolloutInferRequest], target: TreeRolloutScheduler | None = None, **config
) -> list[RolloutOutput]:
    request_config = RequestConfig(**{'max_tokens': 64, 'return_details': True, 'logprobs': True, **config})
    return asyncio.run((target or scheduler()).rollout(batch, request_config, use_tqdm=False))


def tree_of(output: RolloutOutput) -> dict:
    return output.rollout_infos['tree']


def test_every_request_gets_its_own_output_in_order():
    batch = requests('a', 'b', 'a', 'b', 'a', 'a')
    outputs = rollout(batch)
    assert [o.response.id for o in outputs] == [r.uuid for r in batch]
    assert [o.messages[0]['content'] for o in outputs] == ['a', 'b', 'a', 'b', 'a', 'a']
    ids = [tree_of(o)['id'] for o in outputs]
    assert ids[0] == ids[2] == ids[4] == ids[5] != ids[1] == ids[3]


def test_tokens_mask_and_logprobs_are_those_sampled():
    engine = FakeEngine()
    for output in rollout(requests(*['prompt'] * 8), scheduler(engine)):
        (ids,) = output.response_token_ids
        assert output.response_loss_mask == [[1] * len(ids)]
        assert output.rollout_logprobs == [logprobs(ids)]
        assert output.messages[-1] == {'role': 'assistant', 'content': decode(ids)}
        report = tree_of(output)
        assert sum(report['tokens']) == len(ids) and len(report['nodes']) == len(report['tokens']) == report['depth']
        # Every prefix at a segment boundary was an engine input, ids unchanged.
        position = 0
        for tokens in report['tokens']:
            assert list(b'prompt') + ids[:position] in engine.inputs
            position += tokens


def test_shared_nodes_mean_shared_tokens():
    outputs = rollout(requests(*['prompt'] * 8))
    for a in outputs:
        for b in outputs:
            shared = 0
            for x, y, count in zip(tree_of(a)['nodes'], tree_of(b)['nodes'], tree_of(a)['tokens']):
                if x != y:
                    break
                shared += count
            assert a.response_token_ids[0][:shared] == b.response_token_ids[0][:shared]


def test_a_trace_goes_with_the_first_trajectory_where_it_is_asked_for():
    def traces(batch, *, trace, rate=1.0):
        note = RequestNote(config={'trace': {'rate': rate}, 'segment_length': 16, 'max_depth': 4}, trace=trace)
        for request in batch:
            request.data_dict = {'treepo': note.to_dict()}
        return [output.rollout_infos.get(TRACE_KEY) for output in rollout(batch)]

    prompts = [*'aabbcc']
    assert traces(requests(*prompts), trace=False) == [None] * 6
    assert traces(requests(*prompts), trace=True, rate=0.0) == [None] * 6
    found = traces(requests(*prompts), trace=True)
    assert [value is not None for value in found] == [True, False] * 3
    trace = TreeTrace.from_dict(json.loads(json.dumps(found[2])))
    assert trace.prompt_ids == list(b'b') and len(trace.leaves) == 2 and all(node.logprobs for node in trace.nodes)


def test_a_prompt_that_occurs_twice_makes_two_trees_of_num_generations():
    outputs = rollout(requests(*['same'] * 8, num_generations=4))
    ids = [tree_of(o)['id'] for o in outputs]
    assert ids[:4] == [ids[0]] * 4 and ids[4:] == [ids[4]] * 4 and ids[0] != ids[4]
    assert [o.response_token_ids for o in outputs[:4]] != [o.response_token_ids for o in outputs[4:]]


def test_a_group_of_one_and_evaluation_are_plain_sampling():
    engine = FakeEngine(speak=lambda context, max_tokens, seed: Segment([97] * max_tokens, [-1.0] * max_tokens))
    outputs = rollout(requests('a', 'b', 'b', mode='independent'), scheduler(engine))
    assert len(engine.inputs) == 3 and all('tree' not in o.rollout_infos for o in outputs)
    assert [len(o.response_token_ids[0]) for o in outputs] == [64] * 3
    (single,) = rollout(requests('a'), scheduler(engine))
    assert len(single.response_token_ids[0]) == 64 and tree_of(single)['depth'] == 1


def test_evaluation_ends_where_training_paths_end_and_takes_the_trainers_hook_deadline():
    def talk_on(context, max_tokens, seed):
        return Segment([97] * max_tokens, [-1.0] * max_tokens)

    class Slow(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            time.sleep(0.3 if 'slow' in infer_request.messages[0]['content'] else 0)
            return True

    hasty = changed(CONFIG, hook_timeout=0.1, branching='entropy', max_failure_fraction=1.0)
    target = scheduler(FakeEngine(speak=talk_on), Slow)
    asked: list[int] = []
    begin_batch = target._engine.begin_batch

    async def watch(request_config, *, top_logprobs=0, **options):
        asked.append(top_logprobs)
        await begin_batch(request_config, top_logprobs=top_logprobs, **options)

    target._engine.begin_batch = watch
    healthy, slow = rollout(requests('a', 'slow', mode='independent', config=hasty), target, max_tokens=200)
    assert len(healthy.response_token_ids[0]) == CONFIG.max_response_tokens == 64
    assert 'hook_timeout=0.1' in slow.rollout_infos['tree_failure'] and 'tree_failure' not in healthy.rollout_infos
    assert asked == [0], 'nobody forks in an evaluation'
    (without_config,) = rollout(
        [RolloutInferRequest(messages=[{'role': 'user', 'content': 'a'}], data_dict={'treepo': BARE_EVALUATION})],
        target,
        max_tokens=200,
    )
    assert len(without_config.response_token_ids[0]) == 200


BARE_EVALUATION = RequestNote(mode='independent').to_dict()


def test_one_seed_one_batch_and_request_order_only_permutes():
    batch = requests(*'aabbaabb')
    first, again = rollout(batch, seed=7), rollout(batch, seed=7)
    assert [o.response_token_ids for o in first] == [o.response_token_ids for o in again]
    order = list(range(8))
    random.Random(1).shuffle(order)
    permuted = rollout([batch[i] for i in order], seed=7)

    def answers(outputs):
        return sorted((o.messages[0]['content'], o.response_token_ids[0]) for o in outputs)

    assert answers(permuted) == answers(first)


def test_data_of_the_dataset_keeps_groups_apart_and_reaches_nobody_else():
    batch = requests('a', 'a', 'a', 'a')
    for index, request in enumerate(batch):
        request.data_dict['solution'] = str(index % 2)
    ids = [tree_of(o)['id'] for o in rollout(batch)]
    assert ids[0] == ids[2] != ids[1] == ids[3]


def test_a_template_option_of_a_sample_keeps_its_prompt_apart():
    batch = requests('a', 'a', 'a', 'a')
    for index, request in enumerate(batch):
        request.chat_template_kwargs = {'enable_thinking': index % 2 == 0}
    ids = [tree_of(o)['id'] for o in rollout(batch)]
    assert ids[0] == ids[2] != ids[1] == ids[3]


@given(st.text(max_size=12), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_stop_strings_that_span_segments_cut_the_path_where_plain_sampling_would(word, length):
    """The fake engine spells `text`; it looks for no stop strings itself, as vLLM does not across requests."""
    text = ('x' * 7 + 'STOP' + 'y' * 20).encode()

    def spell(context, max_tokens, seed):
        begin = len(context) - len(b'prompt')
        ids = list(text[begin : begin + max_tokens])
        inside = decode(ids).find('STOP')
        if inside >= 0:  # what vLLM would see within one request
            return Segment(ids[: inside + 4], [-1.0] * (inside + 4), StopReason.STOP_STRING)
        return Segment(ids, [-1.0] * len(ids))

    config = flat(segment_length=length, max_depth=30)
    outputs = rollout(requests('prompt', 'prompt', config=config), scheduler(FakeEngine(speak=spell)), stop=['STOP'])
    assert [decode(o.response_token_ids[0]) for o in outputs] == ['x' * 7 + 'STOP'] * 2
    assert {tree_of(o)['stop'] for o in outputs} == {'stop_string'}


def test_an_answer_that_spans_two_segments_stops_the_path():
    text = b'so it is \\boxed{12345} and so on and on and on'

    def spell(context, max_tokens, seed):
        begin = len(context) - len(b'prompt')
        ids = list(text[begin : begin + max_tokens])
        return Segment(ids, [-1.0] * len(ids))

    outputs = rollout(
        requests('prompt', 'prompt', config=flat(segment_length=16, max_depth=3)),
        scheduler(FakeEngine(speak=spell)),
    )
    assert [tree_of(o)['stop'] for o in outputs] == ['answer'] * 2
    assert all(len(o.response_token_ids[0]) == 32 and o.response.choices[0].finish_reason == 'stop' for o in outputs)


def test_multibyte_characters_across_segments_come_out_whole():
    text = ('é漢🙂' * 7).encode()
    seen = []

    class Watch(TreeRolloutScheduler):
        def check_segment(self, path, text):
            seen.append(text)

    def spell(context, max_tokens, seed):
        begin = len(context) - len(b'prompt')
        ids = list(text[begin : begin + max_tokens])
        return Segment(ids, [-1.0] * len(ids), None if ids and begin + max_tokens < len(text) else StopReason.EOS)

    rollout(
        requests('prompt', 'prompt', config=flat(segment_length=5, max_depth=40)),
        scheduler(FakeEngine(speak=spell), Watch),
    )
    assert max(seen, key=len) == text.decode()
    assert all('\ufffd' not in t and text.decode().startswith(t) for t in seen)


# Faults.


def test_engine_errors_are_retried_and_then_grown_around():
    outputs = rollout(requests(*['a'] * 8), scheduler(FakeEngine(fails=lambda call: call % 2 == 1)))
    assert all(tree_of(o)['stop'] != 'failed' for o in outputs)


def test_an_engine_that_is_gone_is_one_clear_error():
    with pytest.raises(RolloutError, match='4 of 4 trajectories failed.*\n.*CUDA error'):
        rollout(requests(*['a'] * 4), scheduler(FakeEngine(fails=lambda call: True)))


def test_one_bad_prompt_becomes_masked_placeholders_and_leaves_the_others_alone():
    outputs = rollout(requests('unencodable', 'unencodable', *['a'] * 4))
    for output in outputs[:2]:
        assert tree_of(output)['stop'] == 'failed' and 'no such image' in tree_of(output)['error']
        assert output.response_loss_mask == [[0]] and output.rollout_logprobs == [[]]
        assert output.response_token_ids == [[EOS]]
    assert all(tree_of(o)['stop'] != 'failed' for o in outputs[2:])


def test_a_prompt_without_room_for_an_answer_becomes_placeholders():
    outputs = rollout(requests('x' * 100, 'x' * 100, *['a'] * 4), scheduler(FakeEngine(max_model_len=100)))
    assert [tree_of(o)['stop'] == 'failed' for o in outputs] == [True, True, False, False, False, False]


class Raises(TreeRolloutScheduler):
    def check_segment(self, path, text):
        raise KeyError('board')


class Exits(TreeRolloutScheduler):
    def check_segment(self, path, text):
        raise SystemExit(1)


class CancelsItself(TreeRolloutScheduler):
    async def check_segment(self, path, text):
        raise asyncio.CancelledError


class ReturnsRubbish(TreeRolloutScheduler):
    def check_segment(self, path, text):
        return 'stop'


class Hangs(TreeRolloutScheduler):
    def check_segment(self, path, text):
        time.sleep(1)


@pytest.mark.parametrize(
    'cls, cause',
    [
        (Raises, "Raises.check_segment on segment 1 of path .* of tree .* raised KeyError: 'board'"),
        (Exits, 'Exits.check_segment .*SystemExit'),
        (CancelsItself, 'CancelsItself.check_segment .* raised CancelledError'),
        (ReturnsRubbish, "ReturnsRubbish.check_segment .* returned 'stop', allowed are a StopReason or None"),
        (Hangs, 'Hangs.check_segment .* took more than hook_timeout=0.05 s'),
    ],
)
def test_bad_hooks_are_named(cls, cause):
    config = flat(segment_length=16, max_depth=4, hook_timeout=0.05)
    with pytest.raises(RolloutError, match=cause):
        rollout(requests('a', 'a', config=config), scheduler(cls=cls))


def test_hooks_may_be_sync_or_async_and_stop_paths():
    class Sync(TreeRolloutScheduler):
        def check_segment(self, path, text):
            assert threading.current_thread().name.startswith('treepo-hook')
            return StopReason.HOOK if path.leaf.depth == 2 else None

    class Async(TreeRolloutScheduler):
        async def check_segment(self, path, text):
            await asyncio.sleep(0)
            return StopReason.HOOK if path.leaf.depth == 2 else None

    quiet = FakeEngine(speak=lambda context, max_tokens, seed: Segment([97] * max_tokens, [-1.0] * max_tokens))
    for cls in (Sync, Async):
        outputs = rollout(requests(*['a'] * 4), scheduler(quiet, cls))
        assert {(tree_of(o)['stop'], tree_of(o)['depth']) for o in outputs} == {('hook', 2)}


def test_check_finished_sees_the_whole_turn_with_swifts_signature():
    seen = []

    class Watch(TreeRolloutScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            seen.append(
                (
                    infer_request.messages[-1]['content'],
                    response_choice.message.content,
                    response_choice.finish_reason,
                    current_turn,
                    len(response_choice.token_ids),
                )
            )
            return True

    outputs = rollout(requests(*['a'] * 4), scheduler(cls=Watch))
    assert sorted(s[0] for s in seen) == sorted(o.messages[-1]['content'] for o in outputs)
    assert all(a == b and reason in ('stop', 'length') and turn == 1 for a, b, reason, turn, _ in seen)


def test_a_scheduler_with_a_run_of_its_own_is_refused_at_once():
    class Own(TreeRolloutScheduler):
        async def run(self, infer_request, request_config, **kwargs):
            return []

    with pytest.raises(NotImplementedError, match='Own.run: trees .* would never call it'):
        scheduler(cls=Own)


def test_when_a_rollout_ends_nothing_of_it_is_alive():
    engine = FakeEngine()

    async def cancelled() -> int:
        target = scheduler(engine)
        task = asyncio.ensure_future(target.rollout(requests(*['a'] * 8), RequestConfig(max_tokens=64), use_tqdm=False))
        while engine.running == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert asyncio.run(cancelled()) == 1 and engine.running == 0


class SlowToAbort(FakeEngine):
    """As vLLM: a request that is left early is aborted by a message, which takes a turn of the event loop or two."""

    open = 0

    async def generate(self, *args, **kwargs):
        self.open += 1
        try:
            async with aclosing(super().generate(*args, **kwargs)) as segments:
                async for segment in segments:
                    yield segment
        finally:
            await asyncio.sleep(0.01)
            self.open -= 1


@pytest.mark.parametrize('seed', range(5))
def test_requests_of_paths_that_stop_are_aborted_to_the_end(seed):
    engine = SlowToAbort()
    rollout(
        requests(*'aaaabbbb', config=changed(CONFIG, segment_length=8, max_depth=8)),
        scheduler(engine),
        seed=seed,
    )
    assert engine.open == 0 and engine.running == 0


def test_a_tree_that_gives_up_aborts_what_still_runs():
    class Fails(TreeRolloutScheduler):
        def check_segment(self, path, text):
            if path.id != 1:
                raise KeyError('board')

    config = changed(CONFIG, segment_length=4, max_depth=16, max_failure_fraction=1.0)
    engine = SlowToAbort()
    outputs = rollout(requests(*'aaaa', config=config), scheduler(engine, Fails))
    assert {tree_of(o)['stop'] for o in outputs} == {'failed'}
    assert engine.open == 0 and engine.running == 0


# What the trainer and the server tell each other.


def test_a_trainer_without_the_plugin_is_told_so():
    batch = [RolloutInferRequest(messages=[{'role': 'user', 'content': 'a'}])] * 2
    failure = asyncio.run(scheduler().async_infer(batch, RequestConfig(max_tokens=8)))
    failure = pickle.loads(pickle.dumps(failure))  # it crosses swift's pipe
    assert isinstance(failure, RolloutFailure)
    from fastapi import HTTPException

    with pytest.raises(HTTPException) as caught:
        list(failure)
    assert caught.value.status_code == 500 and '--external_plugins' in caught.value.detail


def test_the_plain_trainer_may_be_allowed(monkeypatch):
    monkeypatch.setenv('TREEPO_CHECKS__REQUIRE_TRAINER', 'false')
    monkeypatch.setenv('TREEPO_SEGMENT_LENGTH', '16')
    batch = [RolloutInferRequest(messages=[{'role': 'user', 'content': 'a'}]) for _ in range(3)]
    assert len({tree_of(o)['id'] for o in rollout(batch)}) == 1


def test_another_protocol_version_is_refused():
    batch = requests('a')
    batch[0].data_dict['treepo']['protocol'] = 99
    with pytest.raises(ValueError, match=f'protocol 99, this server {PROTOCOL}'):
        rollout(batch)


def test_the_trainers_config_wins_and_is_checked_against_the_engine():
    with pytest.raises(ConfigError, match='16 x 512 = 8192 tokens is over --vllm_max_model_len = 4096'):
        rollout(requests('a', 'a', config=flat(segment_length=512, max_depth=16)))


def test_segments_that_do_not_fit_the_kv_block_are_warned_of(monkeypatch):
    messages = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)
    rollout(requests('a', 'a', config=flat(segment_length=24, max_depth=2)))
    rollout(requests('a', 'a'))
    assert len(messages) == 1 and 'segment_length=24 is not a multiple' in messages[0]


def test_a_group_that_is_not_whole_is_warned_of_once(monkeypatch):
    messages = []
    monkeypatch.setattr('treepo_swift.server.scheduler.logger.warning', messages.append)
    outputs = rollout(requests('a', 'a', 'b', num_generations=4))
    assert len(outputs) == 3 and len(messages) == 1 and 'is smaller than --num_generations' in messages[0]


@pytest.mark.parametrize(
    'option, message',
    [
        ({'n': 2}, 'n=2'),
        ({'presence_penalty': 0.5}, 'presence_penalty=0.5'),
        ({'structured_outputs_regex': 'a+'}, 'structured_outputs_regex'),
    ],
)
def test_sampling_options_that_segments_can_not_keep_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        rollout(requests('a', 'a'), **option)


def test_probes_are_answered_with_engine_and_scores():
    note = RequestNote(mode='probe', token_ids=[5, 6, 7]).to_dict()
    (output,) = rollout([RolloutInferRequest(messages=[{'role': 'user', 'content': 'x'}], data_dict={'treepo': note})])
    assert output.rollout_infos['treepo']['logprobs'] == [-6.0, -7.0]
    assert output.rollout_infos['treepo']['engine']['max_model_len'] == 4096


def test_a_probe_is_asked_of_the_engine_again_as_segments_are(monkeypatch):
    """One engine error in the proof of a weight sync must not end a training."""
    monkeypatch.setenv('TREEPO_FAULTS__STALL_TIMEOUT', '0.2')

    class Flaky(FakeEngine):
        async def score(self, token_ids):
            self.asked = getattr(self, 'asked', 0) + 1
            if self.asked == 1:
                raise RuntimeError('CUDA error')
            if self.asked == 2 or self.gone:
                await asyncio.sleep(3600)  # lost
            return await super().score(token_ids)

        gone = False

    note = RequestNote(mode='probe', token_ids=[5, 6, 7]).to_dict()
    request = RolloutInferRequest(messages=[{'role': 'user', 'content': 'x'}], data_dict={'treepo': note})
    target = scheduler(Flaky())
    (output,) = rollout([request], target)
    assert output.rollout_infos['treepo']['logprobs'] == [-6.0, -7.0] and target._engine.asked == 3
    target._engine.gone = True
    with pytest.raises(EngineError, match=r'could not score 3 tokens: TimeoutError \(after 3 attempts\)'):
        rollout([request], target)


def test_swifts_own_placeholder_request_is_served_quietly():
    (output,) = rollout([RolloutInferRequest(messages=[{'role': 'user', 'content': '<placeholder>'}])])
    assert 'tree' not in output.rollout_infos


def test_reports_are_small_and_json():
    config = flat(segment_length=16, max_depth=14, stop_at_repetition=False)
    quiet = FakeEngine(speak=lambda context, max_tokens, seed: Segment([97] * max_tokens, [-1.0] * max_tokens))
    outputs = asyncio.run(
        scheduler(quiet).rollout(requests(*['a'] * 16, config=config), RequestConfig(max_tokens=224), use_tqdm=False)
    )
    sizes = [len(json.dumps(tree_of(o))) for o in outputs]
    assert max(sizes) < 800 and all(tree_of(o)['depth'] == 14 for o in outputs)


def test_typos_raise_instead_of_reading_none():
    with pytest.raises(AttributeError, match='no attribute .*max_tree_width'):
        _ = scheduler().max_tree_width


def test_engine_errors_count_as_node_failures_in_the_stats():
    outputs = rollout(
        requests(*['a'] * 4, config=flat(segment_length=16, max_depth=4, max_retries=0)),
        scheduler(FakeEngine(fails=lambda call: call == 1)),
    )
    assert sum(tree_of(o).get('stats', {}).get('failures', 0) for o in outputs) == 1
    assert issubclass(EngineError, RuntimeError)


def words(*segments: str):
    """An engine that says these texts, segment by segment, and EOS when a segment is shorter than was asked for."""

    def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
        said = len(context) - len(b'prompt')
        text = ''.join(segments)
        ids = list(text.encode())[said : said + max_tokens]
        stop = None if len(ids) == max_tokens else StopReason.EOS
        return segment_of([*ids, EOS] if stop else ids, stop)

    return FakeEngine(speak=speak)


def stops(engine: FakeEngine, count: int = 2, **config) -> list[tuple[str, str]]:
    settings = flat(**{'segment_length': 16, 'max_depth': 4, 'root_divergence': 1, 'fallback': 'none', **config})
    outputs = rollout(requests(*['prompt'] * count, config=settings), scheduler(engine))
    return [(tree_of(o)['stop'], o.messages[-1]['content']) for o in outputs]


def test_an_answer_is_found_across_segments_and_cut_where_asked():
    text = 'so it is \\boxed{12} and more words follow here until the end'
    assert stops(words(text))[0] == ('answer', text[:32])
    assert stops(words(text), after_answer='cut')[0] == ('answer', 'so it is \\boxed{12}')
    config = flat(segment_length=16, max_depth=4, root_divergence=1, fallback='none', after_answer='cut')
    cut = rollout(requests('prompt', 'prompt', config=config), scheduler(words(text)))[0]
    assert tree_of(cut)['tokens'] == [16, 3] and len(cut.rollout_logprobs[0]) == 19


def test_an_answer_may_need_eos():
    text = 'it is \\boxed{12} or so, I think, yes'
    assert stops(words(text), answer_needs_eos=True)[0] == ('answer', text)
    assert stops(words(text), answer_needs_eos=True, answer='none')[0] == ('eos', text)
    assert stops(words('I never answer.'), answer_needs_eos=True)[0] == ('eos', 'I never answer.')


def test_tags_are_answers_too():
    text = 'thinking <answer>12</answer> and more and more and more'
    assert stops(words(text), answer='tags')[0] == ('answer', text[:32])
    assert (
        stops(words(text.replace('answer', 'final')), answer='tags', answer_tags=['<final>', '</final>'])[0][0]
        == 'answer'
    )
    assert stops(words(text))[0][0] == 'eos'


def test_the_first_reason_in_stop_order_counts():
    text = 'ab' * 20 + ' \\boxed{1} '
    settings = {'repetition_length': 8, 'repetition_count': 4, 'segment_length': 64}
    assert stops(words(text), **settings)[0][0] == 'answer'
    assert stops(words(text), **settings, stop_order=['repetition'])[0][0] == 'repetition'
    assert stops(words(text), **settings, stop_at_repetition=False, stop_order=['eos'])[0][0] == 'eos'


def test_an_answer_detector_that_raises_fails_only_its_paths():
    @register_answer('test_odd')
    def odd(text: str) -> bool:
        raise KeyError('odd')

    config = flat(segment_length=16, answer='test_odd', max_failure_fraction=1.0)
    outputs = rollout(requests('prompt', 'prompt', config=config), scheduler(words('some text')))
    assert [tree_of(o)['stop'] for o in outputs] == ['failed'] * 2
    assert "stop.answer.detector='test_odd' on segment 1 of path" in tree_of(outputs[0])['error']
    assert "raised KeyError: 'odd'" in tree_of(outputs[0])['error']


@pytest.mark.parametrize(
    'config, message',
    [
        (flat(branching='odd'), "Unknown branching policy 'odd': allowed are entropy"),
        (flat(fallback='odd'), "Unknown fallback 'odd': allowed are"),
        (flat(fork_position='odd'), "Unknown fork position 'odd': allowed are"),
        (flat(fork_position={'policy': 'max_entropy_token', 'top_k': 21}), r'fork_position.top_k=21: this server'),
        (flat(answer='odd'), "Unknown answer detector 'odd': allowed are"),
        (flat(branching='entropy', entropy_top_k=21), 'this server returns at most 20 log-probs'),
        (flat(budget='by_segment_tokens', budget_tokens=1000), '2 prompts of a batch need at least a segment'),
    ],
)
def test_a_config_that_this_server_can_not_follow_is_refused(config, message):
    config = changed(config, segment_length=512, max_depth=2)
    with pytest.raises((ConfigError, ValueError), match=message):
        rollout(requests('a', 'b', 'a', 'b', config=config))


@pytest.mark.parametrize(
    'keys, asked',
    [
        ({}, 0),
        ({'branching': {'policy': 'entropy', 'top_k': 5}}, 5),
        ({'fork_position': {'policy': 'max_entropy_token', 'top_k': 7}}, 7),
        ({'fallback': {'policy': 'max_entropy_token', 'top_k': 6}}, 6),
        (
            {
                'fork_position': {'policy': 'max_entropy_token', 'top_k': 7},
                'branching': {'policy': 'entropy', 'top_k': 9},
            },
            9,
        ),
    ],
)
def test_entropies_are_asked_for_where_a_policy_reads_them(keys, asked, monkeypatch):
    heard = []
    begin = FakeEngine.begin_batch

    async def begin_batch(self, request_config, *, top_logprobs=0, **options):
        heard.append(top_logprobs)
        await begin(self, request_config, top_logprobs=top_logprobs, **options)

    monkeypatch.setattr(FakeEngine, 'begin_batch', begin_batch)
    rollout(requests('a', 'a', config=TreeConfig(segment_length=16, max_depth=2, **keys)), scheduler(FakeEngine()))
    assert heard == [asked]


def test_a_probe_checks_the_trainers_config_before_training_starts():
    note = RequestNote(mode='probe', config=flat(branching='odd').to_dict()).to_dict()
    batch = [RolloutInferRequest(messages=[{'role': 'user', 'content': 'probe'}], data_dict={'treepo': note})]
    with pytest.raises(ValueError, match='Unknown branching policy'):
        rollout(batch, scheduler(FakeEngine(max_model_len=8192)))


def test_prompts_share_the_tokens_of_a_depth():
    """6 segments a depth: 2 each while three prompts grow, and all of them for the one that is left."""
    widths: dict[int, int] = {}

    def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
        depth = (len(context) - 1) // 16 + 1
        widths[depth] = widths.get(depth, 0) + 1
        if context[0] != ord('c') and depth == 2:
            return segment_of([EOS], StopReason.EOS)
        return segment_of([97 + seed % 26] * max_tokens)

    config = flat(
        segment_length=16,
        max_depth=4,
        root_divergence=8,
        divergence=8,
        fallback='none',
        stop_at_repetition=False,
        budget='by_segment_tokens',
        budget_tokens=6 * 16,
    )
    outputs = rollout(requests(*'aaaaaaaabbbbbbbbcccccccc', config=config), scheduler(FakeEngine(speak=speak)))
    assert widths == {1: 6, 2: 6, 3: 6, 4: 6}
    assert sum(tree_of(o)['stop'] == 'token_limit' for o in outputs) == 6


def test_placeholders_are_masked_and_do_not_count_as_failures():
    config = flat(segment_length=16, max_depth=1, root_divergence=1, fallback='none')
    outputs = rollout(requests(*['prompt'] * 4, config=config))
    assert [tree_of(o)['stop'] for o in outputs[1:]] == ['absent'] * 3
    assert all(o.response_loss_mask == [[0]] and o.rollout_logprobs == [[]] for o in outputs[1:])
    assert tree_of(outputs[0])['stats']['failures'] == 0


def test_arrival_order_changes_nothing():
    """The same seed over engines of different speeds: the same trajectories, the same node ids."""

    def seeded(delay: float):
        class Slow(FakeEngine):
            async def generate(self, *args, **kwargs):
                async for segment in super().generate(*args, **kwargs):
                    await asyncio.sleep(random.Random(f'{delay}{self.calls}').random() * delay)
                    yield segment

        outputs = rollout(requests(*'aabbaabb'), scheduler(Slow()), seed=3)
        return [(o.response_token_ids, tree_of(o)['nodes']) for o in outputs]

    assert seeded(0.0) == seeded(0.01)


def test_a_path_is_one_request_and_asking_by_segment_grows_the_same_tree():
    """The engine's answers depend on the prefix alone, so that they are the same for whoever asks."""

    def speak(context: list[int], max_tokens: int, seed: int) -> Segment:
        return sample(context, max_tokens, 0, eos_every=60)

    def grown(by_segment: bool):
        engine = FakeEngine(speak=speak)
        target = scheduler(engine)
        target.by_segment = by_segment
        outputs = rollout(requests(*'aabbaabb', config=changed(CONFIG, fallback='random_token')), target)
        return engine, [(o.response_token_ids, tree_of(o)['nodes'], tree_of(o)['stop']) for o in outputs]

    (stream, streamed), (lockstep, stepped) = grown(False), grown(True)
    assert streamed == stepped
    assert stream.requests < lockstep.requests == len(lockstep.inputs)


def test_trees_wait_for_room_in_the_kv_cache_and_stay_on_their_rank():
    engine = FakeEngine()
    engine.info = dataclasses.replace(engine.info, ranks=2, kv_tokens=80)
    config = changed(CONFIG, answer='none', stop_at_repetition=False)
    outputs = rollout(requests(*'aaaabbbbccccdddd', config=config), scheduler(engine))
    # A prompt and half of 4 x 32 tokens are set aside for a tree: one fits a rank at a time.
    assert engine.peak <= 8 and len(outputs) == 16
    ranks = {}
    for place in engine.places:
        ranks.setdefault(place.priority, set()).add(place.rank)
    assert sorted(ranks) == [1, 2, 3, 4] and all(len(rank) == 1 for rank in ranks.values())
    assert {rank for (rank,) in ranks.values()} == {0, 1}


def test_prefixes_that_the_engine_has_dropped_are_counted():
    def evicted(forgets: bool, by_segment: bool) -> int:
        class Caching(FakeEngine):
            async def generate(self, prompt, response_ids, **kwargs):
                known = (len(prompt.token_ids) + len(response_ids) - 1) // 16 * 16
                async for segment in super().generate(prompt, response_ids, **kwargs):
                    yield dataclasses.replace(segment, cached_tokens=0 if forgets else known)
                    known = 0

        target = scheduler(Caching())
        target.by_segment = by_segment
        outputs = rollout(requests(*['a prompt of 19 byte'] * 8), target)
        return tree_of(outputs[0])['stats']['evicted_tokens']

    for by_segment in (False, True):
        assert evicted(False, by_segment) == 0
        # Whole blocks only: 19 tokens of the prompt and 16 of a segment fill two of 16.
        assert evicted(True, by_segment) >= 32 and evicted(True, by_segment) % 16 == 0


def test_reports_of_ten_thousand_trajectories_are_small():
    config = flat(segment_length=16, max_depth=14, answer='none', stop_at_repetition=False)
    outputs = rollout(requests(*['prompt'] * 16, config=config), max_tokens=16 * 14)
    sizes = [len(json.dumps(tree_of(o))) for o in outputs]
    assert sum(sizes) / len(sizes) < 400  # 10,000 of them: under 4 MB


def test_the_configs_seed_and_the_step_change_the_tree():
    def forks(step: int, seed: int) -> list[list[int]]:
        config = changed(CONFIG, seed=seed, divergence=(1, 4))
        note = RequestNote(config=config.to_dict(), step=step).to_dict()
        batch = [dataclasses.replace(r, data_dict={'treepo': note}) for r in requests(*['prompt'] * 8)]
        return [tree_of(o)['nodes'] for o in rollout(batch, seed=1)]

    assert forks(0, 0) == forks(0, 0)
    assert forks(0, 0) != forks(1, 0) and forks(0, 0) != forks(0, 1)


def test_single_prompts_take_no_part_in_a_shared_budget():
    """A batch may hold a prompt of one request, and evaluation none but such: neither waits nor counts."""
    config = flat(segment_length=16, max_depth=4, budget='by_segment_tokens', budget_tokens=32)
    outputs = rollout(requests('a', 'b', 'a', 'c', 'a', 'a', 'c', config=config))
    assert [tree_of(o)['id'] for o in outputs].count('request-1') == 1
    assert len(rollout(requests(*'abcdefgh', config=config, mode='independent'))) == 8
