"""Tiny builders that tests share: a deterministic byte-level language and a synchronous driver for the search."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from treepo_swift.config import TreeConfig
from treepo_swift.core.policies.stopping import TextChecker, text_verdict
from treepo_swift.core.search import Limits, NextTurn, Segment, SegmentRequest, TreeSearch
from treepo_swift.core.tree import Path, StopReason, response_ids
from treepo_swift.server.text import PathReader

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
            ids += list(b'\\boxed{7}')[: max_tokens - len(ids)]
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


def make_search(
    config: TreeConfig,
    width: int,
    *,
    prompt_ids: list[int] | None = None,
    max_response: int = 10**6,
    max_context: int = 10**6,
    max_turns: int | None = None,
    seed: int = 0,
    by_segment: bool = False,
) -> TreeSearch:
    return TreeSearch(
        config,
        tree_id='t',
        prompt_ids=[65, 66] if prompt_ids is None else prompt_ids,
        width=width,
        limits=Limits(max_response, max_context, max_turns),
        rng=random.Random(seed),
        by_segment=by_segment,
    )


def grow(
    search: TreeSearch,
    *,
    answer: Callable[[SegmentRequest], Segment | str] | None = None,
    order: random.Random | None = None,
    watch: Callable[[SegmentRequest, Segment], None] | None = None,
    environment: Callable[[Path], tuple[list[int], int] | None] = lambda path: None,
) -> TreeSearch:
    """Drive a search to its end, in a random `order` of answers where one is given.

    `answer` returns a segment, or a string to fail the path with. It and `watch` see each segment as a request of its
    own, from the path's last node. The default's tokens depend only on the prefix and the path's id. `environment` is
    asked when a turn has ended; what it says, and how many tokens of the path are kept before, begins another.
    """

    def default(request: SegmentRequest) -> Segment:
        return sample(search.tree.prompt_ids + response_ids(request.prefix), request.max_tokens, request.path_id)

    reader = PathReader(decode, TextChecker(search.config), [])
    allowance = getattr(search.config.budget, 'tokens', None)
    running = search.start(allowance)
    steps = 0
    while running or search.waiting:
        if search.waiting and (not running or (order and order.random() < 0.5)):
            running += search.resume(allowance)
            continue
        steps += 1
        assert steps < 100_000, 'the search does not end'
        request = running.pop(order.randrange(len(running)) if order else 0)
        ask = replace(request, max_tokens=min(request.max_tokens, request.segment_tokens))
        segment = (answer or default)(ask)
        if isinstance(segment, str):
            running += search.fail(request.path_id, segment)
            continue
        if watch:
            watch(ask, segment)
        path = search.extend(request.path_id, segment)
        verdict = text_verdict(reader.state(path.leaf), path, search.config)
        said = None if search.stop_of(request.path_id, verdict) is None else environment(path)
        if said is not None and search.has_room(said[1] + len(said[0])):
            running += search.begin_turn(request.path_id, NextTurn(said[1], said[0], said))
            continue
        running += search.settle(request.path_id, verdict)
        left = request.max_tokens - len(segment.token_ids)
        if search.done:
            break
        if path.stop is None and left:
            running.append(replace(request, prefix=path.leaf, max_tokens=left))
    return search
