"""A `SegmentEngine` without a model: bytes are tokens, a hash speaks, faults come when asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from swift.template.utils import get_token_backed_response_ids

from tests.builders import EOS, decode, sample
from treepo_swift.core.search import Segment
from treepo_swift.server.engine import EngineInfo, Placement, Prompt

SEPARATOR = ord('|')


class FakeTokenizer:
    """What swift's scheduler base class asks of a tokenizer."""

    eos_token_id = EOS

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return decode(ids)


class FakeEngine:
    """Deterministic in the context (and the request's seed, where one is given)."""

    def __init__(
        self,
        *,
        max_model_len: int = 4096,
        block_size: int = 16,
        speak: Callable[[list[int], int, int], Segment] | None = None,
        fails: Callable[[int], bool] = lambda call: False,
    ) -> None:
        self.info = EngineInfo('fake', max_model_len, block_size, max_logprobs=20)
        self.stop_strings: list[str] = []
        self.answers = 0
        self.speak = speak or sample
        self.fails = fails
        self.inputs: list[list[int]] = []
        self.places: list[Placement] = []
        self.prompts: list[Prompt] = []
        self.requests = 0
        self.running = 0
        self.peak = 0
        self.calls = 0

    async def encode(self, request: Any) -> Prompt:
        # The bytes of all messages; replies come as token ids, and what follows them begins with a separator.
        ids: list[int] = []
        for before, message in zip([None, *request.messages], request.messages):
            content = message['content']
            if 'unencodable' in content:
                raise ValueError('no such image')
            reply = get_token_backed_response_ids(content)
            ids += [SEPARATOR] if before and before['role'] == 'assistant' else []
            ids += list(content.encode()) if reply is None else reply
        return Prompt(ids, {}, {'images': list(request.images)} if request.images else {})

    async def begin_batch(self, request_config: Any, *, top_logprobs: int = 0, encode_timeout: float = 60.0) -> None:
        self.stop_strings = list(request_config.stop or [])

    async def generate(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        *,
        max_tokens: int,
        segment_tokens: int,
        seed: int | None,
        placement: Placement,
    ) -> AsyncGenerator[Segment, None]:
        self.places.append(placement)
        self.prompts.append(prompt)
        self.requests += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        context = prompt.token_ids + list(response_ids)
        try:
            while max_tokens:
                self.calls += 1
                call = self.calls
                self.inputs.append(context)
                await asyncio.sleep(0.001 * (call % 3))
                if self.fails(call):
                    raise RuntimeError('CUDA error')
                segment = self.speak(context, min(segment_tokens, max_tokens), call if seed is None else seed)
                max_tokens -= len(segment.token_ids)
                context = context + segment.token_ids
                yield segment
                if segment.stop is not None:
                    return
        finally:
            self.running -= 1

    def counters(self) -> None:
        return None

    async def score(self, token_ids: list[int]) -> list[float]:
        return [-float(token) for token in token_ids[1:]]

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(token_ids)

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        return decode(response_ids)
