"""Tokens in, tokens out: what a tree needs of an inference engine. `vllm_engine.py` is vLLM's way of giving it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.messages import Segment
from treepo_swift.wire.note import RefusedRequest
from treepo_swift.wire.report import EngineCounters

if TYPE_CHECKING:
    from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest


class EngineError(NodeFailure):
    """The engine gave no usable answer to one request."""

    def __init__(
        self,
        message: str,
        *,
        kind: str = 'the engine gave no usable answer',
        remedy: str = "Look for the first error in the engine's log, above; restart it where it does not recover.",
    ) -> None:
        super().__init__(message, kind=kind, remedy=remedy)


class EngineGone(RuntimeError):
    """The engine can not be asked for anything any more. This ends the batch: nothing is retried."""


ENCODE_SECONDS = 60.0
"""That a prompt may take to encode, unless a batch says otherwise."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt: its token ids and whatever else (images, template inputs) swift's template made of it."""

    token_ids: list[int]
    inputs: dict[str, Any]
    """What the template made of it; `completion` reads it."""
    engine_inputs: dict[str, Any] = field(default_factory=dict)
    """What the engine takes beside token ids (images, ...)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how urgently a tree's requests run."""

    rank: int = 0
    """Data-parallel rank: one for the whole tree, whose prefixes are in that rank's KV cache."""
    priority: int = 0
    """Lower goes first, where the engine schedules by priority."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the trainer and the config checks want to know of a running engine."""

    model: str
    max_model_len: int
    block_size: int
    """Tokens of a KV block: prefixes are reused in whole blocks."""
    max_logprobs: int = 0
    """Most log-probs per token that can be asked for; 0 where the engine returns only the sampled token's."""
    ranks: int = 1
    """Data-parallel ranks."""
    kv_tokens: int = 0
    """Tokens that the KV cache of one rank holds; 0 where that is not known."""
    dtype: str = ''
    """In which it computes, 'float32' for instance; empty where that is not known."""


class SegmentEngine(Protocol):
    """What `TreeRolloutScheduler` asks of an engine."""

    info: EngineInfo
    stop_strings: list[str]
    """The batch's stop strings, those that the user asked for."""
    answers: int
    """Grows with whatever comes of requests, if only a part of a segment."""

    async def encode(self, request: RolloutInferRequest) -> Prompt:
        """Turn messages (and images, tools) into token ids. Raises whatever the template raises, `NodeFailure` late."""

    async def begin_batch(
        self, request_config: RequestConfig, *, top_logprobs: int = 0, encode_timeout: float = ENCODE_SECONDS
    ) -> None:
        """Fix the sampling parameters of the segments to come; with `top_logprobs` they come with entropies.

        A prompt that takes more than `encode_timeout` seconds to encode fails.
        """

    def generate(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        *,
        max_tokens: int,
        segment_tokens: int,
        seed: int | None,
        placement: Placement,
    ) -> AsyncGenerator[Segment, None]:
        """Sample up to `max_tokens` after ``prompt.token_ids + response_ids``, as segments of `segment_tokens`.

        Only the last segment may be shorter or have a `stop`. Closing the generator ends the sampling. Raises
        `EngineError`, or `EngineGone`.
        """

    def counters(self) -> EngineCounters | None:
        """None where the engine keeps no statistics."""

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probs of ``token_ids[1:]``, each given all ids before it, at temperature 1."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens included."""

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        """The assistant message that reward functions see, as swift's template writes it.

        Where it is not `first`, the tokens go on with a message that another turn began.
        """


def check_request_config(request_config: RequestConfig) -> None:
    """Refuse sampling options that can not hold when a response is sampled in pieces."""
    if request_config.n != 1:
        raise RefusedRequest(f'request_config.n={request_config.n}: a tree answers every request once, n must be 1.')
    if request_config.structured_outputs_regex:
        raise RefusedRequest(
            'structured_outputs_regex (--structured_outputs_regex) can not be used with trees: its '
            'automaton would start anew at every fork.'
        )
    for name in ('presence_penalty', 'frequency_penalty'):
        if getattr(request_config, name):
            raise RefusedRequest(
                f'{name}={getattr(request_config, name)} can not be used with trees: vLLM counts it over '
                'the tokens of one request, which is only a part of a path. Set it to 0.'
            )
