"""What the package promises as a whole: light imports, clear version errors, no stray files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from treepo_swift.core.tree import StopReason, TreeStats
from treepo_swift.trainer.metrics import EvaluationFailures, RolloutRound, tree_metrics
from treepo_swift.wire.groups import group_requests
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.report import BatchReport, EngineCounters, TreeReport


@pytest.mark.parametrize(
    'module',
    [
        'treepo_swift',
        'treepo_swift.core.search',
        'treepo_swift.advantage',
        'treepo_swift.config',
        'treepo_swift.core.policies.stopping',
        'treepo_swift.cli.main',
    ],
)
def test_the_core_imports_no_torch_vllm_or_swift(module):
    code = f'import sys, {module}; print([m for m in ("torch", "vllm", "swift", "transformers") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


def test_a_wheel_holds_every_module_the_types_and_the_licence(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    root = Path(__file__).parents[2]
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / 'treepo_swift', tmp_path / 'treepo_swift', ignore=shutil.ignore_patterns('__pycache__'))
    code = 'from setuptools import build_meta; build_meta.build_wheel("dist")'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / 'dist').glob('treepo_swift-*.whl')
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (folder,) = {name.partition('/')[0] for name in names if '.dist-info/' in name}
        metadata, entries = (files.read(f'{folder}/{name}').decode() for name in ('METADATA', 'entry_points.txt'))
    modules = {str(path.relative_to(root)) for path in (root / 'treepo_swift').rglob('*.py')}
    assert modules | {'treepo_swift/py.typed', f'{folder}/licenses/LICENSE'} <= names
    assert 'Requires-Python: >=3.11' in metadata and 'License-Expression: Apache-2.0' in metadata
    assert 'treepo-swift = treepo_swift.cli.main:main' in entries and 'treepo_cpu = treepo_swift' in entries


def test_groups_keep_order_and_split_at_num_generations():
    groups = group_requests(['a', 'b', 'a', 'a', 'b', 'a'], [2] * 6)
    assert [(g.key, g.copy, g.members) for g in groups] == [('a', 0, (0, 2)), ('a', 1, (3, 5)), ('b', 0, (1, 4))]
    assert [g.members for g in group_requests(['a', 'b', 'a'], [None] * 3)] == [(0, 2), (1,)]


def test_request_notes_survive_the_wire():
    note = RequestNote(config={'seed': 1}, num_generations=8, step=3)
    assert RequestNote.from_dict(note.to_dict()) == note
    with pytest.raises(ValueError, match="mode='forest'"):
        RequestNote.from_dict(RequestNote(mode='forest').to_dict())


def test_metrics_of_a_batch():
    stats = TreeStats(decoded_tokens=60, trajectory_tokens=100, engine_requests=7, forks=3, fallbacks=1)
    batch = BatchReport(seconds=2.0, scheduler_cpu_seconds=0.1, hung_hooks=2)
    reports = [
        TreeReport('t', [1, 2], [3, 2], StopReason.ANSWER, 2, stats=stats, batch=batch),
        TreeReport('t', [1, 3], [3, 1], StopReason.EOS, 2),
        TreeReport('t', [4], [2], StopReason.DEPTH_LIMIT, 1),
        TreeReport('t', [], [], StopReason.FAILED, 0),
    ]
    assert [TreeReport.from_dict(report.to_dict()) for report in reports] == reports
    metrics = tree_metrics([RolloutRound(reports, [1.0, 1.0, 0.0, 0.0])])
    assert metrics['tree/saved_tokens'] == 40 and metrics['tree/saved_fraction'] == pytest.approx(0.4)
    assert metrics['tree/stop/answer'] == 0.25 and metrics['tree/depth'] == 1.25
    assert metrics['tree/flat_trees'] == 0 and metrics['tree/flat_subgroups'] == 1
    assert metrics['tree/scheduler_cpu_share'] == pytest.approx(0.05) and metrics['tree/hung_hooks'] == 2


def test_failures_of_an_evaluation_are_counted_by_kind():
    failures = EvaluationFailures()
    failures.add([None, 'Tools.step on segment 1 of path 2 of tree a7: raised KeyError: x', None])
    failures.add(['no engine', 'Tools.step on segment 1 of path 9 of tree b3: raised KeyError: x'])
    said = failures.describe()
    assert '3 of 5 answers' in said and '(2 times): Tools.step on segment 1 of path 2 of tree a7' in said


def test_what_an_engine_counted_between_two_moments():
    assert EngineCounters(9, 7, 5, 30).since(EngineCounters(4, 3, 5, 10)) == EngineCounters(5, 4, 0, 20)


def test_bench_times_every_estimator():
    # A process of its own: other tests register estimators too.
    def bench(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, '-m', 'treepo_swift.cli.main', 'bench', *args], capture_output=True, text=True
        )

    done = bench('--estimators', '--prompts', '8', '--width', '8', '--repeats', '1')
    assert done.returncode == 0, done.stderr
    assert all(f'\n| {name} ' in done.stdout for name in ('treepo', 'grpo', 'rloo', 'progress', 'spo', 'treerl'))
    assert bench('--estimators', '--prompts', '0').returncode == 1
