"""The arena's loop: its engine against the model's own forward pass, one seed one run, tiny matrices by the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
from math import sqrt

import pytest
import yaml

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from treepo_swift.advantage.batch import SegmentAdvantages
from treepo_swift.cli.main import main
from treepo_swift.core.tree import StopReason, response_ids, response_logprobs
from treepo_swift.lab.arena import rollout
from treepo_swift.lab.arena.engine import Engine
from treepo_swift.lab.arena.learn import advantages, make_engine, policy_loss, reward_and_flat, train
from treepo_swift.lab.arena.model import make_model, padded, pretrained
from treepo_swift.lab.arena.rollout import Answer, answers, grow
from treepo_swift.lab.arena.settings import Matrix, Method, Pretraining, Training
from treepo_swift.lab.arena.signal import Batch, ratio_of, rows, signal_of
from treepo_swift.lab.arena.tasks import CALL, EOS, TASKS, Problem, Task, decode, encode
from treepo_swift.wire.report import TreeReport

TASK, CALLS = TASKS['decisions'], TASKS['calls']
SMALL = Pretraining(hidden=16, layers=2, heads=2, steps=4, rows=4)
GRPO = {'independent': True, 'tree': {'advantage': {'estimator': 'grpo', 'normalisation': 'none'}}}
METHODS = {
    'grpo': Method(**GRPO),
    'treepo': Method(),
    'even': Method(tree={'pacing': 'even', 'segment_length': 5}),
    'inside': Method(tree={'fork_position': 'max_entropy_token', 'divergence': [1, 3], 'root_divergence': [1, 4]}),
    'fallback': Method(
        tree={
            'root_divergence': 2,
            'pacing': {1: 2},
            'max_depth': 3,
            'fallback': {'policy': 'random_token', 'candidates': 'any', 'cuts': 2},
        }
    ),
    'from_the_root': Method(tree={'pacing': {1: 1}, 'root_divergence': 1, 'max_depth': 2, 'fallback': 'root'}),
}


@pytest.fixture(scope='module')
def model():
    torch.set_num_threads(1)
    made = make_model(SMALL).eval()
    # Of random weights: likely enough to say EOS early, so that paths end in all ways.
    with torch.no_grad():
        made.model.embed_tokens.weight[EOS] *= 3
    return made


def problems(count: int) -> list[Problem]:
    return list(itertools.islice(TASK.problems('train', 1), count))


def forest(model, method: Method, task: Task = TASK):
    asked = problems(3)
    engine = make_engine(model, task, slots=3 * 6)
    config = method.config(task, 6)
    return grow(engine, task, config, asked, width=6, seed=0, generator=torch.Generator().manual_seed(0)), config


TURNS = {
    'plain_turns': Method(**GRPO),
    'forks_at_turns': Method(tree={'root_divergence': 2, 'fork_at': 'turn'}),
    'forks_anywhere': Method(tree={'segment_length': 5, 'fork_position': 'max_entropy_token'}),
    'turns_again': Method(
        tree={
            'root_divergence': 2,
            'pacing': {1: 2},
            'fork_at': 'turn',
            'fallback': {'policy': 'random_segment', 'cuts': 2},
        }
    ),
    'cut_anywhere': Method(
        tree={'root_divergence': 1, 'pacing': {1: 1}, 'fallback': {'policy': 'random_token', 'cuts': 5}}
    ),
}


@pytest.mark.parametrize(
    'method, task', [(m, TASK) for m in METHODS.values()] + [(m, CALLS) for m in TURNS.values()], ids=[*METHODS, *TURNS]
)
def test_log_probs_of_a_tree_are_those_of_the_models_own_forward_pass(model, method, task):
    trees, _ = forest(model, method, task)
    shared = turns = 0
    for tree in trees:
        assert len(tree.trajectories) == 6
        nodes = {id(node): node for path in tree.trajectories for node in path.leaf.lineage() if node.sampled}
        assert tree.stats.decoded_tokens == sum(len(node.token_ids) for node in nodes.values())
        shared += tree.stats.trajectory_tokens - tree.stats.decoded_tokens
        turns += tree.stats.turns
        for path in tree.trajectories:
            ids = response_ids(path.leaf)
            assert (ids[-1] == EOS) == (path.stop is StopReason.EOS) and EOS not in ids[:-1]
            sampled = torch.tensor([node.sampled for node in path.leaf.lineage() for _ in node.token_ids])
            row = torch.tensor([tree.prompt_ids + ids])
            with torch.no_grad():
                found = model(input_ids=row).logits[0, :-1].log_softmax(-1)
            theirs = found.gather(1, row[0, 1:, None])[len(tree.prompt_ids) - 1 :, 0]
            assert torch.allclose(theirs[sampled], torch.tensor(response_logprobs(path.leaf)), atol=1e-4)
            entropy = -(found.exp() * found).sum(-1)[len(tree.prompt_ids) - 1 :]
            ours = [value for node in path.leaf.lineage() if node.sampled for value in node.entropies]
            assert torch.allclose(entropy[sampled], torch.tensor(ours), atol=1e-4)
    assert (shared > 0) == (not method.independent and method is not METHODS['from_the_root'])
    assert (turns > 0) == task.tool


@pytest.mark.parametrize('name', TURNS)
def test_a_tool_speaks_behind_every_call_and_nowhere_else(model, name):
    trees, _ = forest(model, TURNS[name], CALLS)
    for tree in trees:
        for path in tree.trajectories:
            text = ''
            for node, behind in itertools.pairwise([*path.leaf.lineage(), None]):
                said = decode(list(node.token_ids))
                if node.sampled:
                    assert CALL not in said[:-1]
                    # A call without room for what the tool says is the end.
                    assert not said.endswith(CALL) or behind is None or not behind.sampled
                else:
                    assert said == CALLS.reply(text)
                text += said
            assert path.leaf.length <= CALLS.max_answer


def test_where_rewards_are_known_in_time_failed_answers_are_continued_first(model, monkeypatch):
    def odd(problem, text, *, ended):
        return float(ended and len(text) % 2)

    monkeypatch.setattr(rollout, 'reward', odd)
    deep = {'policy': 'random_segment', 'candidates': 'lowest_reward_first'}
    method = Method(tree={'root_divergence': 4, 'pacing': {1: 4}, 'divergence': 2, 'fallback': deep})
    seen = set()
    for tree in forest(model, method)[0]:
        paths = tree.trajectories
        for path in paths:
            assert path.reward == odd(None, decode(response_ids(path.leaf)), ended=path.stop is StopReason.EOS)
        first = [path.reward for path in paths if path.fallback_from is None]
        sources = {paths[path.fallback_from].reward for path in paths if path.fallback_from is not None}
        assert sources == {min(first)}
        seen.add((min(first), max(first)))
    assert (0.0, 1.0) in seen


def test_ways_of_ending_a_path_are_all_seen(model):
    stops = {
        path.stop for method in METHODS.values() for tree in forest(model, method)[0] for path in tree.trajectories
    }
    assert {StopReason.EOS, StopReason.DEPTH_LIMIT, StopReason.TOKEN_LIMIT} <= stops


def test_rows_that_end_at_other_times_do_not_disturb_each_other(model):
    """Dropped rows and rows that run along: each row goes on later as if it had been alone."""
    engine = Engine(model, slots=8, length=140)
    prompts = [encode(problem.prompt) for problem in problems(8)]
    engine.fill(prompts, range(8))
    lengths = [len(prompt) for prompt in prompts]
    said = engine.sample(
        range(8),
        lengths,
        [prompt[-1] for prompt in prompts],
        [1, 30, 2, 7, 19, 3, 40, 11],
        generator=torch.Generator().manual_seed(5),
    )
    so_far = [prompt + row.token_ids for prompt, row in zip(prompts, said, strict=True)]
    again = engine.sample(
        range(8), list(map(len, so_far)), [r[-1] for r in so_far], [4] * 8, generator=torch.Generator().manual_seed(6)
    )
    for row, more in zip(so_far, again, strict=True):
        ids = torch.tensor([row + more.token_ids])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row) - 1 :, 0]
        assert torch.allclose(found, torch.tensor(more.logprobs), atol=1e-4)


def test_one_seed_one_run_and_another_seed_another(tmp_path, monkeypatch):
    # A model this small is never right; it has something to learn all the same.
    monkeypatch.setattr(rollout, 'reward', lambda problem, text, *, ended: float(len(text) % 2))
    torch.set_num_threads(1)
    settings = Training(tokens=900, marks=2, prompts=2, width=4, heldout=8)

    def curve(seed: int):
        model = pretrained(TASK, SMALL, tmp_path, say=str)
        config = Method().config(TASK, 4)
        points = train(model, TASK, config, settings, lr=1e-3, seed=seed)
        return [dataclasses.replace(point, seconds=0.0) for point in points], model.lm_head.weight.detach().clone()

    (first, weights), (second, same), (third, other) = curve(3), curve(3), curve(4)
    assert first == second and torch.equal(weights, same)
    assert first != third and not torch.equal(weights, other)
    assert first[0].decoded == 0 and first[0].reward is None and 900 <= first[-1].decoded
    assert [point.decoded for point in first] == sorted({point.decoded for point in first})
    assert first[-2].decoded < 900 and all(point.trained >= point.decoded for point in first)


def test_a_model_is_trained_once_for_the_same_settings(tmp_path):
    said: list[str] = []
    longer = SMALL.model_copy(update={'steps': 100})
    one = pretrained(TASK, longer, tmp_path, say=said.append)
    assert len(said) == 1
    two = pretrained(TASK, longer, tmp_path, say=said.append)
    assert len(said) == 1 and all(map(torch.equal, one.parameters(), two.parameters()))
    pretrained(dataclasses.replace(TASK, p_filler=0.3), longer, tmp_path, say=said.append)
    assert len(said) == 2 and len(list(tmp_path.iterdir())) == 2


# The loss.


def batch_of(*ids: list[int]) -> list[Answer]:
    problem = problems(1)[0]
    return [
        Answer(problem, row, [True] * len(row), 0.0, TreeReport('t', [number], [len(row)], StopReason.EOS, 1))
        for number, row in enumerate(ids, 1)
    ]


@pytest.mark.parametrize('loss_type', ['grpo', 'dapo'])
def test_the_gradient_is_that_of_advantage_times_log_prob(model, loss_type):
    batch = batch_of(encode('Aa3=5;'), [*encode('!5'), EOS])
    advantage = [SegmentAdvantages([0.5, -1.0], [2, 4], 0.0), SegmentAdvantages([2.0], [3], 2.0)]
    model.zero_grad()
    loss = policy_loss(model, batch, advantage, loss_type)
    loss.backward()
    found = model.model.norm.weight.grad.clone()
    # The ratio is 1: the loss is minus the mean advantage.
    rows_ = [[0.5] * 2 + [-1.0] * 4, [2.0] * 3]
    by_hand = sum(map(sum, rows_)) / 9 if loss_type == 'dapo' else sum(sum(row) / len(row) for row in rows_) / 2
    assert loss.item() == pytest.approx(-by_hand)

    model.zero_grad()
    total = 0.0
    for answer, values in zip(batch, rows_, strict=True):
        prompt = encode(answer.problem.prompt)
        ids = torch.tensor([prompt + answer.token_ids])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        weight = 1 / 9 if loss_type == 'dapo' else 1 / len(values) / 2
        total = total - weight * (logprobs * torch.tensor(values)).sum()
    total.backward()
    assert torch.allclose(found, model.model.norm.weight.grad, atol=1e-6)


def test_what_a_tool_said_is_not_trained_on(model):
    answer = batch_of(encode('Aa3=5;!5'))[0]
    spoken = dataclasses.replace(answer, sampled=[True] * 4 + [False] * 2 + [True] * 2)
    loss = policy_loss(model, [spoken], [SegmentAdvantages([0.5, -2.0], [4, 2], 0.0)], 'grpo')
    assert loss.item() == pytest.approx(-(4 * 0.5 - 2 * 2.0) / 6)
    model.zero_grad()
    loss.backward()
    found = model.model.norm.weight.grad.clone()

    model.zero_grad()
    values = [0.5] * 4 + [0.0] * 2 + [-2.0] * 2
    whole = policy_loss(model, [answer], [SegmentAdvantages(values, [1] * 8, 0.0)], 'grpo')
    (whole * 8 / 6).backward()
    assert torch.allclose(found, model.model.norm.weight.grad, atol=1e-6)


def test_a_placeholder_moves_nothing(model):
    placeholder = Answer(problems(1)[0], [], [], 0.0, TreeReport('t', [], [], StopReason.ABSENT, 0))
    batch = [*batch_of(encode('Aa3=5;')), placeholder]
    found = policy_loss(model, batch, [SegmentAdvantages([1.0], [6], 1.0), SegmentAdvantages([], [], 0.0)], 'grpo')
    assert found.item() == pytest.approx(-0.5)
    assert padded([([5, 6], [7], [True]), ([5], [], [])])[1].tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_mean_reward_and_flat_prompts_by_hand():
    def answer(tree: str, value: float, stop: StopReason = StopReason.EOS) -> Answer:
        return Answer(problems(1)[0], [], [], value, TreeReport(tree, [], [], stop, 1))

    flat = [answer('a', 1.0), answer('a', 1.0), answer('a', 0.0, StopReason.ABSENT)]
    assert reward_and_flat([*flat, answer('b', 1.0), answer('b', 0.0)]) == (0.75, 0.5)


def test_advantages_are_the_packages_own(model):
    trees, config = forest(model, METHODS['treepo'])
    batch = [
        dataclasses.replace(answer, reward=float(i % 3 == 0)) for i, answer in enumerate(answers(trees, problems(3)))
    ]
    found = advantages(batch, config)
    tokens = [n for one in found for n in one.tokens]
    values = [v for one in found for v in one.values]
    assert sum(n * v for n, v in zip(tokens, values, strict=True)) == pytest.approx(0, abs=1e-6)  # whitened
    assert sum(n * v * v for n, v in zip(tokens, values, strict=True)) / (sum(tokens) - 1) == pytest.approx(1)


# Signal and noise.


def test_signal_and_noise_by_hand():
    # Mean projection 2, so signal 4; mean square 6, so noise 2: 2 a batch of 500 tokens, 4 for 1,000.
    batches = [Batch(1.0, 5.0, 400), Batch(3.0, 7.0, 600)]
    assert ratio_of(batches) == pytest.approx(4.0)
    # |mean g|^2 = 5, of which the scatter of 2 batches is (6 - 5) / (2 - 1) = 1: the mean has length 2.
    found = signal_of('m', batches, mean_square=5.0)
    assert found.cosine == pytest.approx(1.0) and found.tokens == 500
    # Jackknife of three: leaving one out gives ratios a, b, c.
    three = [*batches, Batch(2.0, 8.0, 500)]
    left = [ratio_of(three[:i] + three[i + 1 :]) for i in range(3)]
    middle = sum(left) / 3
    assert signal_of('m', three, 5.0).error == pytest.approx(sqrt(2 / 3 * sum((x - middle) ** 2 for x in left)))
    assert str(ratio_of([Batch(0.0, 0.0, 9)] * 2)) == 'nan'
    with pytest.raises(ValueError, match='at least 2'):
        signal_of('m', batches[:1], 1.0)
    assert rows([found, found])[1]['over m'] == '1.00'


# The command.


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / 'tiny.yaml'
    values = {
        'task': 'decisions',
        'learning_rates': [1e-3, 1e-2],
        'tuning_seeds': [9],
        'seeds': [1, 2],
        'training': {'tokens': 300, 'marks': 1, 'prompts': 1, 'width': 4, 'heldout': 4},
        'pretraining': SMALL.model_dump(),
        'methods': {'grpo': GRPO, 'even': {'tree': {'pacing': 'even', 'advantage': {'estimator': 'progress'}}}},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def arena(*arguments: object) -> int:
    return main(['arena', *map(str, arguments)])


def test_a_matrix_runs_reports_and_goes_on_where_it_stopped(tiny, tmp_path, capsys):
    out, cache = tmp_path / 'out', tmp_path / 'models'
    assert arena(tiny, '--out', out, '--cache', cache) == 0
    lines = (out / 'results.jsonl').read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * 2 + 2 * 2
    assert all(json.loads(line)['curve'][-1]['decoded'] >= 300 for line in lines)
    text = (out / 'report.md').read_text()
    assert 'Difference to grpo by seed' in text and '| even' in text

    (out / 'results.jsonl').write_bytes(b''.join(lines[:-1]) + lines[-1][:40])
    capsys.readouterr()
    assert arena(tiny, '--out', out, '--cache', cache) == 0
    assert capsys.readouterr().out.count('(reported)') == 1
    again = (out / 'results.jsonl').read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    first, second = (json.loads(line[-1]) for line in (lines, again))
    for run in (first, second):
        for point in run['curve']:
            del point['seconds']
    assert first == second

    assert arena('--report', out) == 0
    assert (out / 'report.md').read_text() in capsys.readouterr().out


def test_signal_and_noise_by_the_command(tiny, tmp_path, monkeypatch, capsys):
    assert arena(tiny, '--out', tmp_path / 'out', '--cache', tmp_path / 'models', '--snr', 2) == 1
    assert 'no gradient to measure' in capsys.readouterr().err  # the small model is never right
    monkeypatch.setattr(rollout, 'reward', lambda problem, text, *, ended: float(len(text) % 2))
    assert arena(tiny, '--out', tmp_path / 'out', '--cache', tmp_path / 'models', '--snr', 2) == 0
    text = (tmp_path / 'out' / 'signal.md').read_text()
    assert '| grpo' in text and '| even' in text


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--out', 'x'], 'give MATRIX.yaml and --out'),
        (['m.yaml'], 'give MATRIX.yaml and --out'),
        (['missing.yaml', '--out', 'x'], 'missing.yaml'),
        (['m.yaml', '--report', 'x'], '--report FOLDER takes no matrix'),
        (['--report', 'nowhere'], 'nowhere'),
    ],
)
def test_what_can_not_work_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert arena(*arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1


def test_one_batch_shows_no_noise_and_no_thread_computes_nothing(tiny, tmp_path, capsys):
    assert arena(tiny, '--out', tmp_path / 'out', '--snr', 1) == 1
    assert '--snr 1' in capsys.readouterr().err
    assert arena(tiny, '--out', tmp_path / 'out', '--threads', 0) == 1
    assert '--threads 0' in capsys.readouterr().err


def test_examples_are_of_this_loop():
    assert Matrix(task='rare', methods={'m': GRPO}, learning_rates=[1e-4], seeds=[1]).pretraining == Pretraining()
