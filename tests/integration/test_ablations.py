"""Every config under examples/ablations loads, and grows trees of width 16 scaled down to a fake engine.

What compare.py does around its trainings: the token budget that ends them, and the table of what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip('swift')

from tests.flat import (
    changed,
)
from tests.integration.fake_engine import FakeEngine
from tests.integration.test_scheduler import requests, rollout, scheduler, tree_of
from treepo_swift.advantage.batch import tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.wire.report import TreeReport

FOLDER = Path(__file__).parents[2] / 'examples' / 'ablations'
FILES = sorted(FOLDER.glob('*.yaml'))
sys.path.insert(0, str(FOLDER))
SCALE = 32
"""512 tokens become 16."""


def load(path: Path) -> TreeConfig:
    return TreeConfig.load({'TREEPO_CONFIG': str(path)})


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_an_ablation_grows_and_trains_scaled_down(path):
    config = load(path)
    assert config.max_response_tokens == 7168
    small = config.replace(segment_length=config.segment_length // SCALE)
    if hasattr(config.fallback, 'block'):
        small = changed(small, fallback=config.fallback.policy, fallback_block=config.fallback.block // SCALE)
    outputs = rollout(
        requests(*['prompt'] * 16, *['another'] * 16, config=small),
        scheduler(FakeEngine(block_size=4)),
        max_tokens=small.max_response_tokens,
    )
    reports = [TreeReport.from_dict(tree_of(output)) for output in outputs]
    assert len({report.id for report in reports}) == 2
    assert all(0 < report.depth <= config.max_depth for report in reports)
    lengths = [len(output.response_token_ids[0]) for output in outputs]
    assert lengths == [sum(report.tokens) for report in reports]
    rewards = [float(sum(output.response_token_ids[0]) % 2) for output in outputs]
    advantages = tree_advantages(reports, rewards, lengths, config)
    assert any(segment.mean > 0 for segment in advantages) and any(segment.mean < 0 for segment in advantages)


def test_configs_differ_and_the_table_names_all():
    configs = [load(path) for path in FILES]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    readme = (FOLDER / 'README.md').read_text()
    assert all(f'| `{path.name}` |' in readme for path in FILES) and readme.count('.yaml` |') == len(FILES)


def test_the_token_budget_saves_at_marks_and_stops_at_the_last(tmp_path, monkeypatch):
    monkeypatch.setenv('TOKEN_MARKS', '1000,2000')
    monkeypatch.setenv('TOKEN_POINTS', str(tmp_path / 'points.jsonl'))
    from token_budget import TokenBudget

    args = SimpleNamespace(generation_batch_size=64)
    callback = TokenBudget(args, None)
    asked = []
    # 640 tokens without a tree, 600 with one, the summary of the end, 800 that reach the last mark.
    logs = [
        {'completions/mean_length': 10.0},
        {'completions/mean_length': 20.0, 'tree/decoded_tokens': 600.0},
        {'train_runtime': 1.0},
        {'completions/mean_length': 12.5},
    ]
    for step, row in enumerate(logs, start=1):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        callback.on_log(args, SimpleNamespace(global_step=step), control, row)
        asked.append((control.should_save, control.should_training_stop))
    assert asked == [(False, False), (True, False), (False, False), (True, True)]
    points = [json.loads(line) for line in (tmp_path / 'points.jsonl').read_text().splitlines()]
    assert points == [{'mark': 1000, 'tokens': 1240, 'step': 2}, {'mark': 2000, 'tokens': 2040, 'step': 4}]


def test_the_table_has_a_row_per_method_and_a_column_per_mark():
    from compare import table

    points = [
        {'method': 'grpo', 'seed': seed, 'mark': mark, 'tokens': mark + 7, 'step': mark // 100, 'accuracy': accuracy}
        for seed, mark, accuracy in ((1, 500, 0.5), (2, 500, 0.6), (1, 1000, 0.7), (2, 1000, 0.7))
    ]
    text = table({'base_accuracy': 0.48, 'heldout_problems': 256, 'points': points})
    assert '| method | steps | 500 tokens | 1,000 tokens |' in text
    assert '| GRPO, independent sampling | 10 | 55.0 ± 7.1 (50.0 to 60.0) | 70.0 ± 0.0 (70.0 to 70.0) |' in text
    assert 'over seeds 1, 2' in text and 'Before training: 48.0%' in text


def test_methods_are_tree_configs_and_only_grpo_has_no_tree():
    from compare import METHODS

    configs = {
        name: TreeConfig.load({f'TREEPO_{key}': value for key, value in method.tree.items()})
        for name, method in METHODS.items()
        if method.tree is not None
    }
    assert set(METHODS) - set(configs) == {'grpo'}
    chosen = configs['grpo_tree'].advantage
    assert (chosen.estimator, chosen.normalisation) == ('grpo', 'none')
    assert configs['treepo'] == TreeConfig() and configs['treepo_more_init'].root_divergence == (2, 8)


def test_the_answer_stop_counts_what_was_trained_without_eos(tmp_path):
    import answer_stop

    eos = 1
    rows = [
        {'step': 0, 'stop': 'answer', 'token_ids': [5, 6], 'reward': 1.0},
        {'step': 0, 'stop': 'answer', 'token_ids': [5, 6, eos], 'reward': 0.0},
        {'step': 9, 'stop': 'depth_limit', 'token_ids': [5] * 4, 'reward': 0.0},
        {'step': 9, 'stop': 'eos', 'token_ids': [5, 6, eos], 'reward': 1.0},
    ]
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'logging.jsonl').write_text('{"tree/decoded_tokens": 9, "tree/independent_tokens": "12"}\n')
    (tmp_path / 'trajectories.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    figures = answer_stop.training_figures(tmp_path, 10, eos)
    assert (figures['decoded'], figures['independent']) == (9, 12)
    parts = figures['parts']
    assert parts['all']['without_eos_by_stop'] == {'answer': 0.25, 'depth_limit': 0.25}
    assert parts['first 3 steps']['stops'] == {'answer': 1.0}
    assert [parts[name]['tokens'] for name in parts] == [3, 2.5, 3.5]
