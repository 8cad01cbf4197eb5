"""The arena without torch: its tasks, its matrix, its results file, the arithmetic of its report."""

from __future__ import annotations

import itertools
import json
import random
from math import sqrt
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.config import ConfigError
from treepo_swift.lab.arena.report import beside, report
from treepo_swift.lab.arena.runs import Cell, Point, ResultsFile, Run, best_rate, missing_cells, reported, run_matrix
from treepo_swift.lab.arena.settings import Matrix
from treepo_swift.lab.arena.statistics import accuracy_at, interval, tokens_to
from treepo_swift.lab.arena.tasks import (
    ALPHABET,
    EOS,
    PAD,
    SPLITS,
    TASKS,
    VOCABULARY,
    Problem,
    decode,
    encode,
    reward,
    split_of,
)

GRPO = {'independent': True, 'tree': {'advantage': {'estimator': 'grpo', 'normalisation': 'none'}}}
EXAMPLES = sorted((Path(__file__).parents[2] / 'examples' / 'arena').glob('*/matrix.yaml'))


def matrix(**changes):
    values = {
        'task': 'decisions',
        'learning_rates': [1e-4, 3e-4],
        'tuning_seeds': [10],
        'seeds': [1, 2],
        'training': {'tokens': 100, 'marks': 2},
        'methods': {'grpo': GRPO, 'treepo': {}},
    }
    return Matrix(**{**values, **changes})


def curve(*accuracies: float, distance: int = 50) -> tuple[Point, ...]:
    """Points at 0, `distance`, ... decoded tokens; trained tokens are twice as many."""
    return tuple(
        Point(i * distance, 2 * i * distance, i, float(i), accuracy, None if i == 0 else 0.5, None if i == 0 else 0.25)
        for i, accuracy in enumerate(accuracies)
    )


def make_run(of: Matrix, method: str, lr: float, seed: int, tuning: bool, *accuracies: float) -> Run:
    return Run(of.key(method), of.task, Cell(method, lr, seed, tuning), curve(*accuracies))


# Tasks.


@pytest.mark.parametrize('name', TASKS)
def test_demonstrations_are_right_as_often_as_a_task_should_be_and_fit(name):
    task, rng = TASKS[name], random.Random(0)
    problems = list(itertools.islice(task.problems('heldout', 0), 1000))
    texts = [task.demonstrate(problem, rng) for problem in problems]
    right = sum(reward(p, text, ended=True) for p, text in zip(problems, texts)) / len(texts)
    assert 0.3 <= right <= 0.6
    assert max(map(len, texts)) < task.max_answer
    assert all(decode(encode(text) + [EOS]) == text for text in texts)


@pytest.mark.parametrize('name', TASKS)
def test_a_faultless_demonstration_runs_the_program(name):
    task = TASKS[name]
    table = task.table()
    problem = next(p for p in task.problems('train', 3) if len(p.program) >= 8)
    state, steps = problem.start, ''
    for label, op in zip('ABCDEFGHIJKL', problem.program):
        after = table[op, state]
        steps += f'{label}{op}{state}={after};'
        assert not task.tool or task.reply(steps[:-2]) == steps[-2:]
        state = after
    assert state == problem.solution
    assert reward(problem, f'{steps}!{state}', ended=True) == 1.0
    assert problem.prompt.endswith(f'|{problem.start}>') and problem.prompt[1:16:2] == problem.program[:8]


def test_tables_are_permutations_so_that_a_wrong_state_stays_wrong():
    for task in TASKS.values():
        table = task.table()
        for op in 'abcdefgh':
            assert sorted(table[op, state] for state in range(8)) == list(range(8))


def test_faults_are_a_quarter_of_the_entries_and_never_the_right_state():
    task = TASKS['decisions']
    faults = task.faults()
    assert len(faults) == 16
    assert all(wrong != task.table()[entry] and 0.2 <= often <= 0.6 for entry, (wrong, often) in faults.items())
    assert TASKS['opening'].faults() == {}


def test_where_a_tool_speaks_demonstrations_call_the_wrong_table_as_often_as_they_were_wrong_without():
    task, rng = TASKS['calls'], random.Random(1)
    wrong = right = 0
    for problem in itertools.islice(task.problems('train', 0), 400):
        text = task.demonstrate(problem, rng).replace('*', '')
        for index, op in enumerate(problem.program):
            step = text[6 * index : 6 * index + 6]
            assert task.reply(step[:4]) == step[4:]
            assert step[1] == op or (op, int(step[2])) in task.faults()
            wrong += step[1] != op
            right += step[1] == op
    assert 0.05 < wrong / (wrong + right) < 0.15  # a quarter of the entries, at 20 to 60 %


