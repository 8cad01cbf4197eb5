"""Packed outputs come out of swift's own server and client code as plain ones do."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('swift')

import requests as http
from fastapi.encoders import jsonable_encoder
from swift.infer_engine import protocol
from swift.infer_engine.protocol import ChatMessage, RequestConfig, RolloutOutput, UsageInfo

from tests.integration.test_scheduler import requests, scheduler
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.packing import PackedOutputs, accept_packed
from treepo_swift.wire.report import BatchReport


def received(packed: PackedOutputs) -> list[dict]:
    """Through the worker's pipe, FastAPI's encoder and an HTTP session, as swift sends it."""
    body = json.dumps(jsonable_encoder(list(pickle.loads(pickle.dumps(packed)))), ensure_ascii=False)
    return answer(body)


def answer(body: str):
    session = http.Session()
    accept_packed([session])
    response = http.Response()
    response.status_code, response._content = 200, body.encode()
    (hook,) = session.hooks['response']
    hook(response)
    return response.json()


numbers = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=3)
logprobs = st.floats(-50, 0, width=32)


@st.composite
def outputs(draw) -> RolloutOutput:
    turns = draw(numbers)
    messages = [{'role': 'user', 'content': draw(st.text(max_size=5))}]
    content = draw(st.text(max_size=5))
    if draw(st.booleans()):
        messages.append({'role': 'assistant', 'content': content})
    reason = draw(st.sampled_from(['stop', 'length']))
    choice = protocol.ChatCompletionResponseChoice(0, ChatMessage('assistant', content), reason)
    return RolloutOutput(
        response=protocol.ChatCompletionResponse('m', [choice], UsageInfo(1, 2, 3), id=draw(st.text(max_size=3))),
        messages=messages,
        response_token_ids=turns,
        response_loss_mask=[[draw(st.integers(0, 1)) for _ in turn] for turn in turns],
        rollout_logprobs=[[draw(logprobs) for _ in turn] for turn in turns],
        rollout_infos={'num_turns': 1, 'tree': {'nodes': [1]}},
    )


@given(st.lists(st.lists(outputs(), min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
@settings(max_examples=80, deadline=None)
def test_nothing_is_lost_on_the_wire(trees, dice):
    positions = list(range(sum(map(len, trees))))
    dice.shuffle(positions)
    packed, sent = PackedOutputs(), {}
    for tree in trees:
        places, positions = positions[: len(tree)], positions[len(tree) :]
        packed.add(places, tree)
        sent.update(zip(places, tree))
    packed.batch = BatchReport(seconds=1.5, scheduler_cpu_seconds=0.5)
    got = [RolloutOutput.model_validate(item) for item in received(packed)]
    assert got[0].rollout_infos['tree'].pop('batch') == packed.batch.to_dict()
    for position, output in enumerate(got):
        # pydantic reads an empty list of turns and a flat one alike.
        assert output.model_dump() == RolloutOutput(**sent[position].model_dump()).model_dump()


def test_a_trainer_that_unpacks_gets_the_same_outputs_in_fewer_bytes():
    def note(packed: bool):
        batch = requests(*'aabbaabb')
        for request in batch:
            request.data_dict['treepo'] = RequestNote(**{**request.data_dict['treepo'], 'packed': packed}).to_dict()
        return batch

    config = RequestConfig(max_tokens=64, seed=1)
    plain = asyncio.run(scheduler().async_infer(note(False), config, use_tqdm=False))
    packed = asyncio.run(scheduler().async_infer(note(True), config, use_tqdm=False))
    got = [RolloutOutput.model_validate(item) for item in received(packed)]
    assert len(got) == len(plain) == 8
    for a, b in zip(plain, got, strict=True):
        a.rollout_infos['tree'].pop('batch', None), b.rollout_infos['tree'].pop('batch', None)
        a.response.created = b.response.created
        assert a.model_dump() == b.model_dump()
    assert len(''.join(packed)) < 0.6 * len(json.dumps(jsonable_encoder(plain)))


def test_other_answers_pass_through():
    assert answer('{"detail": "no"}') == {'detail': 'no'}
    assert answer('[]') == [] and answer('[{"a": 1}]') == [{'a': 1}]


def test_notes_carry_only_what_differs_from_the_defaults():
    config = requests('a')[0].data_dict['treepo']['config']
    note = RequestNote(config={'segment_length': 16}, step=3)
    assert note.to_dict() == {'mode': 'tree', 'protocol': note.protocol, 'config': {'segment_length': 16}, 'step': 3}
    assert RequestNote.from_dict(note.to_dict()) == note and len(config) > 1
    assert dataclasses.asdict(RequestNote.from_dict(RequestNote().to_dict())) == dataclasses.asdict(RequestNote())


def test_log_probs_keep_every_bit_of_the_engines_float32():
    values = np.array([-1e-7, -0.1, -1 / 3, -49.99999], np.float32).tolist()
    output = RolloutOutput(
        response=protocol.ChatCompletionResponse(
            'm', [protocol.ChatCompletionResponseChoice(0, ChatMessage('assistant', ''), 'stop')], UsageInfo(0, 0, 0)
        ),
        messages=[],
        rollout_logprobs=[values],
    )
    packed = PackedOutputs()
    packed.add([0], [output])
    assert received(packed)[0]['rollout_logprobs'] == [values]
