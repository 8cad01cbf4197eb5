"""The real loop with log-probs over tries, and without. (That both end at the same weights is tested on fixed rows in
`tests/integration/test_shared_trainer.py`: the engine does not draw the same rollout twice.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('vllm')

STEPS = 5


def test_the_loop_shares_prefixes_and_can_be_told_not_to(
    serve: Callable[..., int], train: Callable[..., Any], tmp_path: Path
):
    port = serve()
    for way, enabled in (('shared', 'true'), ('plain', 'false')):
        done = train(
            port,
            steps=STEPS,
            OUTPUT=str(tmp_path / way),
            TREEPO_SHARED_PREFIX__ENABLED=enabled,
            TREEPO_SHARED_PREFIX__SKIP_OLD_LOGPROBS=enabled,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout + done.stderr
        assert ('computed over the trie' in said) == (way == 'shared'), said[-3000:]
        assert 'shares no prefixes' not in said and 'old log-probs are computed' not in said
        lines = [json.loads(line) for line in (tmp_path / way / 'logging.jsonl').read_text().splitlines()]
        steps = [line for line in lines if 'loss' in line]
        assert len(steps) == STEPS
        for step in steps:
            assert (step['tree/train_token_ratio'] > 1.2) == (way == 'shared')
            assert ('tree/logprob_seconds' in step) == (way == 'plain')
