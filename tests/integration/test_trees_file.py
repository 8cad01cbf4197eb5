"""Trees on disk, from the trainer's batch to `load`: what is written, by whom, and that it never hurts a training."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from tests.builders import grow, make_search
from tests.flat import flat
from tests.integration.test_trainer import advantages, build_trainer
from treepo_swift.advantage.batch import SegmentAdvantages
from treepo_swift.core.tree import Tree, response_ids
from treepo_swift.trainer.tree_writer import WAITING, TreeWriter
from treepo_swift.view import load
from treepo_swift.wire.report import TreeReport
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace


class Bytes:
    """A tokenizer of bytes, in which EOS has a name."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [*text.encode()]

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return '<eos>'.join(part.decode(errors='replace') for part in bytes(ids).split(b'\0'))


def grown(id: str, seed: int, width: int = 4) -> Tree:
    tree = grow(make_search(flat(segment_length=3, max_depth=3), width, seed=seed)).tree
    tree.id = id
    return tree


def infos(*trees: Tree, traced: bool = True) -> list[dict[str, Any]]:
    """`rollout_infos` of all trajectories of some trees."""
    found = []
    for tree in trees:
        for index in range(len(tree.trajectories)):
            found.append({'num_turns': 1, 'tree': TreeReport.of(tree, index).to_dict()})
            if traced and index == 0:
                found[-1][TRACE_KEY] = json.loads(json.dumps(TreeTrace.of(tree).to_dict()))
    return found


def writer(folder: Path, *, rank: int = 0, tokenizer: Any = None, **config: Any) -> tuple[TreeWriter, list[str]]:
    warnings: list[str] = []
    made = TreeWriter(folder, tokenizer or Bytes(), flat(**config), rank=rank, warn=warnings.append)
    return made, warnings


def add(
    target: TreeWriter, *trees: Tree, mine: slice = slice(None), step: int = 1, samples: list[Any] | None = None
) -> list[Any]:
    values = infos(*trees)
    count = len(values)
    samples = samples or [SimpleNamespace(rollout_infos=info) for info in values[mine]]
    target.add(
        samples,
        [TreeReport.from_dict(info['tree']) for info in values],
        rewards=[float(index % 2) for index in range(count)],
        rewards_per_function=[[float(index % 2), float('nan')] for index in range(count)],
        names=['right', 'silent'],
        advantages=[SegmentAdvantages([index / 10], [5], index / 10) for index in range(count)],
        step=step,
        mode='train',
    )
    return samples


@pytest.mark.parametrize('estimator', ['treepo', 'progress'])
def test_the_trainer_writes_its_trees_with_what_it_trained_on(tmp_path, estimator):
    trees = [grown('a', 1), grown('b', 2)]
    rewards = [1.0, 0, 0, 1, 0, 0, 0, 1]
    values = infos(*trees)
    reports = [value['tree'] for value in values]
    config = dict(estimator=estimator)
    trainer, samples = build_trainer(reports, rewards, config=config)
    target, warnings = writer(tmp_path, **config)
    trainer._tree_writer = target
    for sample, info in zip(samples, values, strict=True):
        sample.rollout_infos = info
    trained = advantages(trainer, samples)
    target.close()
    assert not warnings and all(TRACE_KEY not in sample.rollout_infos for sample in samples)
    found = load(tmp_path)
    assert [record.tree for record in found] == ['a', 'b'] and {record.step for record in found} == {1}
    trajectories = [t for record in found for t in record.trajectories]
    assert [t.reward for t in trajectories] == rewards and trajectories[0].rewards == {'right': 1.0}
    for t, row, path in zip(trajectories, trained, [p for tree in trees for p in tree.trajectories], strict=True):
        assert t.advantage == pytest.approx(sum(row) / len(row), abs=1e-3)
        assert t.loss_tokens == len(response_ids(path.leaf))
        if t.segments:
            assert t.segments[0] == pytest.approx(row[0], abs=1e-3)
    assert any(t.segments for t in trajectories) == (estimator == 'progress')
    text = found[0].texts()[0]
    assert text == Bytes().decode(
        response_ids(trees[0].trajectories[0].leaf), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert found[0].prompt == 'AB'


def test_advantages_are_the_same_with_and_without_a_file(tmp_path):
    rows = []
    for target in (None, writer(tmp_path)[0]):
        values = infos(grown('a', 1))
        trainer, samples = build_trainer([v['tree'] for v in values], [1.0, 0, 0, 0])
        trainer._tree_writer = target
        for sample, info in zip(samples, values, strict=True):
            sample.rollout_infos = info
        rows.append(advantages(trainer, samples))
    assert rows[0] == rows[1]


def test_trees_are_asked_for_where_completions_are_logged():
    trainer, _ = build_trainer([], [])
    trainer.trees_here = None
    assert not trainer._request_note().trace
    trainer._tree_writer = object()
    assert trainer._request_note().trace
    trainer.model.training = False
    assert not trainer._request_note().trace, 'an evaluation has no trees'


def test_log_completions_and_the_rate_decide(tmp_path):
    trainer, _ = build_trainer([], [])
    trainer.processing_class = Bytes()
    trainer.args.output_dir = str(tmp_path)
    for logged, rate, wanted in ((True, 1.0, True), (True, 0.0, False), (False, 1.0, False)):
        trainer.args.log_completions = logged
        trainer.tree_config = flat(trace={'rate': rate})
        assert (trainer._new_tree_writer() is not None) == wanted
    assert not (tmp_path / 'trees').exists(), 'nothing is written before there are trees'


def test_each_rank_writes_the_trees_that_begin_with_it_wherever_the_rest_lies(tmp_path):
    trees = [grown(id, seed) for seed, id in enumerate('abc')]
    # Twelve trajectories on two ranks: the middle tree is cut in halves.
    for rank, mine in enumerate((slice(0, 6), slice(6, 12))):
        target, warnings = writer(tmp_path, rank=rank)
        add(target, *trees, mine=mine)
        target.close()
        assert not warnings
    files = {path.name: [json.loads(line)['tree'] for line in path.open()] for path in (tmp_path / 'trees').iterdir()}
    assert files == {'rank-0.jsonl': ['a', 'b'], 'rank-1.jsonl': ['c']}
    found = load(tmp_path)
    assert [[t.reward for t in record.trajectories] for record in found] == [[0.0, 1.0, 0.0, 1.0]] * 3
    assert found[0].trajectories[0].rewards == {'right': 0.0, 'silent': None}


def test_a_resumed_run_goes_on_in_the_same_file_and_replaces_what_it_repeats(tmp_path):
    for run, steps in (('2026-01-01T00:00:00Z', (1, 2, 3)), ('2026-01-02T00:00:00Z', (3, 4))):
        target, _ = writer(tmp_path)
        target._run = run
        for step in steps:
            add(target, grown(f'{run[9]}-{step}', step), step=step)
        target.close()
    assert [record.tree for record in load(tmp_path)] == ['1-1', '1-2', '2-3', '2-4']
    assert len(load(tmp_path, superseded=True)) == 5


def test_half_a_line_of_a_killed_process_spoils_no_other(tmp_path):
    target, _ = writer(tmp_path)
    add(target, grown('a', 1))
    target.close()
    whole = target.path.read_bytes()
    target.path.write_bytes(whole + whole[:200])
    target, warnings = writer(tmp_path)
    add(target, grown('b', 2), step=2)
    target.close()
    assert not warnings
    with pytest.warns(UserWarning, match='1 lines are not whole'):
        assert [record.tree for record in load(tmp_path)] == ['a', 'b']


def test_a_full_disk_is_one_warning_and_the_training_goes_on(tmp_path, monkeypatch):
    target, warnings = writer(tmp_path)
    calls: list[int] = []

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

        def tell(self):
            return 0

        def write(self, data):
            calls.append(len(data))
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'open', lambda self, mode='r', **options: Full())
    for step in range(3 * WAITING):
        add(target, grown('a', 1), step=step)
        time.sleep(0.01)
    began = time.perf_counter()
    target.close()
    assert time.perf_counter() - began < 5
    assert len(calls) == 1 and len(warnings) == 1
    assert 'No space left on device' in warnings[0] and 'the training goes on' in warnings[0]


