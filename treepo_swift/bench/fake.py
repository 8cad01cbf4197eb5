"""The scheduler alone: whole rollouts on an engine that costs nothing."""
from __future__ import annotations

import asyncio
import cProfile
import pstats
import time
from collections import Counter
from pathlib import Path
from typing import Any, AsyncGenerator, Sequence

import numpy as np

from ..config import TreeConfig
from ..engine import EngineInfo, Place, Prompt
from ..packing import PackedOutputs
from ..search import Segment
from ..transport import RequestNote

POOL = 1 << 20
"""Random tokens and log-probs that segments are cut from."""


class FreeEngine:
    """A `SegmentEngine` that answers at the next turn of the event loop. Tokens are letters."""

    stop_strings: list[str] = []

    def __init__(self, max_model_len: int) -> None:
        self.info = EngineInfo('none', max_model_len, block_size=16)
        self.segments = 0
        dice = np.random.default_rng(0)
        self._tokens = dice.integers(97, 123, POOL)
        self._logprobs = -dice.random(POOL)
        self._next = 0

    async def encode(self, request: Any) -> Prompt:
        return Prompt(list(request.messages[-1]['content'].encode()), {})

    async def begin_batch(self, request_config: Any, *, top_logprobs: int = 0) -> None:
        pass

    async def generate(self, prompt: Prompt, response_ids: Sequence[int], *, max_tokens: int, segment_tokens: int,
                       seed: int | None, place: Place) -> AsyncGenerator[Segment, None]:
        while max_tokens:
            await asyncio.sleep(0)
            count = min(segment_tokens, max_tokens)
            begin = self._next
            self._next = (begin + count) % (POOL - count)
            self.segments += 1
            max_tokens -= count
            yield Segment(self._tokens[begin:begin + count].tolist(), self._logprobs[begin:begin + count].tolist())

    def counters(self) -> None:
        return None

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()

    def completion(self, prompt: Prompt, response_ids: list[int]) -> str:
        return self.decode(response_ids)


class _Tokenizer:
    """What swift's base class asks of a tokenizer."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())


def measure(config: TreeConfig, *, prompts: int, width: int) -> dict[str, Any]:
    """One rollout of `prompts` x `width`, its outputs included."""
    seconds, engine, peak = _rollout(config, prompts, width)
    return {
        'trajectories': prompts * width,
        'segments': engine.segments,
        'CPU s': round(seconds, 2),
        'segments/s': round(engine.segments / seconds),
        'peak RSS MiB': round(peak),
    }


def profile(config: TreeConfig, *, prompts: int, width: int) -> list[dict[str, Any]]:
    """Where the CPU time of such a rollout goes, by source file. Profiling itself slows small functions down."""
    profiler = cProfile.Profile()
    profiler.enable()
    _rollout(config, prompts, width)
    profiler.disable()
    spent: Counter[str] = Counter()
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():
        spent[_place(file, function)] += own
    total = sum(spent.values())
    return [{'where': name, 'share': f'{own / total:.0%}'} for name, own in spent.most_common() if own >= 0.01 * total]


def _place(file: str, function: str) -> str:
    if file == __file__:
        return 'the free engine'
    path = Path(file)
    for root in ('treepo_swift', 'asyncio', 'swift'):
        if root in path.parts:
            return '/'.join(path.parts[len(path.parts) - path.parts[::-1].index(root) - 1:])
    return 'built-in functions' if file == '~' else path.name


def _rollout(config: TreeConfig, prompts: int, width: int) -> tuple[float, FreeEngine, float]:
    import resource

    from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

    from ..scheduler import TreeRolloutScheduler
    note = RequestNote(config=config.to_note(), packed=True).to_dict()
    requests = [
        RolloutInferRequest(
            messages=[{
                'role': 'user',
                'content': f'prompt {index}'
            }], uuid=f'{index}-{copy}', data_dict={'treepo': note}) for index in range(prompts) for copy in range(width)
    ]
    engine = FreeEngine(config.max_response_tokens + 100)
    scheduler = TreeRolloutScheduler(segment_engine=engine, tokenizer=_Tokenizer())
    started = time.process_time()
    packed = asyncio.run(
        scheduler.async_infer(requests, RequestConfig(max_tokens=config.max_response_tokens), use_tqdm=None))
    seconds = time.process_time() - started
    if not isinstance(packed, PackedOutputs):
        raise RuntimeError(f'the rollout failed: {packed.message}')
    return seconds, engine, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
