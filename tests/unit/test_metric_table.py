"""The table of metrics is whole, and docs/metrics.md is made of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from treepo_swift.core.tree import StopReason, TreeStats
from treepo_swift.trainer.metric_table import METRICS, markdown
from treepo_swift.trainer.metrics import RolloutRound, tree_metrics
from treepo_swift.wire.report import BatchReport, EngineCounters, TreeReport

ROOT = Path(__file__).parents[2]
NAMES = [metric.name for metrics in METRICS.values() for metric in metrics]


def report(tree: str, nodes: list[int], **options: object) -> TreeReport:
    return TreeReport(tree, nodes, [1] * len(nodes), StopReason.EOS, len(nodes), **options)


def test_every_metric_that_is_logged_is_in_the_table_and_the_other_way_round():
    batch = BatchReport(seconds=2.0, scheduler_cpu_seconds=0.1, engine=EngineCounters(1, 1, 0, 5))
    reports = [report('t', [1, 2], stats=TreeStats(), batch=batch), report('t', [3])]
    logged = set(tree_metrics([RolloutRound(reports, [1.0, 0.0])]))
    sources = '\n'.join(path.read_text() for path in (ROOT / 'treepo_swift' / 'trainer').rglob('*.py'))
    logged |= set(re.findall(r"'(tree/[a-z_]+)'", sources.replace(markdown.__module__, '')))
    named = {name.partition('<')[0] for name in NAMES}
    stops = {f'tree/stop/{reason.value}' for reason in StopReason}
    assert {name for name in logged - stops if name not in named} == set()
    elsewhere = '\n'.join(
        path.read_text() for path in (ROOT / 'treepo_swift').rglob('*.py') if path.name != 'metric_table.py'
    )
    assert {name for name in named if name.rstrip('/') not in elsewhere} == set()
    assert len(NAMES) == len(set(NAMES))


def test_the_page_is_made_of_the_table():
    page = (ROOT / 'docs' / 'metrics.md').read_text()
    assert page.endswith('\n\n' + markdown()), (
        'write markdown() of treepo_swift.trainer.metric_table below the first table'
    )
    begin = page[: -len(markdown())]
    for name in re.findall(r'`([a-z_]+(?:/[a-z_]+)?)`', begin.partition('| --- |')[2]):
        known = f'tree/{name}' in NAMES or name.startswith('stop/')
        assert known or name in ('reward_std', 'max_completion_length'), name


@pytest.mark.parametrize(
    'rewards, contrast',
    [
        ([1, 1, 0, 0], 1.0),  # all between the first branches
        ([1, 0, 1, 0], 0.0),  # all below them
        ([1, 0, 0, 0], 1 / 3),  # branch means .5 and 0, grand mean .25: 4 x .0625 of .75
        ([1, 1, 1, 1], None),
    ],
)
def test_contrast_is_the_share_of_variance_between_first_branches(rewards, contrast):
    reports = [report('t', [1, 2]), report('t', [1, 3]), report('t', [4, 5]), report('t', [4, 6])]
    got = tree_metrics([RolloutRound(reports, [float(r) for r in rewards])]).get('tree/contrast')
    assert got == (None if contrast is None else pytest.approx(contrast))