def test_a_tool_answers_any_call():
    task = TASKS['calls']
    assert task.reply('Aa3=') == f'{task.table()["a", 3]};'
    for call in ('=', 'a=', '3=', 'a8=', '!3=', '3a=', ' 3=', '\u06633='):
        assert task.reply(call) == '?;'


def test_what_a_tool_says_is_not_sampled():
    assert TASKS['calls'].is_sampled('Aa3=5;*!5') == [True] * 4 + [False] * 2 + [True] * 3
    assert all(TASKS['decisions'].is_sampled('Aa3=5;*!5'))
    assert TASKS['calls'].is_sampled('') == []


def test_a_hard_program_is_right_only_with_the_detour():
    task, rng = TASKS['rare'], random.Random(1)
    problems = list(itertools.islice((p for p in task.problems('train', 0) if 'h' in p.program), 600))
    assert all(p.program.count('h') == 1 for p in problems)
    texts = [task.demonstrate(p, rng) for p in problems]
    assert all(reward(p, text, ended=True) == ('#' in text) for p, text in zip(problems, texts))
    assert 0.02 < sum('#' in text for text in texts) / len(texts) < 0.09


def test_splits_share_no_program_whatever_the_seed():
    for name, task in TASKS.items():
        programs = {
            split: {p.program for seed in (0, 1) for p in itertools.islice(task.problems(split, seed), 300)}
            for split in SPLITS
        }
        assert all(split_of(text) == split for split, texts in programs.items() for text in texts), name
        assert not programs['train'] & programs['heldout'] and not programs['train'] & programs['pretrain']
    with pytest.raises(ValueError, match='allowed: pretrain, train, heldout'):
        next(TASKS['decisions'].problems('test', 0))


PROBLEM = Problem('abcabca', 3, 5)


@pytest.mark.parametrize(
    'text',
    ['', '5', '!', '!!5', '!5!5', '!55', '!5 ', '! 5', '!6', '!5;', '!4!5', '!5Aa3=5;', '5!', '!\u0665', '!05', '!+5'],
)
def test_hostile_answers_get_nothing(text):
    assert reward(PROBLEM, text, ended=True) == 0.0


def test_a_right_answer_counts_only_with_its_end():
    assert reward(PROBLEM, 'Aa3=5;!5', ended=True) == 1.0
    assert reward(PROBLEM, 'Aa3=5;!5', ended=False) == 0.0


@given(st.lists(st.integers(-3, 60)))
def test_any_ids_read_as_text_and_only_the_tasks_own_can_be_right(ids):
    text = decode(ids)
    assert EOS in ids or len(text) == len(ids)
    assert set(text) <= set(ALPHABET) | {' '}
    assert reward(PROBLEM, text, ended=True) == float(text.count('!') == 1 and text.endswith('!5'))


def test_padding_and_unknown_ids_are_in_no_right_answer():
    assert decode([*encode('!5'), PAD]) == '!5 ' and decode([VOCABULARY, -1]) == '  '
    assert decode([*encode('!5'), EOS, *encode('!6')]) == '!5'
    with pytest.raises(KeyError):
        encode('!9')


# The matrix.


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'task': 'chess'}, "task='chess': allowed are opening, decisions, rare"),
        ({'methods': {}}, 'methods'),
        ({'seeds': [1, 10]}, r'share \[10\]'),
        ({'seeds': [1, 1]}, 'seeds names a value twice'),
        ({'methods': {'m': {'learning_rates': [1e-4, 1e-4]}}}, 'methods.m.learning_rates names a value twice'),
        ({'seeds': []}, 'seeds'),
        ({'learning_rates': [0.0]}, 'learning_rates'),
        ({'learning_rates': [float('inf')]}, 'learning_rates'),
        ({'tuning_seeds': []}, 'need tuning_seeds'),
        ({'training': {'tokens': 0}}, 'training.tokens'),
        ({'training': {'loss_type': 'bnpo'}}, 'training.loss_type'),
        ({'training': {'heldouts': 3}}, 'unknown key'),
        ({'methods': {'m': {'tree': {'divergences': 2}}}}, "methods.m: unknown key 'divergences'"),
        ({'methods': {'m': {'tree': {'stop': {'answer': 'boxed'}}}}}, 'methods.m: stop has no effect'),
        ({'methods': {'m': {'tree': {'fork_at': 'turn'}}}}, "methods.m: fork_at='turn'"),
        ({'methods': {'m': {'independent': True, 'tree': {'divergence': 3}}}}, 'so divergence has no effect'),
        ({'methods': {'m': {'tree': {'budget': {'policy': 'by_segment_tokens', 'tokens': 9}}}}}, 'by_segment_tokens'),
        ({'task': 'calls', 'loop': 'swift'}, 'calls has a tool, which only the fast loop'),
    ],
)
def test_a_matrix_that_can_not_work_is_refused_with_its_place(changes, message):
    with pytest.raises(ConfigError, match=message):
        matrix(**changes)


