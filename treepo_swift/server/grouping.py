"""Reads the requests of a batch, and what the trainer said with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from swift.infer_engine.protocol import RolloutInferRequest

from treepo_swift.wire.note import REQUEST_KEY, RefusedRequest, RequestNote

from .failures import RolloutError

SWIFT_PLACEHOLDER = [{'role': 'user', 'content': '<placeholder>'}]
"""What swift sends to a server that has no requests this time, to ignore the answer."""


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
