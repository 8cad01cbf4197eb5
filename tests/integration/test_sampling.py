"""`treepo-swift sample` and `eval` on an engine without a model: what they write, how they go on, what they refuse."""

from __future__ import annotations

import csv
import json
from math import comb
from pathlib import Path

import pytest

pytest.importorskip('swift')

from tests.builders import EOS, segment_of
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from treepo_swift.cli.main import main
from treepo_swift.core.tree import StopReason
from treepo_swift.lab.sampling import growing
from treepo_swift.lab.sampling.files import TreesFile
from treepo_swift.lab.sampling.growing import Sampler
from treepo_swift.lab.sampling.prompts import read_prompts
from treepo_swift.view import load

CONFIG = {'TREEPO_SEGMENT_LENGTH': '16', 'TREEPO_MAX_DEPTH': '4'}


def speak(context, max_tokens, seed):
    """Answers of 31 characters and EOS: which digit is in the box hangs on the seed."""
    before = bytes(token for token in context if token != EOS).decode()
    text = 'so many words lead to \\boxed{' + str(seed % 3) + '}'
    said = next(count for count in range(len(text), -1, -1) if before.endswith(text[:count]))
    left = [*text.encode(), EOS][said:][:max_tokens]
    return segment_of(left, StopReason.EOS if left[-1:] == [EOS] else None)


@pytest.fixture
def engine(monkeypatch):
    """The engine that the next commands get, and what they ask to open."""
    for name, value in CONFIG.items():
        monkeypatch.setenv(name, value)
    made = FakeEngine(speak=speak)
    made.opened = []

    def open_sampler(model, options):
        made.opened.append((model, options))
        return Sampler(made, FakeTokenizer())

    monkeypatch.setattr(growing, 'open_sampler', open_sampler)
    return made


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / 'prompts.jsonl'
    rows = [{'prompt': f'question {index}?', 'solution': str(index % 3)} for index in range(5)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def sample(prompts: Path, output: Path, *more: str) -> int:
    return main(['sample', 'M', '--prompts', str(prompts), '--output', str(output), '--width', '4', *more])


def test_a_sample_is_a_file_that_the_viewer_reads(engine, prompts, tmp_path, capsys):
    output = tmp_path / 'trees.jsonl'
    assert sample(prompts, output, '--batch', '2', '--', '--vllm_max_model_len', '99') == 0
    assert engine.opened == [('M', ['--vllm_max_model_len', '99'])]
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f'treepo-swift view {output} --open') and said[-2].startswith('5 trees of 4: ')
    records = load(output)
    assert [record.prompt for record in records] == [f'question {index}?' for index in range(5)]
    for index, record in enumerate(records):
        assert len(record.trajectories) == 4
        for text, trajectory in zip(record.texts(), record.trajectories, strict=True):
            assert trajectory.reward == float(f'boxed{{{index % 3}}}' in text)
            assert trajectory.stop == 'answer'
        # They share their first segment, and are judged against each other.
        assert sum(len(node.tokens) for node in record.nodes) < sum(t.loss_tokens for t in record.trajectories)
        assert sum(t.advantage for t in record.trajectories) == pytest.approx(0, abs=1e-3)
    assert main(['view', str(output)]) == 0 and '5 trees' in capsys.readouterr().out


def test_a_killed_run_goes_on_where_it_stopped(engine, prompts, tmp_path, capsys):
    output = tmp_path / 'trees.jsonl'
    assert sample(prompts, output, '--limit', '3') == 0
    whole = output.read_bytes().splitlines(keepends=True)
    # A process that was killed in the middle of its third tree, a while ago.
    began = load(output)[0].run.encode()
    whole = [line.replace(began, b'2026-01-01T00:00:00Z') for line in whole]
    output.write_bytes(b''.join(whole[:2]) + whole[2][:100])
    before = engine.requests
    assert sample(prompts, output) == 0
    lines = output.read_bytes().splitlines(keepends=True)
    assert lines[:2] == whole[:2] and len(lines) == 5
    assert len({json.loads(line)['sampling']['prompt'] for line in lines}) == 5
    # One run to whoever reads the file: no tree takes the place of another.
    assert len(load(output)) == 5 and len({record.run for record in load(output)}) == 1
    assert engine.requests - before == 3 * 4
    # Nothing is left to do.
    before = engine.requests
    assert sample(prompts, output) == 0 and engine.requests == before
    assert output.read_bytes() == b''.join(lines) and '5/5' in capsys.readouterr().err


