"""Rollout outputs on the wire: what trajectories share goes once, tokens and log-probs as bytes.

swift sends every token id, mask value and log-prob of every trajectory as a JSON number, and its server walks over each
of them in Python while the engine waits. Where both sides have this package, the server sends a string per batch
instead (`PackedOutputs`) and the trainer's HTTP session turns it back into what swift expects (`accept_packed`).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from treepo_swift import __version__
from treepo_swift.core.inert import one_line

from .report import REPORT_KEY, BatchReport

if TYPE_CHECKING:
    from requests import Response, Session
    from swift.infer_engine.protocol import RolloutOutput

IDS, MASK, LOGPROBS = 'response_token_ids', 'response_loss_mask', 'rollout_logprobs'
TYPES = {IDS: np.int32, MASK: np.int8, LOGPROBS: np.float32}
"""vLLM computes log-probs in float32, so nothing is lost."""
MAX_TOKENS = 1 << 28
"""Most response tokens of one answer: 8,192 trajectories of 32k. What an answer says of its sizes is held against this,
and what it unpacks to against what it says, before memory is taken for it."""


class WireError(ValueError):
    """An answer that can not be read: cut short, changed on the way, hostile, or of another version."""


class PackedOutputs:
    """What `async_infer` returns instead of outputs to a trainer that unpacks them.

    swift's server iterates over it and answers with what comes: one string that FastAPI has nothing to do with.
    """

    def __init__(self) -> None:
        self._trees: list[dict[str, Any]] = []
        self.batch: BatchReport | None = None
        """Goes into the report of the batch's first output."""

    def add(self, positions: Sequence[int], outputs: Sequence[RolloutOutput]) -> None:
        """Take the outputs of one tree, which stand at `positions` of the batch."""
        self._trees.append({'positions': list(positions), **_pack(outputs)})

    def __iter__(self) -> Iterator[str]:
        batch = None if self.batch is None else self.batch.to_dict()
        content = {'version': __version__, 'batch': batch, 'trees': self._trees}
        yield json.dumps(content, separators=(',', ':'), ensure_ascii=False)


