"""The configs of examples/peers and the recommended one load and, grown in small on a fake engine, branch as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip('swift')

from tests.builders import EOS, segment_of
from tests.integration.fake_engine import SEPARATOR, FakeEngine
from tests.integration.test_scheduler import tree_of
from tests.integration.test_turns import ChatTree, talk
from treepo_swift.advantage.batch import tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.core.tree import StopReason
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.wire.report import TreeReport

FOLDER = Path(__file__).parents[2] / 'examples' / 'peers'
FILES = {path.stem: path for path in FOLDER.glob('*.yaml')}
ROW = re.compile(r'^\| `(\w+)\.yaml` \| (\d+) \|', re.MULTILINE)
WIDTHS = {name: int(width) for name, width in ROW.findall((FOLDER / 'README.md').read_text())}
BRANCHES = {
    # Forks at boundaries (the root's included), and branches from finished chains.
    'tree_grpo': (2 - 1, 2 * 2),
    'treerl': (6 - 1, 6 * 2 * 2),
    'spo_tree': (6**3 - 1, 0),
    'spo_chain': (0, 5 * 9),
    'fr3e': (4 - 1, 4 * 3),
    'arpo': (16 - 1, 0),
    'treerpo': (4**3 - 1, 0),
    'at2po': (10 - 1, 12),
    'deep_grpo': (8 - 1, 2 * 8),
    'rtmc': (8 - 1, 0),
    'depth_wise': (16 - 1, 0),
}
TURNS = ('tree_grpo', 'arpo', 'at2po', 'rtmc')
TURN = SEPARATOR + 1
"""A byte of the prompts that take turns."""


def speak(context, max_tokens, seed):
    """Letters that differ, to the limit of a single answer; turns are of one segment."""
    ids = [97 + (seed * 7 + len(context) * 3 + i * i) % 26 for i in range(max_tokens)]
    return segment_of([*ids[:-1], EOS], StopReason.EOS) if TURN in context else segment_of(ids)


def test_each_is_in_the_table_and_says_its_width():
    assert FILES.keys() == WIDTHS.keys() == BRANCHES.keys()
    for name, path in FILES.items():
        assert f'--num_generations {WIDTHS[name]}' in path.read_text().splitlines()[1]


@pytest.mark.parametrize('name', BRANCHES)
def test_a_method_grows_and_trains_scaled_down(name):
    stats = grow_and_judge(FILES[name], WIDTHS[name], turns=name in TURNS)
    assert (stats['forks'], stats['fallbacks']) == BRANCHES[name]


def test_the_recommended_config_continues_one_answer_seven_times():
    stats = grow_and_judge(FOLDER.parent / 'uncertain_tokens.yaml', 8, turns=False)
    assert (stats['forks'], stats['fallbacks']) == (0, 7)


def grow_and_judge(path, width, *, turns):
    """A tree of the config in small; every answer is grown, and some advantages are above 0, some below. Its stats."""
    config = TreeConfig.load({'TREEPO_CONFIG': str(path)})
    small = config.replace(segment_length=8, max_depth=min(config.max_depth, 6))
    outputs = talk(
        ChatTree if turns else TreeRolloutScheduler,
        width,
        config=small,
        engine=FakeEngine(speak=speak, block_size=4),
        prompt='a}' if turns else 'a',
    )
    reports = [TreeReport.from_dict(tree_of(output)) for output in outputs]
    assert not any(report.is_placeholder for report in reports)
    rewards = [float(i % 3 == 0) for i in range(len(reports))]
    advantages = tree_advantages(reports, rewards, [sum(report.tokens) for report in reports], config)
    assert any(a.mean > 0 for a in advantages) and any(a.mean < 0 for a in advantages)
    return tree_of(outputs[0])['stats']