def test_other_settings_or_another_file_are_refused(engine, prompts, tmp_path, capsys, monkeypatch):
    output = tmp_path / 'trees.jsonl'
    assert sample(prompts, output, '--limit', '1') == 0
    before = output.read_bytes()
    assert sample(prompts, output, '--temperature', '0.5') == 1
    assert 'temperature was 1.0 and is 0.5' in capsys.readouterr().err
    monkeypatch.setenv('TREEPO_DIVERGENCE', '3')
    assert sample(prompts, output) == 1 and 'config was' in capsys.readouterr().err
    assert output.read_bytes() == before
    for text in ('{"a": 1}\n', 'my notes', '{"version": 1}\n'):
        output.write_text(text)
        assert sample(prompts, output) == 1
        assert 'Choose another --output' in capsys.readouterr().err and output.read_text() == text


def test_without_a_solution_nothing_is_judged(engine, tmp_path, capsys):
    prompts = tmp_path / 'prompts.jsonl'
    messages = [{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'that'}]
    prompts.write_text(json.dumps({'messages': messages}) + '\n\n' + json.dumps({'query': 'what?'}) + '\n')
    assert sample(prompts, tmp_path / 'out.jsonl') == 0
    assert 'not judged: rewards are 0' in capsys.readouterr().out
    # The same question twice is two prompts; the answer that the dataset has is not shown to the model.
    records = load(tmp_path / 'out.jsonl')
    assert [record.prompt for record in records] == ['what?', 'what?']
    assert all(t.reward == 0 and t.rewards == {} for record in records for t in record.trajectories)


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'has no prompts'),
        ('{"prompt": "a"}\n{"prompt"', 'line 2: not JSON'),
        ('[1]', 'line 1: it must be a JSON object with "messages"'),
        ('{"question": "a"}', 'line 1: its keys are question. It must be a JSON object'),
        ('{"prompt": "a", "query": "b"}', "line 1: it has 'prompt' and 'query'"),
        ('{"prompt": 3}', "line 1: 'prompt' must be a text"),
        ('{"messages": [{"role": "user"}]}', 'line 1: "messages" must be a list of'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 'line 1: "messages" asks nothing'),
        ('{"prompt": "a", "images": ["a.png"]}', "line 1 has 'images': only texts"),
        ('{"prompt": "a", "solution": "1"}\n{"prompt": "b"}', 'line 2 of the prompts has no "solution"'),
    ],
)
def test_lines_that_are_no_prompts_are_named_before_a_model_loads(engine, tmp_path, capsys, text, message):
    prompts = tmp_path / 'prompts.jsonl'
    prompts.write_text(text)
    assert sample(prompts, tmp_path / 'out.jsonl') == 1
    assert message in capsys.readouterr().err and not engine.opened and not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize(
    'more, message',
    [
        (['--width', '0'], '--width 0: must be at least 1'),
        (['--batch', '0'], '--batch 0: must be at least 1'),
        (['--temperature', '-1'], '--temperature -1.0: must not be negative'),
        (['--reward', 'nonsense'], '--reward nonsense: swift has no such reward function; it has '),
        (['--external_plugins', 'nowhere.py', '--reward', 'accuracy'], '--external_plugins nowhere.py: there is no'),
        (['--max-tokens', '20'], 'tokens is over --max-tokens = 20'),
    ],
)
def test_options_that_can_not_work_are_refused_before_a_model_loads(engine, prompts, tmp_path, capsys, more, message):
    assert sample(prompts, tmp_path / 'out.jsonl', *more) == 1
    assert message in capsys.readouterr().err and not engine.opened


