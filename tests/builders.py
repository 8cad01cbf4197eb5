"""Tiny builders that tests share: a deterministic byte-level language and a synchronous driver for the search."""
from __future__ import annotations

import hashlib
import random
from typing import Callable, Sequence

from treepo_swift.config import TreeConfig
from treepo_swift.policies.stopping import TextChecker
from treepo_swift.search import Limits, Segment, SegmentRequest, TreeSearch, text_verdict
from treepo_swift.text import PathReader
from treepo_swift.tree import StopReason, response_ids

EOS = 0
"""Every other id is the byte of one character."""


def sample(context: Sequence[int], max_tokens: int, seed: int, *, eos_every: int = 40) -> Segment:
    """A hash of context and seed speaks: letters, sometimes EOS, sometimes the whole of an answer."""
    ids: list[int] = []
    while len(ids) < max_tokens:
        digest = hashlib.blake2b(bytes(f'{list(context)}{ids}{seed}', 'ascii'), digest_size=4).digest()
        number = int.from_bytes(digest, 'big')
        if number % eos_every == 0:
            ids.append(EOS)
            return segment_of(ids, StopReason.EOS)
        if number % (2 * eos_every) == 1:
            ids += list(b'\\boxed{7}')[:max_tokens - len(ids)]
        else:
            ids.append(97 + number % 26)
    return segment_of(ids)


def segment_of(ids: list[int], stop: StopReason | None = None) -> Segment:
    return Segment(ids, logprobs(ids), stop, entropies(ids))


def logprobs(ids: Sequence[int]) -> list[float]:
    return [-(token % 7) / 4 for token in ids]


def entropies(ids: Sequence[int]) -> list[float]:
    return [token % 5 / 3 for token in ids]


def decode(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i != EOS).decode('utf-8', errors='replace')


def make_search(config: TreeConfig,
                width: int,
                *,
                prompt_ids: list[int] | None = None,
                max_response: int = 10**6,
                max_context: int = 10**6,
                seed: int = 0) -> TreeSearch:
    return TreeSearch(
        config,
        tree_id='t',
        prompt_ids=[65, 66] if prompt_ids is None else prompt_ids,
        width=width,
        limits=Limits(max_response, max_context),
        rng=random.Random(seed))


def grow(search: TreeSearch,
         *,
         answer: Callable[[SegmentRequest], Segment | str] | None = None,
         order: random.Random | None = None,
         watch: Callable[[SegmentRequest, Segment], None] | None = None) -> TreeSearch:
    """Drive a search to its end; `answer` returns a segment, or a string to fail the request with."""
    def default(request: SegmentRequest) -> Segment:
        return sample(search.tree.prompt_ids + response_ids(request.prefix), request.max_tokens, request.seed)

    reader = PathReader(decode, TextChecker(search.config), [])
    share = search.config.budget_tokens
    waiting = search.start(share)
    steps = 0
    while waiting or search.waiting:
        if search.waiting and not waiting:
            waiting = search.resume(share)
            continue
        steps += 1
        assert steps < 100_000, 'the search does not end'
        request = waiting.pop(order.randrange(len(waiting)) if order else 0)
        segment = (answer or default)(request)
        if isinstance(segment, str):
            waiting += search.fail(request.id, segment)
            continue
        if watch:
            watch(request, segment)
        path = search.extend(request.id, segment)
        waiting += search.settle(request.id, text_verdict(reader.state(path.leaf), path, search.config))
    return search
