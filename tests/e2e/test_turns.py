"""Turns on real vLLM and the real CLIs: the game of examples/gym, trained on trees by its own scripts."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.e2e.conftest import ROOT

GYM = ROOT / 'examples' / 'gym'


def test_a_gym_environment_trains_on_trees_of_turns(serve, train, tmp_path):
    """With a model that does not know the game: turns end at their limit as often as with EOS."""
    subprocess.run([sys.executable, str(GYM / 'number_game_task.py'), '--output', str(tmp_path / 'data')], check=True)
    port = serve(script=GYM / 'rollout.sh')
    result = train(
        port,
        '--log_rollout_offpolicy_metrics',
        'true',
        script=GYM / 'train.sh',
        steps=2,
        DATASET=str(tmp_path / 'data' / 'train.jsonl'),
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / 'train' / 'logging.jsonl').read_text().splitlines()]
    rows = [row for row in rows if 'tree/decoded_tokens' in row]
    assert len(rows) == 2
    for row in rows:
        row = {key: float(value) for key, value in row.items() if key.startswith(('tree/', 'num_turns', 'rollout_c'))}
        assert row['tree/trees'] == 8 and row['tree/failures'] == 0
        assert 1 < row['num_turns'] <= 5 and row['tree/turns'] > 8
        assert 0 < row['tree/decoded_tokens'] < row['tree/independent_tokens']
        # The trainer's log-prob of every trained token is the one that vLLM sampled it with: the history before it is
        # the same, over all turns, and no token of the environment is among them.
        assert abs(row['rollout_correction/log_ppl_abs_diff']) < 1e-4
    assert {row['rewards/gym_reward/mean'] is not None for row in rows} == {True}