def test_a_reward_function_of_the_user_judges_with_its_columns(engine, prompts, tmp_path, capsys):
    plugin = tmp_path / 'my_reward.py'
    plugin.write_text(
        'from swift.rewards import AsyncORM, orms\n'
        'class Wanted(AsyncORM):\n'
        '    async def __call__(self, completions, solution, **kwargs):\n'
        '        return [0.5 * (f"{{{s}}}" in c) for c, s in zip(completions, solution, strict=True)]\n'
        'orms["wanted"] = Wanted\n'
        'orms["short"] = lambda completions, **kwargs: [1.0]\n'
    )
    options = ('--external_plugins', str(plugin), '--reward')
    assert sample(prompts, tmp_path / 'out.jsonl', *options, 'wanted') == 0
    rewards = {t.reward for record in load(tmp_path / 'out.jsonl') for t in record.trajectories}
    assert rewards == {0, 0.5}
    assert sample(prompts, tmp_path / 'two.jsonl', *options, 'short') == 1
    assert "Reward function 'short' returned [1.0] for the 4 answers to line 1" in capsys.readouterr().err
    prompts.write_text(json.dumps({'prompt': 'a?', 'level': 1}))
    assert sample(prompts, tmp_path / 'three.jsonl', *options, 'wanted') == 1
    assert "Reward function 'wanted' raised TypeError" in (said := capsys.readouterr().err) and 'keys are level' in said


def test_an_engine_that_fails_ends_the_run_with_one_message(engine, prompts, tmp_path, capsys):
    output = tmp_path / 'out.jsonl'
    assert sample(prompts, output, '--limit', '2') == 0
    before = output.read_bytes()
    engine.fails = lambda call: True
    assert sample(prompts, output) == 1
    said = capsys.readouterr().err
    assert 'CUDA error' in said and 'What was grown before is kept: give the same command again.' in said
    assert output.read_bytes() == before
    engine.fails = lambda call: False
    assert sample(prompts, output) == 0 and len(load(output)) == 5


def test_a_single_answer_is_a_tree_too(engine, prompts, tmp_path):
    assert (
        main(['sample', 'M', '--prompts', str(prompts), '--output', str(tmp_path / 'one.jsonl'), '--width', '1']) == 0
    )
    assert [len(record.trajectories) for record in load(tmp_path / 'one.jsonl')] == [1] * 5
    output = tmp_path / 'eval'
    more = ('--output', str(output), '--width', '1', '--divergence', '2', '--pacing', 'eager')
    assert main(['eval', 'M', '--data', str(prompts), *more]) == 0
    for curve in json.loads((output / 'results.json').read_text())['settings']:
        (point,) = curve['points']
        assert point['k'] == 1 and point['tokens'] == 32 and point['majority'] == point['pass_at_k']


def evaluate(prompts: Path, output: Path, *more: str) -> int:
    return main(['eval', 'M', '--data', str(prompts), '--output', str(output), '--width', '2', '4', *more])


