"""The scheduler alone: whole rollouts on an engine that costs nothing."""

from __future__ import annotations

import asyncio
import cProfile
import json
import string
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Segment
from treepo_swift.server.engine import EngineInfo, Placement, Prompt
from treepo_swift.server.outputs import RolloutFailure
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.packing import unpack

POOL = 1 << 20
"""Random tokens and log-probs that segments are cut from."""
VOCABULARY = 26**3
"""Tokens, each of which is a word of three letters and a blank."""


class FreeEngine:
    """A `SegmentEngine` that answers at the next turn of the event loop, with random words.

    It has the KV cache of eight GPUs, so that not all trees of a large batch grow at once.
    """

    stop_strings: list[str] = []
    answers = 0

    def __init__(self, max_model_len: int) -> None:
        self.info = EngineInfo('none', max_model_len, block_size=16, max_logprobs=20, ranks=8, kv_tokens=1_000_000)
        self.segments = 0
        dice = np.random.default_rng(0)
        self._tokens = dice.integers(0, VOCABULARY, POOL)
        self._logprobs = -dice.random(POOL, np.float32)
        self._words = [''.join(letters) + ' ' for letters in product(string.ascii_lowercase, repeat=3)]
        self._next = 0
        self._with_entropies = False

    async def encode(self, request: Any) -> Prompt:
        return Prompt([0] * len(request.messages[-1]['content'].split()), {})

    async def begin_batch(self, request_config: Any, *, top_logprobs: int = 0, encode_timeout: float = 60.0) -> None:
        self._with_entropies = top_logprobs > 0

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
        while max_tokens:
            await asyncio.sleep(0)
            count = min(segment_tokens, max_tokens)
            begin = self._next
            self._next = (begin + count) % (POOL - count)
            self.segments += 1
            max_tokens -= count
            logprobs = self._logprobs[begin : begin + count].tolist()
            # Any numbers do for entropies too.
            entropies = logprobs if self._with_entropies else None
            yield Segment(self._tokens[begin : begin + count].tolist(), logprobs, entropies=entropies)

    def counters(self) -> None:
        return None

    def decode(self, token_ids: Sequence[int]) -> str:
        return ''.join(map(self._words.__getitem__, token_ids))

    async def score(self, token_ids: list[int]) -> list[float]:
        raise NotImplementedError('The free engine has no model.')

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        return self.decode(response_ids)


class _Tokenizer:
    """What swift's base class asks of a tokenizer."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())


def measure(config: TreeConfig, *, prompts: int, width: int) -> dict[str, Any]:
    """One rollout of `prompts` x `width`, its packed outputs included."""
    import resource

    started = time.process_time()
    engine, _ = rollout(config, prompts, width, packed=True)
    seconds = time.process_time() - started
    return {
        'trajectories': prompts * width,
        'segments': engine.segments,
        'CPU s': round(seconds, 2),
        'segments/s': round(engine.segments / seconds),
        'peak RSS MiB': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def payload(config: TreeConfig, *, width: int, prompt_words: int = 200) -> list[dict[str, Any]]:
    """What a trajectory weighs on its way from the rollout server to the trainer, as swift sends it and packed.

    The CPU time is that of both ends: swift's server walks over the answer and writes it as JSON, the client reads it.
    """
    from fastapi.encoders import jsonable_encoder
    from swift.infer_engine.protocol import RolloutOutput

    rows = []
    for packed in (False, True):
        _, outputs = rollout(config, 1, width, packed=packed, prompt_words=prompt_words)
        started = time.process_time()
        body = json.dumps(jsonable_encoder(list(outputs)), ensure_ascii=False, separators=(',', ':')).encode()
        answer = json.loads(body)
        for item in unpack(answer[0])[0] if packed else answer:
            RolloutOutput.model_validate(item)
        seconds = time.process_time() - started
        rows.append(
            {
                'answer': 'packed' if packed else 'as swift sends it',
                'bytes/trajectory': round(len(body) / width),
                'bytes/token': round(len(body) / width / config.max_response_tokens, 1),
                'CPU ms/trajectory': round(1000 * seconds / width, 2),
            }
        )
    return rows


def profile(config: TreeConfig, *, prompts: int, width: int) -> list[dict[str, Any]]:
    """Where the CPU time of such a rollout goes, by source file. Profiling itself slows small functions down."""
    profiler = cProfile.Profile()
    profiler.enable()
    rollout(config, prompts, width, packed=True)
    profiler.disable()
    spent: Counter[str] = Counter()
    profiler.create_stats()
    for (file, _, _), (_, _, own, _, _) in profiler.stats.items():
        spent[_place(file)] += own
    total = sum(spent.values())
    return [{'where': name, 'share': f'{own / total:.0%}'} for name, own in spent.most_common() if own >= 0.01 * total]


def _place(file: str) -> str:
    if file == __file__:
        return 'the free engine'
    path = Path(file)
    for root in ('treepo_swift', 'asyncio', 'swift'):
        if root in path.parts:
            return '/'.join(path.parts[len(path.parts) - path.parts[::-1].index(root) - 1 :])
    return 'built-in functions' if file == '~' else path.name


def rollout(
    config: TreeConfig, prompts: int, width: int, *, packed: bool, prompt_words: int = 2
) -> tuple[FreeEngine, Any]:
    """A whole rollout, and what `async_infer` returned."""
    from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

    from treepo_swift.server.scheduler import TreeRolloutScheduler

    note = RequestNote(config=config.to_note(), packed=packed).to_dict()
    requests = [
        RolloutInferRequest(
            messages=[{'role': 'user', 'content': ' '.join(['word'] * (prompt_words - 1) + [str(index)])}],
            uuid=f'{index}-{copy}',
            data_dict={'treepo': note},
        )
        for index in range(prompts)
        for copy in range(width)
    ]
    engine = FreeEngine(config.max_response_tokens + prompt_words)
    scheduler = TreeRolloutScheduler(segment_engine=engine, tokenizer=_Tokenizer())
    request_config = RequestConfig(max_tokens=config.max_response_tokens)
    outputs = asyncio.run(scheduler.async_infer(requests, request_config, use_tqdm=prompts > 1000))
    if isinstance(outputs, RolloutFailure):
        raise RuntimeError(f'the rollout failed: {outputs.message}')
    return engine, outputs
