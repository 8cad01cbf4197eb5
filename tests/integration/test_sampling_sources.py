"""Prompts from a dataset as swift loads it, and from reasoning-gym, on an engine without a model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip('swift')

from tests.integration.test_sampling import engine  # noqa: F401  (a fixture)
from treepo_swift.cli.main import main
from treepo_swift.lab.sampling.sources import Source
from treepo_swift.view import load

pytestmark = pytest.mark.usefixtures('engine')
needs_puzzles = pytest.mark.skipif(
    importlib.util.find_spec('reasoning_gym') is None, reason='reasoning-gym is not installed'
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """What swift's loader and its hubs keep goes here."""
    monkeypatch.setenv('MODELSCOPE_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset as hubs have them: a folder with a file of a table whose columns have names of their own."""
    path = tmp_path / 'questions'
    path.mkdir()
    rows = [{'ask': f'question {n}?', 'result': str(n % 3), 'level': n} for n in range(6)]
    (path / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


COLUMNS = '{"result": "solution", "ask": "query"}'


def sample(source: str, output: Path, *more: str) -> int:
    return main(['sample', 'M', '--prompts', source, '--output', str(output), '--width', '4', *more])


def test_a_dataset_comes_through_swifts_loader(folder, tmp_path, capsys):
    output = tmp_path / 'out.jsonl'
    # Three of six rows, with swift's names for columns.
    assert sample(f'{folder}#3', output, '--columns', COLUMNS) == 0
    records = load(output)
    prompts = [record.prompt for record in records]
    assert prompts == ['question 0?', 'question 1?', 'question 2?']
    for record in records:
        right = f'boxed{{{int(record.prompt.split()[1][0]) % 3}}}'
        assert [t.reward for t in record.trajectories] == [float(right in text) for text in record.texts()]
    # Nothing is left to do. With a seed it is another three, the same ones for the same seed.
    assert sample(f'{folder}#3', output, '--columns', COLUMNS) == 0 and len(load(output)) == 3
    drawn = [
        {row.key for row in Source(f'{folder}#3', columns=json.loads(COLUMNS), data_seed=seed).load(None, None)[0]}
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3 and len(set(map(frozenset, drawn))) > 1


def test_a_dataset_that_a_plugin_registers_is_known_by_its_name(folder, tmp_path, capsys):
    plugin = tmp_path / 'my_dataset.py'
    plugin.write_text(
        'from swift.dataset import DatasetMeta, ResponsePreprocessor, register_dataset\n'
        'class Questions(ResponsePreprocessor):\n'
        '    def preprocess(self, row):\n'
        '        answer = row["result"]\n'
        '        row = super().preprocess({"query": row["ask"], "response": answer, "system": "Be brief."})\n'
        '        return {**row, "solution": answer}\n'
        f'register_dataset(DatasetMeta(dataset_name="my/questions", dataset_path={str(folder / "train.jsonl")!r},\n'
        '                             preprocess_func=Questions()), exist_ok=True)\n'
    )
    rows, judge = Source('my/questions', plugins=[plugin]).load(2, None)
    # Without the answer at its end.
    assert [row.messages for row in rows] == [
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': f'question {n}?'}] for n in range(2)
    ]
    assert rows[0].place == 'row 1' and rows[1].columns['solution'] == '1'
    assert judge is not None and judge(rows[1], ['\\boxed{1}', '1']) == [1.0, 0.0]
    output = tmp_path / 'eval'
    asked = ['--data', 'my/questions#2', '--external_plugins', str(plugin), '--width', '2', '--divergence']
    assert main(['eval', 'M', *asked, '--output', str(output)]) == 0
    assert json.loads((output / 'results.json').read_text())['data'] == 'my/questions#2'


def test_a_dataset_that_can_not_be_loaded_is_one_message(engine, tmp_path, capsys):  # noqa: F811
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert sample(str(empty), tmp_path / 'out.jsonl') == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f'treepo-swift sample: {empty}: swift can not load this dataset (')
    assert '--use_hf true' in said and 'reasoning-gym:TASK#N' in said
    for name in ('nowhere.jsonl', './nowhere', 'nowhere.jsonl#5'):
        assert sample(name, tmp_path / 'out.jsonl') == 1
        assert 'there is no such file or folder' in capsys.readouterr().err
    # Where no answer is known, `eval` has nobody who judges.
    (empty / 'train.jsonl').write_text('{"query": "a?"}\n')
    assert main(['eval', 'M', '--data', str(empty), '--output', str(tmp_path / 'eval')]) == 1
    assert 'row 1 of the prompts has no "solution"' in capsys.readouterr().err
    assert not engine.opened


@pytest.mark.parametrize('said, found', [('true', True), ('False', False), (None, None)])
def test_the_hub_is_what_was_asked_for(monkeypatch, said, found, tmp_path):
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr('swift.dataset.load_dataset', load_dataset)
    assert sample('org/questions:main#9', tmp_path / 'out.jsonl', *(['--use_hf', said] if said else [])) == 1
    assert asked['name'] == 'org/questions:main#9' and asked['use_hf'] is found and asked['seed'] == 42


def test_options_that_do_nothing_for_a_file_are_refused(folder, tmp_path, capsys):
    file = folder / 'train.jsonl'
    for option in (['--use_hf', 'true'], ['--columns', COLUMNS], ['--data_seed', '1']):
        assert sample(str(file), tmp_path / 'out.jsonl', *option) == 1
        assert f'{option[0]} does nothing for {file}' in capsys.readouterr().err
    for option in (['--use_hf', 'yes'], ['--columns', '[1]'], ['--columns', '{']):
        with pytest.raises(SystemExit):
            sample(str(folder), tmp_path / 'out.jsonl', *option)
        assert option[1] in capsys.readouterr().err


def test_trees_go_beside_a_file_or_into_this_folder(folder):
    assert Source(str(folder / 'train.jsonl')).trees_path == folder / 'train.trees.jsonl'
    assert Source('org/questions:main#9').trees_path == Path('org-questions-main-9.trees.jsonl')
    assert Source('reasoning-gym:leg_counting#5').trees_path == Path('reasoning-gym-leg_counting-5.trees.jsonl')


@needs_puzzles
def test_puzzles_are_judged_by_their_own_scorer():
    rows, judge = Source('reasoning-gym:countdown#4').load(None, None)
    assert len(rows) == 4 and rows[0].place == 'puzzle 1' and '\\boxed{}' in rows[0].messages[0]['content']
    # Other ways to the same number are right too, so this is not the comparison with a solution.
    numbers, target = rows[0].columns['metadata']['numbers'], rows[0].columns['metadata']['target']
    right = rows[0].columns['solution']
    assert judge(rows[0], [f'it is \\boxed{{({right})}}', right, '\\boxed{no}', '\\boxed{1']) == [
        1.0,
        0.0,
        pytest.approx(0.01),
        0.0,
    ], (numbers, target)
    # More of them change none; another seed does.
    more, _ = Source('reasoning-gym:countdown#9').load(6, None)
    assert len(more) == 6 and [row.key for row in more[:4]] == [row.key for row in rows]
    other, _ = Source('reasoning-gym:countdown#4', data_seed=7).load(None, None)
    assert not {row.key for row in other} & {row.key for row in rows}


@needs_puzzles
def test_trees_of_puzzles_and_an_evaluation(tmp_path, capsys):
    output = tmp_path / 'out.jsonl'
    assert sample('reasoning-gym:leg_counting#3', output) == 0
    # No animals have fewer than three legs.
    assert 'mean reward 0.000' in capsys.readouterr().out and 'legs' in load(output)[0].prompt
    asked = ['--data', 'reasoning-gym:coin_flip#2', '--width', '2', '--divergence', '--output', str(tmp_path / 'eval')]
    assert main(['eval', 'M', *asked]) == 0
    assert len(load(tmp_path / 'eval' / 'independent-w2.jsonl')) == 2


@needs_puzzles
@pytest.mark.parametrize(
    'name, message',
    [
        ('leg_count', "reasoning-gym has no task 'leg_count'; it has leg_counting"),
        ('leg_counting#many', "behind # stands how many puzzles are made, not 'many'"),
        ('leg_counting#0', "behind # stands how many puzzles are made, not '0'"),
        ('composite', 'reasoning-gym can not make this task without more settings'),
    ],
)
def test_puzzles_that_can_not_be_made_are_refused(tmp_path, capsys, name, message):
    assert sample(f'reasoning-gym:{name}', tmp_path / 'out.jsonl') == 1
    assert message in capsys.readouterr().err


@needs_puzzles
def test_a_scorer_that_raises_makes_a_wrong_answer(monkeypatch, caplog):
    rows, judge = Source('reasoning-gym:leg_counting#1').load(None, None)
    made = importlib.import_module('reasoning_gym.arithmetic.leg_counting').LegCountingDataset

    def score_answer(self, answer, entry):
        raise KeyError(answer)

    monkeypatch.setattr(made, 'score_answer', score_answer)
    assert judge(rows[0], ['\\boxed{1}']) == [0.0] and 'counts as wrong (KeyError' in caplog.text


def test_without_reasoning_gym_one_message_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
    assert sample('reasoning-gym:leg_counting', tmp_path / 'out.jsonl') == 1
    assert 'pip install "treepo-swift[reasoning-gym]"' in capsys.readouterr().err