def test_an_evaluation_counts_what_the_trees_say(engine, prompts, tmp_path, capsys):
    output = tmp_path / 'eval'
    assert evaluate(prompts, output, '--divergence', '2', '--pacing', 'eager', '--batch', '3') == 0
    said = capsys.readouterr().out
    result = json.loads((output / 'results.json').read_text())
    curves = {curve['setting']: curve for curve in result['settings']}
    assert list(curves) == ['independent-w2', 'independent-w4', 'd2-eager-w2', 'd2-eager-w4']
    assert said.splitlines()[-1].startswith('| d2-eager') and len(said.splitlines()[-6:]) == 6
    assert all(curve['prompts'] == 5 and curve['failed'] == 0 for curve in curves.values())
    for name, curve in curves.items():
        records = load(output / f'{name}.jsonl')
        width = curve['width']
        assert [point['k'] for point in curve['points']] == ([1, 2] if width == 2 else [1, 2, 4])
        for point in curve['points']:
            k = point['k']
            right = [sum(t.reward for t in record.trajectories) for record in records]
            expected = [1 - comb(width - int(c), k) / comb(width, k) for c in right]
            assert point['pass_at_k'] == pytest.approx(sum(expected) / 5)
            assert (point['seconds'] is None) == (k != width)
        whole = sum(len(node.tokens) for record in records for node in record.nodes) / 5
        assert curve['points'][-1]['tokens'] == pytest.approx(whole)
        assert curve['decoded_tokens'] >= whole
        assert curve['seconds'] > 0
    # 32 tokens an answer, and trees share their first 16, but for two first branches.
    tokens = {name: [point['tokens'] for point in curve['points']] for name, curve in curves.items()}
    assert tokens['independent-w4'] == [32, 64, 128]
    assert tokens['d2-eager-w4'][0] == 32 and tokens['d2-eager-w4'][-1] == 2 * 16 + 4 * 16
    with (output / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 3 + 2 + 3 and rows[0]['setting'] == 'independent-w2' and rows[0]['seconds'] == ''
    pytest.importorskip('matplotlib')
    assert (output / 'results.png').read_bytes().startswith(b'\x89PNG')


def test_an_evaluation_goes_on_setting_by_setting(engine, prompts, tmp_path, capsys, monkeypatch):
    output = tmp_path / 'eval'
    asked = ('--divergence', '2', '--pacing', 'eager')
    assert evaluate(prompts, output, *asked) == 0
    (output / 'd2-eager-w4.jsonl').unlink()
    kept = (output / 'd2-eager-w2.jsonl').read_bytes()
    before = engine.requests
    monkeypatch.setattr('treepo_swift.lab.bench.picture.find_spec', lambda name: None)
    capsys.readouterr()
    assert evaluate(prompts, output, *asked) == 0
    # Five trees of four, and the warm-up.
    assert engine.requests - before == 6 * 4 and (output / 'd2-eager-w2.jsonl').read_bytes() == kept
    assert 'No plot: matplotlib is not installed' in capsys.readouterr().out


def test_answers_that_failed_are_in_no_estimate(engine, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('TREEPO_FAULTS__MAX_FAILURE_FRACTION', '1.0')
    lines = prompts.read_text().splitlines()
    prompts.write_text('\n'.join([lines[0], json.dumps({'prompt': 'unencodable?', 'solution': '1'})]))
    output = tmp_path / 'eval'
    assert main(['eval', 'M', '--data', str(prompts), '--output', str(output), '--width', '2', '--divergence']) == 0
    assert '2 answers failed and are in no estimate' in capsys.readouterr().out
    (curve,) = json.loads((output / 'results.json').read_text())['settings']
    assert curve['failed'] == 2 and [point['prompts'] for point in curve['points']] == [1, 1]
    assert curve['points'][0]['pass_error'] is None


@pytest.mark.parametrize(
    'more, message',
    [
        (['--pacing', 'slow'], '--pacing slow: allowed are eager and even'),
        (['--divergence', '0'], '--divergence 0: must be at least 1'),
        (['--width', '0'], '--width 0: must be at least 1'),
    ],
)
def test_an_evaluation_that_can_not_work_is_refused(engine, prompts, tmp_path, capsys, more, message):
    assert evaluate(prompts, tmp_path / 'eval', *more) == 1
    assert message in capsys.readouterr().err and not engine.opened


def test_prompts_are_known_by_what_they_say(tmp_path):
    """Another order of the lines, or other columns, change no key; another question or solution does."""
    path = tmp_path / 'prompts.jsonl'

    def keys(*rows):
        path.write_text('\n'.join(map(json.dumps, rows)))
        return [row.key for row in read_prompts(path)]

    a, b = {'prompt': 'a', 'solution': '1'}, {'prompt': 'b', 'solution': '1'}
    assert keys(a, b) == keys(b, {**a, 'level': 3})[::-1]
    # A line separator of Unicode within a text ends no line of the file.
    path.write_text(json.dumps({'prompt': 'a\u2028b'}, ensure_ascii=False))
    assert read_prompts(path)[0].messages[0]['content'] == 'a\u2028b'
    first, second = keys(a, a)
    assert first != second and first == keys(a)[0] != keys({**a, 'solution': '2'})[0]


def test_a_file_without_half_a_line_is_left_alone(tmp_path):
    path = tmp_path / 'empty.jsonl'
    path.touch()
    assert TreesFile(path, {}).trees == [] and path.read_bytes() == b''
