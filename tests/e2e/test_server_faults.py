"""A real rollout server under bad input and short memory: what it answers, and that the next batch is as ever."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.rlhf_trainers import VLLMInferClient

from tests.e2e.conftest import quickstart_script
from treepo_swift.config import TreeConfig
from treepo_swift.trainer.rollout import rollout_note
from treepo_swift.trainer.servers import ServerError, ask, probe_servers
from treepo_swift.wire.report import TreeReport

CONFIG = TreeConfig(segment_length=32, max_depth=8)
WIDTH = 4
BLOCKS = 24
"""Of 32 tokens: about two of the answers that may be 256 tokens long, where 32 are asked for."""
MODEL_LENGTH = 384


@pytest.fixture(scope='module')
def client(serve_briefly, tmp_path_factory) -> Iterator[VLLMInferClient]:
    """Of a server whose KV cache is far too small."""
    folder = tmp_path_factory.mktemp('small')
    script = quickstart_script(folder, engine={'num_gpu_blocks_override': BLOCKS, 'disable_log_stats': False})
    port = serve_briefly(script=script)
    yield VLLMInferClient(base_urls=[f'http://127.0.0.1:{port}'], connection_timeout=60)


def requests(*prompts: str) -> list[RolloutInferRequest]:
    note = rollout_note(CONFIG, width=WIDTH, step=1, max_steps=10, evaluates=False, packed=False).to_dict()
    texts = [prompt for prompt in prompts for _ in range(WIDTH)]
    return [
        RolloutInferRequest(messages=[{'role': 'user', 'content': text}], uuid=f'r{i}', data_dict={'treepo': note})
        for i, text in enumerate(texts)
    ]


def grow(client: VLLMInferClient, *prompts: str, max_tokens: int = 256) -> list[Any]:
    return ask(client, 0, requests(*prompts), RequestConfig(max_tokens=max_tokens, seed=3, temperature=1.0))


def reports(outputs: list[Any]) -> list[TreeReport]:
    return [TreeReport.from_dict(output.rollout_infos['tree']) for output in outputs]


def tokens(outputs: list[Any]) -> list[Any]:
    return [(output.response_token_ids, output.rollout_logprobs) for output in outputs]


@pytest.fixture
def unharmed(client) -> Iterator[None]:
    """The batch after a bad one is what it was before."""
    before = grow(client, 'sum 1 2 3')
    yield
    after = grow(client, 'sum 1 2 3')
    assert [ids for ids, _ in tokens(after)] == [ids for ids, _ in tokens(before)]
    assert probe_servers(client, token_ids=[1, 2])[0]['logprobs']


def test_a_prompt_longer_than_the_context_fails_its_own_tree_only(client, unharmed):
    outputs = grow(client, 'sum 1 2 3', 'sum ' + '1 2 3 ' * MODEL_LENGTH, 'sum 4 5')
    good, bad = reports(outputs[:WIDTH] + outputs[2 * WIDTH :]), reports(outputs[WIDTH : 2 * WIDTH])
    assert not any(report.is_placeholder for report in good)
    assert all(report.is_placeholder and 'prompt' in report.error for report in bad), bad[0].error
    assert all(sum(map(sum, output.response_loss_mask)) == 0 for output in outputs[WIDTH : 2 * WIDTH])


def test_a_batch_of_nothing_but_such_prompts_is_one_clear_error(client, unharmed):
    with pytest.raises(ServerError, match=r'(?s)failed \(500\): RolloutError: 4 of 4 trajectories failed.*prompt'):
        grow(client, 'sum ' + '1 2 3 ' * MODEL_LENGTH)


def test_a_context_that_fills_in_mid_path_ends_the_path_there(client, model, unharmed):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = 1
    while len(tokenizer.encode('sum ' + '1 ' * words)) < MODEL_LENGTH - 60:
        words += 1
    outputs = grow(client, 'sum ' + '1 ' * words, max_tokens=MODEL_LENGTH)
    stops = [report.stop.value for report in reports(outputs)]
    assert 'context_limit' in stops and 'failed' not in stops
    for output, stop in zip(outputs, stops, strict=True):
        (ids,) = output.response_token_ids
        assert 0 < len(ids) <= 60
        assert stop != 'context_limit' or output.response.choices[0].finish_reason == 'length'


def test_a_kv_cache_that_is_far_too_small_costs_time_and_no_answers(client, unharmed):
    outputs = grow(client, *[f'sum {i} {i + 1} {i + 2}' for i in range(8)])
    assert len(outputs) == 8 * WIDTH and not any(report.is_placeholder for report in reports(outputs))
    batch = reports(outputs)[0].batch
    assert batch is not None and batch.engine is not None
    print(f'preemptions: {batch.engine.preemptions}')
    assert batch.engine.preemptions > 0


def test_a_client_that_goes_away_in_mid_batch_leaves_nothing_behind(client, unharmed):
    url = client.base_urls[0].removeprefix('http://')
    host, port = url.split(':')
    batch = [asdict(request) for request in requests('sum 9 8 7', 'sum 6 5 4')]
    body = json.dumps({'infer_requests': batch, 'request_config': {'max_tokens': 256, 'seed': 3}}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = [
            'POST /infer/ HTTP/1.1',
            f'Host: {url}',
            'Content-Type: application/json',
            f'Content-Length: {len(body)}',
        ]
        connection.sendall('\r\n'.join([*head, '', '']).encode() + body)
        time.sleep(0.3)
    # The server finishes that batch and throws it away; the next one gets its own answers.
    outputs = grow(client, 'sum 1 1')
    assert [output.messages[0]['content'] for output in outputs] == ['sum 1 1'] * WIDTH
