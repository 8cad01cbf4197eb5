"""50 seeded trees are what they were: `golden.json` was written before the package got its rooms."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip('swift')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

from tests.flat import flat
from tests.integration import golden
from tests.integration.fake_engine import FakeEngine, FakeTokenizer
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.wire.note import RequestNote


class AskAgain(TreeRolloutScheduler):
    """Two turns, the second after a word from the environment."""

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn >= 2

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': f'again {current_turn}'})
        return {'infer_request': infer_request}


def batch(seed: int, keys: dict[str, Any]) -> list[Any]:
    width = 4 + seed % 7
    by_segment = keys.pop('schedule') == 'lockstep'
    config = flat(**keys)
    # Every fourth batch has two turns; the golden configs cut anywhere, so all of them fork at both.
    cls = AskAgain if seed % 4 == 3 else TreeRolloutScheduler
    engine = FakeEngine(fails=lambda call: False)
    scheduler = cls(segment_engine=engine, tokenizer=FakeTokenizer())
    scheduler.by_segment = by_segment
    note = RequestNote(config=config.to_dict(), num_generations=width, step=seed, progress=seed / 25).to_dict()
    requests = [
        RolloutInferRequest(
            messages=[{'role': 'user', 'content': f'prompt {prompt} of {seed}'}],
            uuid=f'{prompt}-{copy}',
            data_dict={'treepo': note},
        )
        for prompt in range(2)
        for copy in range(width)
    ]
    request_config = RequestConfig(max_tokens=70, return_details=True, logprobs=True, seed=1)
    return asyncio.run(scheduler.rollout(requests, request_config, use_tqdm=False))


def test_golden_trees():
    assert golden.grow(batch) == json.loads(golden.FILE.read_text())


if __name__ == '__main__':
    golden.FILE.write_text(json.dumps(golden.grow(batch), separators=(',', ':')) + '\n')
