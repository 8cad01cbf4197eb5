"""Reads the requests of a batch: what the trainer said with them, and which of them grow in one tree."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.infer_engine.protocol import RolloutInferRequest

from treepo_swift.wire.note import REQUEST_KEY, RefusedRequest, RequestNote

from .failures import RolloutError

SWIFT_PLACEHOLDER = [{'role': 'user', 'content': '<placeholder>'}]
"""What swift sends to a server that has no requests this time, to ignore the answer."""


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that share a tree: positions in the batch, and which of its prompt's trees it is."""

    members: tuple[int, ...]
    key: str
    copy: int
    """0 for the first tree of this prompt in the batch, 1 for the second, ..."""


def read_requests(
    infer_requests: Sequence[RolloutInferRequest | dict[str, Any]], *, require_trainer: bool
) -> tuple[list[RolloutInferRequest], list[RequestNote]]:
    """Copies of the requests without the trainer's notes, and the notes. Raises `RolloutError` for a missing one."""
    requests = [RolloutInferRequest(**r) if isinstance(r, dict) else copy.copy(r) for r in infer_requests]
    return requests, [_take_note(request, require_trainer) for request in requests]


def _take_note(request: RolloutInferRequest, require_trainer: bool) -> RequestNote:
    """Remove the trainer's note from the request; what is left of `data_dict` is the dataset's."""
    request.data_dict = dict(request.data_dict or {})
    values = request.data_dict.pop(REQUEST_KEY, None)
    if values is not None:
        if not isinstance(values, dict):
            raise RefusedRequest(
                f'data_dict[{REQUEST_KEY!r}] of a request is a {type(values).__name__}, not a note of ours.'
            )
        return RequestNote.from_dict(values)
    if request.messages == SWIFT_PLACEHOLDER:
        return RequestNote(mode='independent')
    if require_trainer:
        raise RolloutError(
            'This rollout server grows trees, but the request was not sent by TreeGRPOTrainer: the trainer runs '
            'without the plugin and would train on trees with flat advantages. Add the same --external_plugins '
            'file to `swift rlhf` (`treepo-swift plugin` prints its path), or set '
            'TREEPO_CHECKS__REQUIRE_TRAINER=false on the server if that is what you want.'
        )
    return RequestNote()


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

    A prompt that occurs twice in a batch makes two trees, not one of double width. A group may be smaller than
    asked for, where the batch was split between servers.
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