def unpack(text: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A batch's outputs, as the JSON objects that swift's client expects, and what was said about the batch.

    Raises `WireError`, and nothing else, for whatever `text` is.
    """
    content: Any = None
    try:
        content = json.loads(text)
        return _unpack_batch(content)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, zlib.error) as e:
        writer = content.get('version') if isinstance(content, dict) else None
        versions = f'was written by treepo_swift {one_line(str(writer), 40)}, and this is {__version__}'
        what = versions if writer not in (None, __version__) else f'has {len(text):,} characters'
        problem = one_line(f'{type(e).__name__}: {e}', 200)
        raise WireError(
            f"A rollout server's packed answer can not be read ({problem}). It {what}. Install the same treepo_swift "
            'on both sides, and see whether a proxy between them cuts or changes answers.'
        ) from e


def _unpack_batch(content: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    columns = [tree['columns'][name] for tree in content['trees'] for name in TYPES]
    sizes = [size for column in columns for turns in column['turns'] for size in turns]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError('a turn has no size')
    if sum(sizes) > len(TYPES) * MAX_TOKENS:
        raise ValueError(f'it says that it holds {sum(sizes):,} values, over {MAX_TOKENS:,} tokens')
    outputs: dict[int, dict[str, Any]] = {}
    for tree in content['trees']:
        outputs.update(zip(tree['positions'], _unpack(tree), strict=True))
    if set(outputs) != set(range(sum(len(tree['positions']) for tree in content['trees']))):
        raise ValueError('its outputs are not numbered one by one')
    batch = content['batch']
    if batch is not None:
        BatchReport.from_dict(batch)
        outputs[0]['rollout_infos'][REPORT_KEY]  # where it goes
    return [outputs[position] for position in range(len(outputs))], batch


def accept_packed(sessions: Iterable[Session]) -> None:
    """Let these HTTP sessions unpack answers; what was said about a batch goes into its first output's report."""

    def unpack_response(response: Response, *args: Any, **kwargs: Any) -> None:
        read = response.json

        def read_unpacked(**options: Any) -> Any:
            try:
                answer = read(**options)
            except ValueError as e:
                if response.status_code != 200:
                    raise  # swift looks at those
                raise WireError(
                    f"A rollout server's answer is no whole JSON ({one_line(str(e), 200)}): it was cut short after "
                    f'{len(response.content):,} bytes. Look at the log of `swift rollout` at {response.url}.'
                ) from e
            if not (isinstance(answer, list) and answer and all(isinstance(part, str) for part in answer)):
                return answer
            outputs = []
            for part in answer:
                unpacked, batch = unpack(part)
                if batch:
                    unpacked[0]['rollout_infos'][REPORT_KEY]['batch'] = batch
                outputs += unpacked
            return outputs

        response.json = read_unpacked

    for session in sessions:
        session.hooks['response'].append(unpack_response)


def _pack(outputs: Sequence[RolloutOutput]) -> dict[str, Any]:
    """The outputs of one tree without what they share.

    Each column has the lengths of an output's `turns`, what it has in common with an earlier output (`shared`: its
    index, and how many values), and in `values` what is its own, one output after the other. `messages` begin all
    histories; where an output has none of its own, they go on with its answer.
    """
    rest = [output.model_dump(mode='json', exclude={*TYPES}, exclude_none=True) for output in outputs]
    histories = [output.pop('messages') for output in rest]
    common = _common_prefix(histories)
    for output, messages in zip(rest, histories):
        if messages[len(common) :] != [_answer(output)]:
            output['messages'] = messages[len(common) :]
    columns: dict[str, Any] = {}
    paths = [_nodes(output) for output in outputs]
    nearest = [_nearest(paths, index) for index in range(len(paths))]
    for name, dtype in TYPES.items():
        turns = [[len(turn) for turn in getattr(output, name)] for output in outputs]
        rows = [np.array(list(chain.from_iterable(getattr(output, name))), dtype) for output in outputs]
        shared = [
            (other, _shared(rows[other], row) if other < index else 0)
            for index, (other, row) in enumerate(zip(nearest, rows, strict=True))
        ]
        own = np.concatenate([row[count:] for row, (_, count) in zip(rows, shared)])
        columns[name] = {'turns': turns, 'shared': shared, 'values': _to_text(own)}
    return {'messages': common, 'outputs': rest, 'columns': columns}


def _to_text(values: np.ndarray) -> str:
    # Nothing is to be gained from the mantissas of floats.
    data = values.tobytes() if values.dtype == np.float32 else zlib.compress(values.tobytes(), 1)
    return base64.b64encode(data).decode()


def _from_text(text: str, dtype: type, count: int) -> np.ndarray:
    """`count` values, no more of which are unpacked than were announced."""
    data, size = base64.b64decode(text), count * np.dtype(dtype).itemsize
    if dtype is not np.float32:
        inflate = zlib.decompressobj()
        data = inflate.decompress(data, size + 1)
        if not inflate.eof and len(data) <= size:
            raise ValueError('a column is cut short')
    if len(data) != size:
        raise ValueError(f'a column does not hold the {count} values that it announces')
    return np.frombuffer(data, dtype)


def _common_prefix(histories: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    same = takewhile(lambda messages: all(m == messages[0] for m in messages), zip(*histories))
    return [messages[0] for messages in same]


def _answer(output: dict[str, Any]) -> dict[str, Any]:
    return {'role': 'assistant', 'content': output['response']['choices'][0]['message']['content']}


def _nodes(output: RolloutOutput) -> list[int]:
    """Ids of the segments of a trajectory, none where it is not from a tree."""
    return list(output.rollout_infos.get(REPORT_KEY, {}).get('nodes', []))


def _nearest(paths: Sequence[Sequence[int]], index: int) -> int:
    """Which earlier path has the most nodes in common with path `index`; `index` itself where none has any."""

    def common(other: int) -> int:
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(paths[other], paths[index])))

    best = max(range(index), key=common, default=index)
    return best if best < index and common(best) else index


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many values the two have in common at their beginning."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def _unpack(tree: dict[str, Any]) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = tree['outputs']
    for output in outputs:
        output['messages'] = tree['messages'] + output.get('messages', [_answer(output)])
    for name, dtype in TYPES.items():
        column = tree['columns'][name]
        lengths = [sum(turns) for turns in column['turns']]
        known = [count for _, count in column['shared']]
        for index, ((other, count), length) in enumerate(zip(column['shared'], lengths, strict=True)):
            if not 0 <= other <= index or not 0 <= count <= min(length, lengths[other] if other < index else 0):
                raise ValueError('an output shares what no earlier one has')
        values = _from_text(column['values'], dtype, sum(lengths) - sum(known))
        if dtype is np.float32 and not np.isfinite(values).all():
            raise ValueError('a log-prob is not finite')
        rows: list[np.ndarray] = []
        begin = 0
        for output, turns, (other, count) in zip(outputs, column['turns'], column['shared'], strict=True):
            end = begin + sum(turns) - count
            rows.append(np.concatenate([rows[other][:count], values[begin:end]]) if count else values[begin:end])
            begin = end
            output[name] = [part.tolist() for part in np.split(rows[-1], np.cumsum(turns[:-1]))] if turns else []
    return outputs
