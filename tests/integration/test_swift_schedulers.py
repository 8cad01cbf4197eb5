"""Schedulers that users know from ms-swift, as trees over the fake engine; and what was written for others."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

pytest.importorskip('swift')

from swift.rollout import multi_turns

from tests.builders import EOS, decode, segment_of
from tests.flat import flat
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from tests.integration.test_scheduler import requests, rollout, tree_of
from tests.integration.test_turns import CONFIG, check_laws, speak
from treepo_swift import plugin
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.tree import StopReason
from treepo_swift.server.recheck import RecheckScheduler
from treepo_swift.server.scheduler import TreeRolloutScheduler

EXAMPLES = Path(__file__).parents[2] / 'examples'
sys.path[:0] = [str(EXAMPLES / folder) for folder in ('swift_schedulers', 'tools', 'saved_calls')]
import tool_scheduler
import trees


def talk(cls: type, engine: FakeEngine, *, config: TreeConfig = CONFIG, max_turns: int | None = None, **data: str):
    target = cls(segment_engine=engine, max_turns=max_turns, tokenizer=FakeTokenizer())
    batch = requests(*['prompt'] * 4, config=config)
    for request in batch:
        request.data_dict.update(data)
    outputs = rollout(batch, target, seed=1, max_tokens=256)
    check_laws(outputs)
    return outputs


LONG = flat(segment_length=128, max_depth=2, answer='none')


def test_each_scheduler_of_the_examples_is_at_most_twenty_lines():
    for cls in (trees.MathTipsTree, trees.ThinkingTipsTree, trees.ToolCallTree):
        code = [line for line in inspect.getsource(cls).replace(cls.__doc__, '').splitlines() if line.strip()]
        assert len(code) <= 20, cls.__name__
    assert {'math_tips_tree', 'thinking_tips_tree', 'tool_call_tree'} <= set(multi_turns)


@pytest.mark.parametrize('solution, turns', [('$7$', 1), ('$8$', 2)])
def test_math_tips_checks_answers_in_the_threads_of_hooks(solution, turns):
    """With swift's own reward function, which counts on signals that only the main thread has."""
    engine = FakeEngine(speak=lambda context, n, seed: segment_of([*b'\\boxed{7}', EOS][:n], StopReason.EOS))
    outputs = talk(trees.MathTipsTree, engine, config=LONG, solution=solution)
    assert {o.rollout_infos['num_turns'] for o in outputs} == {turns}
    tips = trees.MathTipsTree.tips_prompt
    assert all((tips in decode(o.response_token_ids[0])) == (turns == 2) for o in outputs)


def test_thinking_tips_are_given_once():
    engine = FakeEngine(speak=lambda context, n, seed: segment_of([*b'\\boxed{7}', EOS][:n], StopReason.EOS))
    outputs = talk(trees.ThinkingTipsTree, engine, config=LONG, solution='$8$')
    for output in outputs:
        assert [m['content'] for m in output.messages][2] == trees.ThinkingTipsTree.tips_prompt
        assert output.rollout_infos['num_turns'] == 2 == len(output.response_token_ids)
    right = talk(trees.ThinkingTipsTree, engine, config=LONG, solution='$7$')
    assert {o.rollout_infos['num_turns'] for o in right} == {1}


def test_tool_calls_put_their_result_into_the_message():
    def react(context, max_tokens, seed):
        text = bytes(t for t in context if t)
        said = b'Final Answer: 6' if b' 6\n' in text else b'Action: calculator\nAction Input: 2*3\nObservation:'
        return segment_of([*said, EOS][:max_tokens], StopReason.EOS)

    outputs = talk(trees.ToolCallTree, FakeEngine(speak=react), config=LONG)
    for output in outputs:
        (ids,), (mask,) = output.response_token_ids, output.response_loss_mask
        assert decode(ids) == 'Action: calculator\nAction Input: 2*3\nObservation: 6\nFinal Answer: 6'
        assert bytes(t for t, trained in zip(ids, mask) if not trained) == b' 6\n'
        assert output.rollout_infos['tool_1'] == '6' and output.messages[-1]['content'] == decode(ids)


def test_the_name_of_swifts_example_asks_until_there_is_an_answer():
    plugin.register()
    scheduler = multi_turns['tree_rollout_scheduler']
    assert scheduler is RecheckScheduler
    config = flat(segment_length=64, max_depth=1, answer='none', fork_at='turn', root_divergence=1)
    outputs = talk(scheduler, FakeEngine(speak=speak), config=config, max_turns=3)
    for output in outputs:
        asked = [m['content'] for m in output.messages if m['role'] == 'user'][1:]
        turns = output.rollout_infos['num_turns']
        assert asked == [scheduler.recheck, scheduler.demand][: turns - 1]
        assert turns == 3 or '\\boxed{' in output.messages[-1]['content']
    assert any(o.rollout_infos['num_turns'] == 3 for o in outputs)
    assert scheduler(segment_engine=FakeEngine(), tokenizer=FakeTokenizer()).max_turns == 6
    stats = tree_of(outputs[0])['stats']
    assert stats['forks'] + stats['fallbacks'] == 3


def test_hooks_and_attributes_of_other_tree_schedulers_are_refused_by_name():
    class Theirs(TreeRolloutScheduler):
        def step(self, sample, **kwargs):
            pass

    with pytest.raises(TypeError, match=r'Theirs\.step: it is called as step\(infer_request, .*migrating'):
        Theirs(segment_engine=FakeEngine(), tokenizer=FakeTokenizer())

    class Attributes(TreeRolloutScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.max_tree_width = 8

    with pytest.raises(AttributeError, match='max_tree_width .*--num_generations'):
        Attributes(segment_engine=FakeEngine(), tokenizer=FakeTokenizer())


def test_gym_environments_need_the_gym_scheduler():
    with pytest.raises(ConfigError, match='treepo_gym'):
        TreeRolloutScheduler(segment_engine=FakeEngine(), tokenizer=FakeTokenizer(), use_gym_env=True)
    plugin.register()
    assert (
        multi_turns['treepo_gym'](
            segment_engine=FakeEngine(), tokenizer=FakeTokenizer(), use_gym_env=True, gym_env='x'
        ).gym_env_name
        == 'x'
    )


@pytest.mark.parametrize(
    'call, result',
    [
        ('{"name": "calculator", "arguments": {"expression": "sum([2, 3]) * 4"}}', '20'),
        ('{"name": "calculator", "arguments": {"expression": "__import__(\'os\')"}}', 'error'),
        ('{"name": "search", "arguments": {"query": "coins in Ada\'s box"}}', "Ada's box holds"),
        ('{"name": "shell", "arguments": {"command": "ls"}}', 'error'),
        ('{"name": ', 'error'),
    ],
)
def test_the_tools_example_reads_calls_and_runs_none_of_the_models_words(call, result):
    def agent(context, max_tokens, seed):
        turn_two = b'|' in bytes(t for t in context if t)
        said = b'It is \\boxed{20}.' if turn_two else f'<tool_call>\n{call}\n</tool_call>'.encode()
        return segment_of([*said, EOS][:max_tokens], StopReason.EOS)

    outputs = talk(tool_scheduler.ToolTree, FakeEngine(speak=agent), config=LONG)
    for output in outputs:
        tool = output.messages[2]
        assert tool['role'] == 'tool' and result in tool['content'] and len(tool['content']) <= 310
        assert output.rollout_infos['tool_1'] == tool['content'] and output.rollout_infos['num_turns'] == 2
