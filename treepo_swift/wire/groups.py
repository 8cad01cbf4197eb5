"""Which requests of a batch are the same prompt, and which of them grow in one tree.

The server plants by this rule and the trainer deals out by it, so that what is dealt out is what grows together.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .note import REQUEST_KEY

if TYPE_CHECKING:
    from swift.infer_engine.protocol import RolloutInferRequest


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that share a tree: positions in the batch, and which of its prompt's trees it is."""

    members: tuple[int, ...]
    key: str
    copy: int
    """0 for the first tree of this prompt in the batch, 1 for the second, ..."""


def prompt_text(request: RolloutInferRequest) -> str:
    """All that makes two requests the same prompt (messages, media, tools, data); it seeds the prompt's trees.

    It may be megabytes, where images are sent as text: keep `prompt_key` of it.
    """
    parts = {
        'messages': request.messages,
        'images': request.images,
        'audios': request.audios,
        'videos': request.videos,
        'tools': request.tools,
        'objects': request.objects,
        'template': request.chat_template_kwargs,
        'data': request.data_dict,
    }
    return json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)


def prompt_key(request: RolloutInferRequest) -> str:
    """A digest of `prompt_text`, to keep."""
    return hashlib.blake2b(prompt_text(request).encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


def request_key(request: RolloutInferRequest) -> str:
    """`prompt_key` of a request that still has its note, which is no part of the prompt."""
    bare = copy.copy(request)
    bare.data_dict = {key: value for key, value in (request.data_dict or {}).items() if key != REQUEST_KEY}
    return prompt_key(bare)


def group_requests(keys: Sequence[str], num_generations: Sequence[int | None]) -> list[Group]:
    """Gather equal keys into groups of `num_generations` (None: all of them), in order of first appearance.

    A prompt that occurs twice in a batch makes two trees, not one of double width. The last group of a prompt is
    smaller where its requests are no multiple.
    """
    positions: dict[tuple[str, int | None], list[int]] = {}
    for index, (key, size) in enumerate(zip(keys, num_generations, strict=True)):
        positions.setdefault((key, size), []).append(index)
    groups = []
    for (key, size), members in positions.items():
        step = size or len(members)
        for copy_, begin in enumerate(range(0, len(members), step)):
            groups.append(Group(tuple(members[begin : begin + step]), key, copy_))
    return groups


def with_copy(request: RolloutInferRequest, number: int) -> RolloutInferRequest:
    """A request whose note says which of its prompt's trees in the whole batch it belongs to."""
    request = copy.copy(request)
    request.data_dict = {**request.data_dict, REQUEST_KEY: {**request.data_dict[REQUEST_KEY], 'copy': number}}
    return request
