"""The real loop with log-probs over tries, and without: the same training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('vllm')

STEPS = 5


def weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(next(run.glob(f'checkpoint-{STEPS}/model.safetensors')))


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / 'logging.jsonl').read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def test_a_run_reaches_the_same_weights(serve: Callable[..., int], train: Callable[..., Any], tmp_path: Path):
    """One seed, one tree: the rollouts are the same as long as the weights are."""
    port = serve()
    runs = {}
    for way, enabled in (('shared', 'true'), ('plain', 'false')):
        runs[way] = tmp_path / way
        done = train(
            port,
            steps=STEPS,
            OUTPUT=str(runs[way]),
            TREEPO_SHARED_PREFIX__ENABLED=enabled,
            TREEPO_SHARED_PREFIX__SKIP_OLD_LOGPROBS=enabled,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout + done.stderr
        assert ('computed over the trie' in said) == (way == 'shared'), said[-3000:]
        assert 'shares no prefixes' not in said and 'old log-probs are computed' not in said
    for ours, theirs in zip(history(runs['shared']), history(runs['plain']), strict=True):
        print(
            {
                key: (ours.get(key), theirs.get(key))
                for key in ours
                if 'tree/' not in key or 'ratio' in key or 'second' in key
            }
        )
    shared, plain = weights(runs['shared']), weights(runs['plain'])
    assert shared.keys() == plain.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(history(runs['shared']), history(runs['plain']), strict=True):
        assert ours['reward'] == theirs['reward'] and ours['tree/train_token_ratio'] > 1.5
        assert theirs['tree/train_token_ratio'] == 1
        assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-4)
        assert 'tree/logprob_seconds' not in ours and theirs['tree/logprob_seconds'] > 0
