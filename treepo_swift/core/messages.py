"""What the search and its driver tell each other: requests, segments, turns and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tree import Node, StopReason


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """Ask of the engine: continue ``prompt + tokens up to prefix`` by at most `max_tokens`.

    Every `segment_tokens` of them (fewer where the response ends) are a segment to report. A request of one segment
    ends at the boundary; a longer one runs on through it, and is aborted when its path stops.
    """

    path_id: int
    prefix: Node
    max_tokens: int
    segment_tokens: int
    seed: int
    """For engines that are asked to sample reproducibly: no two requests of a tree share it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What the engine sampled of a request."""

    token_ids: list[int]
    logprobs: list[float]
    stop: StopReason | None = None
    """EOS or STOP_STRING where the engine saw the response end, None where the segment is full."""
    entropies: list[float] | None = None
    """Entropy at each token in nats, where it was asked for."""
    cached_tokens: int = 0
    """Tokens of the request's input that the engine found in its prefix cache; with its first segment."""
    ahead: int = 0
    """Tokens that the engine had sampled past this segment when it was handed out: lost where the path stops here."""


@dataclass(frozen=True, slots=True)
class NextTurn:
    """How a path goes on whose turn has ended: from its first `keep` tokens, behind what the environment said."""

    keep: int
    environment_ids: list[int]
    data: Any = None
    """``Node.data`` of the environment's node."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits, in tokens."""

    max_response: int
    """What may be sampled in one turn."""
    max_context: int
    """Prompt and all turns together (the engine's model length)."""
    max_turns: int | None = None
    """None where they have no limit of their own."""
