"""Every config under examples/ablations loads, and grows trees of width 16 scaled down to a fake engine."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip('swift')

from tests.integration.fake_engine import FakeEngine  # noqa: E402
from tests.integration.test_scheduler import requests, rollout, scheduler, tree_of  # noqa: E402
from treepo_swift.config import TreeConfig  # noqa: E402
from treepo_swift.trainer import tree_advantages  # noqa: E402

FOLDER = Path(__file__).parents[2] / 'examples' / 'ablations'
FILES = sorted(FOLDER.glob('*.yaml'))
SCALE = 32
"""512 tokens become 16."""


def load(path: Path) -> TreeConfig:
    return TreeConfig.load({'TREEPO_CONFIG': str(path)})


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_an_ablation_grows_and_trains_scaled_down(path):
    config = load(path)
    assert config.max_response_tokens == 7168
    small = dataclasses.replace(
        config,
        segment_length=config.segment_length // SCALE,
        fallback_block=max(config.fallback_block // SCALE, 1),
        repetition_length=8)
    outputs = rollout(
        requests(*['prompt'] * 16, *['another'] * 16, config=small),
        scheduler(FakeEngine(block_size=4)),
        max_tokens=small.max_response_tokens)
    reports = [tree_of(output) for output in outputs]
    assert len({report['id'] for report in reports}) == 2
    assert all(0 < report['depth'] <= config.max_depth for report in reports)
    lengths = [len(output.response_token_ids[0]) for output in outputs]
    assert lengths == [sum(report['tokens']) for report in reports]
    rewards = [float(sum(output.response_token_ids[0]) % 2) for output in outputs]
    advantages = tree_advantages(reports, rewards, lengths, config)
    assert any(segment.mean > 0 for segment in advantages) and any(segment.mean < 0 for segment in advantages)


def test_configs_differ_and_the_table_names_all():
    configs = [load(path) for path in FILES]
    assert len(set(configs)) == len(configs)
    readme = (FOLDER / 'README.md').read_text()
    assert all(f'| `{path.name}` |' in readme for path in FILES) and readme.count('.yaml` |') == len(FILES)
