"""The examples' tasks: what they demonstrate is consistent, unseen where it must be, and tokenized as ms-swift does."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import random
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / 'examples'
FOLDERS = {'one_step_a_turn': 'saved_calls', 'number_game_task': 'gym', 'tool_task': 'tools'}
RIGHT = {'one_step_a_turn': 'every step', 'number_game_task': 'halving', 'tool_task': 'right tool'}
sys.path[:0] = [str(EXAMPLES / folder) for folder in ('quickstart', *FOLDERS.values())]

Demonstrations = list[tuple[Any, list[dict[str, str]]]]


@pytest.fixture(params=FOLDERS)
def task(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def demonstrations(task: ModuleType, count: int = 400) -> Demonstrations:
    rng = random.Random(0)
    return [(problem, task.demonstrate(problem, rng)) for problem in islice(task.problems('pretrain', 0), count)]


def test_the_right_strategy_is_right_and_others_are_mostly_wrong(task: ModuleType) -> None:
    outcomes: dict[str, list[bool]] = {style: [] for style in task.STYLES}
    for problem, messages in demonstrations(task):
        outcomes[task.style_of(messages)].append(task.succeeded(messages, problem))
    right = outcomes.pop(RIGHT[task.__name__])
    others = sum(outcomes.values(), [])
    assert all(right)
    assert 0.3 * 400 < len(right) < 0.8 * 400
    assert sum(others) < 0.3 * len(others)


def test_turns_alternate_and_are_answered_as_in_a_rollout(task: ModuleType) -> None:
    for problem, messages in demonstrations(task):
        assert messages[0] == {'role': 'user', 'content': problem.prompt}
        assert [message['role'] == 'assistant' for message in messages] == [False, True] * (len(messages) // 2)
        for turn in range(2, len(messages), 2):
            expected = task.reply(messages[:turn], problem)
            assert expected is not None
            # The user of a demonstration may want an answer at any turn, the one of a rollout only at the last.
            if messages[turn]['content'] != getattr(task, 'ANSWER_NOW', None):
                assert messages[turn]['role'] == expected['role']
                if expected['content'] != getattr(task, 'ANSWER_NOW', None):
                    assert messages[turn] == expected
        assert task.reply(messages, problem) is None


def test_nothing_held_out_is_pretrained_or_trained(task: ModuleType) -> None:
    def key(problem: Any) -> object:
        for name in ('terms', 'number', 'argument'):
            if hasattr(problem, name):
                value = getattr(problem, name)
                return frozenset(value) if name == 'terms' else value

    seen = {split: {key(problem) for problem in islice(task.problems(split, 3), 3000)} for split in task.SPLITS}
    assert not seen['heldout'] & (seen['pretrain'] | seen['train'])
    assert task.__name__ == 'number_game_task' or not seen['pretrain'] & seen['train']


def test_the_dataset_has_what_swift_needs_and_no_prompt_twice(
    task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'argv', ['task', '--output', str(tmp_path), '--train', '60', '--heldout', '20'])
    task.main()
    rows = [json.loads(line) for line in (tmp_path / 'train.jsonl').read_text().splitlines()]
    assert len(rows) == 60
    assert len({row['messages'][0]['content'] for row in rows}) == 60
    wanted = {'one_step_a_turn': {'solution'}, 'number_game_task': {'env_config'}, 'tool_task': {'solution'}}
    assert all(set(row) == {'messages'} | wanted[task.__name__] for row in rows)
    again = [problem.to_row() for problem in task.distinct_problems('train', 60, 0)]
    assert rows == again


def test_the_last_turn_of_a_count_must_answer() -> None:
    import one_step_a_turn as task

    problem = task.Problem((9, 2, 8, 4, 1, 7), 'Add up the digits of 928417.')
    messages = [{'role': 'user', 'content': problem.prompt}]
    said = []
    for step in range(task.MAX_TURNS):
        messages.append({'role': 'assistant', 'content': f'Step {step}: 1 and 1 make 2.'})
        said.append(task.reply(messages, problem))
        messages += [said[-1]] if said[-1] else []
    assert [message and message['content'] for message in said] == [task.GO_ON] * 5 + [task.ANSWER_NOW, None]


# --- the number game ---


@pytest.mark.parametrize(
    ('text', 'guess'),
    [
        ('My guess: 16.', 16),
        ('Not 3 but 7', 7),
        ('7 or 1234', 7),
        ('', None),
        ('none', None),
        ('٣', None),
        ('9' * 100_000, None),
        ('-5', 5),
        ('1 ' * 50_000, 1),
    ],
)
def test_guesses_are_read_from_any_text(text: str, guess: int | None) -> None:
    import number_game_task

    assert number_game_task.read_guess(text) == guess


def game_for(number: int) -> Any:
    pytest.importorskip('swift')
    import number_game
    from swift.rollout.gym_env import envs

    config = {'name': 'number_game', 'number': number}
    env = envs['number_game'](config)
    assert isinstance(env, number_game.NumberGame)
    asyncio.run(env.reset(SimpleNamespace(data_dict={'env_config': config})))
    return env


def say(env: Any, text: str) -> tuple[str, float, bool, dict[str, Any]]:
    return asyncio.run(env.step([{'role': 'assistant', 'content': text}]))


def test_the_environment_plays_the_demonstrations() -> None:
    pytest.importorskip('swift')
    import number_game_task as task

    for game, messages in demonstrations(task, 100):
        env = game_for(game.number)
        for turn in range(1, len(messages), 2):
            observation, reward, done, _ = say(env, messages[turn]['content'])
            is_last = turn == len(messages) - 1
            assert done == is_last
            assert is_last or observation == messages[turn + 1]['content']
        assert reward == float(task.succeeded(messages, game))
        assert reward == 1 or task.style_of(messages) != 'halving'


def test_a_copied_environment_goes_its_own_way() -> None:
    env = game_for(20)
    assert say(env, 'My guess: 16.')[:3] == ('Higher.', 0.0, False)
    fork = copy.deepcopy(env)
    assert say(fork, 'It is 20.')[1:3] == (1.0, True)
    assert say(env, 'Hm.')[:3] == ('Say a number.', 0.0, False)
    assert [say(env, '24')[2] for _ in range(3)] == [False, False, True]
    assert fork.guesses_left == 3


def test_a_game_needs_a_number_from_its_row_or_its_config() -> None:
    env = game_for(3)
    asyncio.run(env.reset(SimpleNamespace(data_dict={})))
    assert env.number == 3
    env.env_config = {}
    with pytest.raises(KeyError, match='env_config'):
        asyncio.run(env.reset(SimpleNamespace(data_dict={})))


# --- tools ---


def test_a_calls_result_is_in_its_world() -> None:
    import tool_task as task

    for question in task.distinct_problems('train', 50, 0):
        (key,) = task.tools()[question.tool].parameters['required']
        call = json.dumps({'name': question.tool, 'arguments': {key: question.argument}})
        said = {'role': 'assistant', 'content': f'<tool_call>\n{call}\n</tool_call>'}
        result = task.reply([said], question)
        assert result is not None and question.solution in result['content'].splitlines()[0]
        assert task.corpus(question.world) is task.corpus(0)


# --- tokens ---


def test_tokens_are_those_of_swift(task: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip('swift')
    pytest.importorskip('torch')
    from pretraining import Task, check_tokens, make_model, make_tokenizer

    wrapped = Task(task)
    tokenizer = make_tokenizer(wrapped, 0)
    tokenizer.save_pretrained(tmp_path)
    make_model(tokenizer).config.save_pretrained(tmp_path)
    conversations = list(islice(wrapped.conversations(0), 40))
    check_tokens(tmp_path, conversations)
    tokenizer.chat_template = '<|im_start|>system\nBe helpful.<|im_end|>\n' + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='differs from ms-swift'):
        check_tokens(tmp_path, conversations)


def test_only_what_the_assistant_says_carries_loss(task: ModuleType) -> None:
    pytest.importorskip('torch')
    from pretraining import EOS, IGNORED, Task, encode, make_tokenizer

    wrapped = Task(task)
    tokenizer = make_tokenizer(wrapped, 0)
    for messages, tools in islice(wrapped.conversations(0), 20):
        ids, labels = encode(tokenizer, messages, tools)
        spans = tokenizer.decode([label for label in labels if label != IGNORED])
        assert spans == ''.join(message['content'] + EOS for message in messages if message['role'] == 'assistant')
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
