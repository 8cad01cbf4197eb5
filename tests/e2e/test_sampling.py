"""`treepo-swift sample` and `eval` on real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import run_whole
from tests.e2e.test_bench import ENGINE
from treepo_swift.view import load


@pytest.fixture
def command(environment: dict[str, str], model: Path):
    def run(name: str, *args: str) -> subprocess.CompletedProcess:
        started = [sys.executable, '-m', 'treepo_swift.cli.main', name, str(model), *args, '--', *ENGINE]
        shape = {'TREEPO_SEGMENT_LENGTH': '32', 'TREEPO_MAX_DEPTH': '4', 'VLLM_CPU_KVCACHE_SPACE': '1'}
        return run_whole(started, timeout=300, env={**environment, **shape})

    return run


def test_trees_and_independent_answers_are_compared(command, model, tmp_path):
    output = tmp_path / 'eval'
    data = ('--data', str(model / 'heldout.jsonl'), '--limit', '4')
    done = command('eval', *data, '--width', '4', '--divergence', '2', '--pacing', 'even', '--output', str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith('| d2-even ')
    result = json.loads((output / 'results.json').read_text())
    curves = {curve['family']: curve for curve in result['settings']}
    assert list(curves) == ['independent', 'd2-even']
    for name, curve in curves.items():
        records = load(output / f'{name}-w4.jsonl')
        assert len(records) == curve['prompts'] == 4 and curve['failed'] == 0
        assert all('digit' in record.prompt and len(record.trajectories) == 4 for record in records)
        tokens = sum(len(node.tokens) for record in records for node in record.nodes) / 4
        assert curve['points'][-1]['tokens'] == pytest.approx(tokens) and curve['seconds'] > 0
        whole = sum(t.loss_tokens for record in records for t in record.trajectories) / 4
        assert tokens == whole if name == 'independent' else tokens < whole
    # What an answer holds is what the engine said: its log-probs are there, and it ends as it was sampled.
    (first, *_) = load(output / 'independent-w4.jsonl')
    assert all(len(node.logprobs) == len(node.tokens) for node in first.nodes)