@pytest.mark.parametrize('text', ['[1, 2]', 'a: [', '3: 4', 'task: !!python/object:os.system x', '\x00'])
def test_a_file_that_is_no_matrix_is_refused_with_its_name(tmp_path, text):
    file = tmp_path / 'm.yaml'
    file.write_text(text)
    with pytest.raises(ConfigError, match='m.yaml'):
        Matrix.read(file)


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_matrices_of_their_task_with_plain_grpo_first(path):
    found = Matrix.read(path)
    assert found.task == path.parent.name.partition('-')[0] and len(found.seeds) >= 5
    first = next(iter(found.methods.values()))
    assert first.independent and first.tree['advantage'] == {'estimator': 'grpo', 'normalisation': 'none'}


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.parent.name)
def test_the_kept_results_are_those_of_their_matrix_and_of_this_loop(path):
    """Who changes the loop, a task or a matrix has to run the study again: its runs then have other keys."""
    found, runs = Matrix.read(path), ResultsFile(path.parent / 'results.jsonl').runs
    of = ResultsFile(path.parent / 'results.jsonl').of(found)
    assert of == runs and list(missing_cells(found, of)) == []
    assert report(found, of) == (path.parent / 'report.md').read_text()


def test_the_first_method_of_the_examples_decodes_every_answer_by_itself():
    config = matrix().config_of('grpo')
    assert (config.root_divergence, config.max_depth, config.segment_length) == (8, 1, 112)
    assert matrix(methods={'wide': {'width': 16, **GRPO}}).config_of('wide').root_divergence == 16


def test_a_key_is_of_what_a_method_is_and_not_of_its_neighbours():
    one = matrix()
    assert one.key('treepo') == matrix(methods={'treepo': {}}, seeds=[7]).key('treepo') != one.key('grpo')
    assert one.key('treepo') == matrix(methods={'treepo': {'tree': {'divergence': 2}}}).key('treepo')  # as by default
    assert one.key('treepo') != matrix(methods={'treepo': {'tree': {'divergence': 3}}}).key('treepo')
    assert one.key('treepo') != matrix(methods={'treepo': {'width': 4}}).key('treepo')
    assert one.key('treepo') != matrix(training={'tokens': 101, 'marks': 2}).key('treepo')
    assert one.key('treepo') != matrix(task='rare').key('treepo')


# Runs.


def test_tuning_comes_first_and_each_method_is_reported_at_its_own_best_rate(tmp_path):
    asked = []

    def train(cell):
        asked.append(cell)
        good = (cell.method == 'grpo') == (cell.lr == 1e-4)
        return curve(0.4, 0.5, 0.9 if good else 0.6)

    file = ResultsFile(tmp_path / 'results.jsonl')
    run_matrix(matrix(), file, train, say=lambda text: None)
    assert [c.tuning for c in asked] == [True] * 4 + [False] * 4
    assert [(c.seed, c.method, c.lr) for c in asked[4:]] == [
        (1, 'grpo', 1e-4),
        (1, 'treepo', 3e-4),
        (2, 'grpo', 1e-4),
        (2, 'treepo', 3e-4),
    ]
    again = ResultsFile(file.path)
    assert again.runs == file.runs
    # A rate more for one method: only what that needs is run.
    asked.clear()
    wider = matrix(methods={'grpo': GRPO, 'treepo': {'learning_rates': [1e-4, 3e-4, 9e-4]}})
    run_matrix(wider, again, train, say=lambda text: None)
    assert asked == [Cell('treepo', 9e-4, 10, True)]
    assert reported(wider, again.runs)['treepo'][1].cell.lr == 3e-4  # the lower of equals
    run_matrix(matrix(), ResultsFile(file.path), lambda cell: pytest.fail(f'{cell} is there'), say=print)


