"""Whatever comes over the wire: it is read, or refused with a sentence, and takes no more memory than it announces."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import examples
from treepo_swift.wire import packing
from treepo_swift.wire.note import PROTOCOL, RequestNote
from treepo_swift.wire.packing import IDS, LOGPROBS, MASK, WireError, unpack
from treepo_swift.wire.report import TreeReport

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=10,
)


def column(values: list[Any], dtype: Any, turns: list[list[int]], shared: list[list[int]]) -> dict[str, Any]:
    data = np.array(values, dtype).tobytes()
    data = data if dtype is np.float32 else zlib.compress(data)
    return {'turns': turns, 'shared': shared, 'values': base64.b64encode(data).decode()}


def batch() -> dict[str, Any]:
    """One tree of two trajectories, which share two of three tokens."""
    turns, shared = [[3], [3]], [[0, 0], [0, 2]]
    output = {'response': {'choices': [{'message': {'content': 'x'}}]}, 'rollout_infos': {'tree': {}}}
    return {
        'version': packing.__version__,
        'batch': None,
        'trees': [
            {
                'positions': [0, 1],
                'messages': [{'role': 'user', 'content': 'q'}],
                'outputs': [output, output],
                'columns': {
                    IDS: column([1, 2, 3, 4], np.int32, turns, shared),
                    MASK: column([1, 1, 1, 1], np.int8, turns, shared),
                    LOGPROBS: column([-1, -2, -3, -4], np.float32, turns, shared),
                },
            }
        ],
    }


def test_what_is_whole_is_read():
    outputs, about = unpack(json.dumps(batch()))
    assert [output[IDS] for output in outputs] == [[[1, 2, 3]], [[1, 2, 4]]] and about is None


def read_or_refused(text: str) -> None:
    try:
        unpack(text)
    except WireError as e:
        assert 'can not be read' in str(e) and 'Install the same treepo_swift on both sides' in str(e)


@given(st.integers(0, 2000), st.integers(0, 2000), st.text(max_size=3))
@examples(300)
@example(0, 0, '')
@example(0, 2000, '[' * 100_000)
def test_an_answer_that_was_cut_or_changed_is_refused(begin, end, instead):
    text = json.dumps(batch())
    read_or_refused(text[:begin] + instead + text[end:])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


PLACES = places(batch())[1:]
SHARED = ('trees', 0, 'columns', IDS, 'shared', 1)


@given(st.sampled_from(PLACES), st.one_of(JSON, st.sampled_from([-1, 2**40, [[2**40]], 'AAAA', [[1, 2]] * 2])))
@examples(600)
@example(SHARED, [1, 3])
@example(SHARED, [-1, 2])
@example(SHARED, [0, -1])
@example(SHARED, [0, 2**40])
@example(('trees', 0, 'positions'), [0, 0])
@example(('trees', 0, 'positions'), [0, 2**40])
@example(('batch',), {'seconds': 1})
@example(('batch',), {'seconds': 1.0, 'scheduler_cpu_seconds': 1.0, 'engine': {'x': 1}})
@example(('trees', 0, 'columns', LOGPROBS, 'values'), base64.b64encode(np.full(4, np.nan, 'f').tobytes()).decode())
def test_an_answer_with_a_wrong_value_is_read_or_refused(place, value):
    content: Any = batch()
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    read_or_refused(json.dumps(content))


@pytest.mark.parametrize('name, dtype', [(IDS, np.int32), (MASK, np.int8)])
def test_a_zlib_bomb_is_not_unpacked(name, dtype):
    """A hundred megabytes in a hundred kilobytes of text."""
    content = batch()
    content['trees'][0]['columns'][name]['values'] = base64.b64encode(zlib.compress(bytes(10**8))).decode()
    text = json.dumps(content)
    tracemalloc.start()
    with pytest.raises(WireError, match='does not hold the 4 values'):
        unpack(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text)


def test_sizes_that_would_exhaust_memory_are_refused_before_anything_is_unpacked(monkeypatch):
    monkeypatch.setattr(packing, '_from_text', lambda *args: pytest.fail('something was unpacked'))
    content = batch()
    for part in content['trees'][0]['columns'].values():
        part['turns'] = [[packing.MAX_TOKENS], [3]]
    with pytest.raises(WireError, match='over 268,435,456 tokens'):
        unpack(json.dumps(content))


def test_an_answer_of_another_version_is_named():
    content = batch() | {'version': '9.9\x1b[2J', 'trees': [{'tree': 1}]}
    with pytest.raises(WireError) as caught:
        unpack(json.dumps(content))
    assert 'was written by treepo_swift 9.9\\x1b[2J, and this is ' in str(caught.value)


def test_an_answer_that_was_cut_short_says_where_it_came_from():
    session = SimpleNamespace(hooks={'response': []})
    packing.accept_packed([session])

    def broken(**options: Any) -> Any:
        return json.loads('["{')

    response = SimpleNamespace(json=broken, status_code=200, content=b'["{', url='http://127.0.0.1:8000/infer/')
    session.hooks['response'][0](response)
    with pytest.raises(WireError, match=r'cut short after 3 bytes. Look at the log of .* http://127.0.0.1:8000/infer/'):
        response.json()
    response.status_code, response.json = 500, broken
    session.hooks['response'][0](response)
    with pytest.raises(json.JSONDecodeError):
        response.json()


NOTES = st.dictionaries(st.sampled_from([*RequestNote.__dataclass_fields__, 'x']), JSON, max_size=4)


@given(NOTES)
@examples(200)
@example({'step': 'one'})
@example({'num_generations': 0})
@example({'num_generations': True})
@example({'token_ids': ['a']})
@example({'token_ids': [-1]})
@example({'mode': []})
def test_a_note_is_read_or_refused(values):
    try:
        note = RequestNote.from_dict({'protocol': PROTOCOL, **values})
    except ValueError as e:
        assert 'treepo' in str(e) and len(str(e).split()) > 5
    else:
        assert RequestNote.from_dict(note.to_dict()) == note


REPORT = {'id': 't', 'nodes': [1], 'tokens': [2], 'stop': 'eos', 'depth': 1}


@given(st.dictionaries(st.sampled_from([*TreeReport.__dataclass_fields__, 'x']), JSON, max_size=3))
@examples(200)
@example({'stats': {'x': 1}})
@example({'stats': [1]})
@example({'batch': 'x'})
@example({'stop': []})
def test_a_report_is_read_or_refused(values):
    try:
        TreeReport.from_dict({**REPORT, **values})
    except ValueError as e:
        assert 'can not be read' in str(e)
