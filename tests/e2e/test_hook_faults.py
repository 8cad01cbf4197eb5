"""A training of eight steps in which one in ten hook calls raises, by the real CLI and real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip('vllm')

from tests.e2e import test_options
from tests.e2e.conftest import quickstart_script
from treepo_swift.view import load

STEPS = 8


def test_a_training_whose_hooks_raise_goes_on_and_learns_nothing_from_what_failed(serve_briefly, train, tmp_path):
    script = quickstart_script(tmp_path, plugins=[Path(__file__).with_name('raising.py')])
    port = serve_briefly(script=script, SCHEDULER='raises')
    result = train(port, '--per_device_train_batch_size', '32', steps=STEPS)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]

    rows = [row for row in test_options.read_rows(tmp_path / 'train') if 'tree/trees' in row]
    assert len(rows) == STEPS
    assert sum(row['tree/failures'] for row in rows) > STEPS
    trees = load(tmp_path / 'train')
    trajectories = [trajectory for tree in trees for trajectory in tree.trajectories]
    # 8 answers to each of 4 prompts a step: what failed was grown again from its siblings, or is masked.
    assert len(trajectories) == 32 * STEPS
    failed = [one for one in trajectories if one.stop == 'failed']
    assert all(one.is_placeholder and one.advantage == one.loss_tokens == 0 for one in failed)
    assert len(failed) < len(trajectories) / 10
    assert any(one.advantage for one in trajectories)
    for tree in trees:
        healthy = [one.reward for one in tree.trajectories if not one.is_placeholder]
        assert tree.value == (pytest.approx(sum(healthy) / len(healthy), abs=1e-4) if healthy else None)