def test_a_run_that_was_stopped_goes_on_behind_the_half_line_that_it_left(tmp_path):
    path = tmp_path / 'results.jsonl'
    file, whole = ResultsFile(path), []
    run_matrix(matrix(), file, lambda cell: curve(0.4, 0.5, 0.6), say=lambda text: None)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, 20, len(lines[3]) - 1):
        path.write_bytes(b''.join(lines[:3]) + lines[3][:cut])
        whole.clear()
        run_matrix(matrix(), ResultsFile(path), lambda cell: whole.append(cell) or curve(0.4, 0.5, 0.6), say=str)
        assert len(whole) == 5
        assert path.read_bytes() == b''.join(lines)
    for cut in (1, 9, 30):  # the very first line
        path.write_bytes(lines[0][:cut])
        assert ResultsFile(path).runs == [] and path.read_bytes() == b''


@pytest.mark.parametrize(
    'content', ['hello\n', '{}\n', '[]\n', 'null\n', 'no line at all', '{"key": 1, "curve": []}\n']
)
def test_a_file_that_is_none_of_ours_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / 'results.jsonl'
    path.write_text(content)
    with pytest.raises(ValueError, match='results.jsonl'):
        ResultsFile(path)
    assert path.read_text() == content


def test_runs_of_other_settings_are_not_taken_for_runs_of_these(tmp_path):
    file = ResultsFile(tmp_path / 'results.jsonl')
    other = matrix(training={'tokens': 99, 'marks': 2})
    file.append(make_run(other, 'grpo', 1e-4, 1, False, 0.4, 0.5))
    assert file.of(matrix()) == [] and len(file.of(other)) == 1
    assert next(missing_cells(matrix(), file.of(matrix()))) == Cell('grpo', 1e-4, 10, True)


def test_the_best_rate_is_that_of_the_mean_over_marks_without_the_start():
    asked = matrix()
    runs = [make_run(asked, 'grpo', 1e-4, 10, True, 0.9, 0.4, 0.6)]
    assert best_rate(asked, 'grpo', runs) is None and reported(asked, runs) == {}
    # 0.55 against 0.5: an early gain counts, and what a run started with does not.
    runs.append(make_run(asked, 'grpo', 3e-4, 10, True, 0.1, 0.6, 0.5))
    assert best_rate(asked, 'grpo', runs) == 3e-4
    runs[1] = make_run(asked, 'grpo', 3e-4, 10, True, 0.1, 0.6, 0.4)
    assert best_rate(asked, 'grpo', runs) == 1e-4  # of equals the lower
    # A reported run at a rate that was not chosen, or of a seed that tunes, is in no table.
    runs += [make_run(asked, 'grpo', 3e-4, 1, False, 0, 1, 1), make_run(asked, 'grpo', 1e-4, 1, False, 0, 0.5, 0.5)]
    assert reported(asked, runs) == {'grpo': {1: runs[-1]}}


# The report's arithmetic.


def test_a_curve_is_read_linearly_between_its_points():
    points = curve(0.4, 0.6, 0.7)
    assert [accuracy_at(points, at) for at in (0, 25, 50, 75, 100, 500)] == pytest.approx(
        [0.4, 0.5, 0.6, 0.65, 0.7, 0.7]
    )