def test_a_tree_that_came_apart_is_left_out_alone(tmp_path):
    target, warnings = writer(tmp_path)
    torn = grown('torn', 1)
    values = infos(torn)
    del torn.trajectories[1]
    for info in copy.deepcopy([values[0], values[0]]):
        add(target, torn, samples=[SimpleNamespace(rollout_infos=info)])
    add(target, grown('whole', 2))
    target.close()
    assert [record.tree for record in load(tmp_path)] == ['whole']
    assert len(warnings) == 1 and 'tree torn has 4 trajectories, and 3 were scored' in warnings[0]


def test_a_tokenizer_that_breaks_is_one_warning_too(tmp_path):
    class Broken(Bytes):
        def decode(self, ids, **options):
            raise RuntimeError('Already borrowed')

    target, warnings = writer(tmp_path, tokenizer=Broken())
    add(target, grown('a', 1))
    add(target, grown('b', 1))
    target.close()
    assert len(warnings) == 1 and 'Already borrowed' in warnings[0]


def test_a_writer_that_can_not_follow_leaves_trees_out_and_nobody_waits(tmp_path):
    gate = threading.Event()

    class Slow(Bytes):
        def encode(self, text, add_special_tokens=False):
            gate.wait(10)
            return super().encode(text)

        def __deepcopy__(self, memo):
            return self

    target, warnings = writer(tmp_path, tokenizer=Slow())
    trees = [grown(str(i), i) for i in range(WAITING + 4)]
    began = time.perf_counter()
    for tree in trees:
        samples = add(target, tree)
        assert TRACE_KEY not in samples[0].rollout_infos
    assert time.perf_counter() - began < 5 and len(warnings) == 1 and 'trace.rate' in warnings[0]
    gate.set()
    target.close()
    assert WAITING <= len(load(tmp_path)) <= WAITING + 1


def test_the_tokenizer_of_the_training_is_not_touched(tmp_path):
    tokenizer = Bytes()
    target, _ = writer(tmp_path, tokenizer=SimpleNamespace(tokenizer=tokenizer))
    assert target._tokenizer is not tokenizer and isinstance(target._tokenizer, Bytes)


def test_a_batch_without_trees_starts_nothing(tmp_path):
    target, _ = writer(tmp_path)
    values = copy.deepcopy(infos(grown('a', 1), traced=False))
    target.add(
        [SimpleNamespace(rollout_infos=info) for info in values],
        [],
        rewards=[],
        rewards_per_function=[],
        names=[],
        advantages=[],
        step=1,
        mode='train',
    )
    assert target._thread is None and not (tmp_path / 'trees').exists()
    target.close()