def test_an_interval_by_hand():
    # Mean 0.6, deviations -0.1, 0, 0.1: s = 0.1, t for 2 degrees of freedom 4.303.
    found = interval([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6) and found.half == pytest.approx(4.303 * 0.1 / sqrt(3))
    assert found.percent() == '60.0 ± 24.8' and found.excludes_zero
    assert interval([0.3]).half is None and not interval([0.3]).excludes_zero and interval([0.3]).percent() == '30.0'
    assert interval([-0.05, -0.05]).excludes_zero and interval([-0.05, -0.05]).percent(sign=True) == '-5.0 ± 0.0'
    assert not interval([-0.1, 0.1]).excludes_zero
    assert interval([0.0, 1.0] * 20).half == pytest.approx(2.131 * 0.5064 / sqrt(40), rel=1e-3)


def test_tokens_to_a_target_are_of_the_mean_curve():
    curves = [curve(0.4, 0.6, 0.7), curve(0.4, 0.8, 0.9)]  # mean 0.4, 0.7, 0.8
    marks = [50.0, 100.0]
    assert tokens_to(curves, 0.55, marks) == pytest.approx(25)
    assert tokens_to(curves, 0.75, marks) == pytest.approx(75)
    assert tokens_to(curves, 0.81, marks) is None
    assert tokens_to(curves, 0.3, marks) == 0.0
    # A dip before and after changes nothing: the first time counts.
    assert tokens_to([curve(0.4, 0.2, 0.8, 0.1)], 0.8, [50.0, 100.0, 150.0]) == 100


def test_a_report_by_hand():
    asked = matrix(learning_rates=[1e-4], tuning_seeds=[])
    runs = [
        make_run(asked, 'grpo', 1e-4, 1, False, 0.4, 0.5, 0.6),
        make_run(asked, 'grpo', 1e-4, 2, False, 0.4, 0.5, 0.8),
        make_run(asked, 'treepo', 1e-4, 1, False, 0.4, 0.6, 0.7),
        make_run(asked, 'treepo', 1e-4, 2, False, 0.4, 0.6, 0.9),
    ]
    text = ' '.join(report(asked, runs).split())
    assert '40.0% right before training' in text
    # The ends are 0.7 and 0.8 with the same spread: s = sqrt(0.02), t = 12.706; by seed they differ by 0.1 always.
    assert '| grpo | 50.0 ± 0.0 | 70.0 ± 127.1 |' in text and '| treepo | 60.0 ± 0.0 | 80.0 ± 127.1 |' in text
    assert '| treepo | **+10.0 ± 0.0** | **+10.0 ± 0.0** | **+10.0 ± 0.0** |' in text
    # treepo's mean is at 0.7 halfway between 50 and 100 tokens.
    assert '| treepo | 0.0001 | 2 | 75 | 200 | 2 | 2 | 25% |' in text
    assert '| grpo | 0.0001 | 2 | 100 |' in text


def test_a_report_compares_only_seeds_that_both_have():
    asked = matrix(learning_rates=[1e-4], tuning_seeds=[])
    runs = [
        make_run(asked, 'grpo', 1e-4, 1, False, 0.4, 0.5, 0.6),
        make_run(asked, 'treepo', 1e-4, 1, False, 0.4, 0.5, 0.5),
        make_run(asked, 'treepo', 1e-4, 2, False, 0.4, 0.9, 0.9),
    ]
    text = ' '.join(report(asked, runs).split())
    assert '| treepo | +0.0 | -10.0 | -5.0 |' in text
    with pytest.raises(ValueError, match='no reported run of grpo'):
        report(asked, runs[1:])
    assert 'Difference' not in report(asked, runs[:1])


def test_results_are_lines_that_other_programs_can_read(tmp_path):
    asked = matrix()
    file = ResultsFile(tmp_path / 'deep' / 'results.jsonl')
    file.append(make_run(asked, 'grpo', 1e-4, 1, False, 0.4, 0.5))
    values = json.loads(file.path.read_text())
    assert values['method'] == 'grpo' and values['curve'][1] == {
        'decoded': 50,
        'trained': 100,
        'steps': 1,
        'seconds': 1.0,
        'accuracy': 0.5,
        'reward': 0.5,
        'flat': 0.25,
    }
    assert yaml.safe_load(yaml.safe_dump(values)) == values


# Two loops beside each other.


def test_two_loops_are_compared_by_method_and_seed_at_the_same_rate(tmp_path):
    fast = matrix(tuning_seeds=[], learning_rates=[1e-4])
    real = matrix(tuning_seeds=[], learning_rates=[1e-4], loop='swift', seeds=[1, 2])
    assert fast.key('grpo') != real.key('grpo')

    def runs(of, **end):
        file = ResultsFile(tmp_path / f'{of.loop}.jsonl')
        run_matrix(of, file, lambda cell: curve(0.4, 0.5, end[cell.method] + cell.seed / 100), say=lambda text: None)
        return file.of(of)

    text = beside(real, runs(real, grpo=0.7, treepo=0.8), fast, runs(fast, grpo=0.7, treepo=0.6))
    rows = {line.split('|')[1].strip(): line for line in text.splitlines() if line.startswith('|')}
    assert 'with `loop: swift` / with `loop: fast`' in text
    assert '71.5 ± 6.4 / 71.5 ± 6.4: +0.0 ± 0.0' in rows['grpo']
    assert '81.5 ± 6.4 / 61.5 ± 6.4: **+20.0 ± 0.0**' in rows['treepo']
    with pytest.raises(ValueError, match='no method with the same settings, rate and seeds'):
        beside(real, runs(real, grpo=0.7, treepo=0.8), matrix(tuning_seeds=[], learning_rates=[3e-4]), [])
    with pytest.raises(ValueError, match='must be the same in both folders'):
        beside(real, [], matrix(tuning_seeds=[], learning_rates=[1e-4], training={'tokens': 7, 'marks': 2}), [])
