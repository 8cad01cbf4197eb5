"""Measure how fast an engine is, for `treepo-swift simulate`: least squares over batches of different shapes."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import numpy as np

from treepo_swift.config import TreeConfig
from treepo_swift.lab.progress import progress
from treepo_swift.lab.simulation import EngineModel
from treepo_swift.server.engine import Placement, Prompt
from treepo_swift.server.vllm_engine import VllmSegmentEngine

from . import fake
from .engine import ignore_eos
from .result import hardware

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine

STEPS = 64
"""Tokens that every sequence of a batch decodes."""
REPEATS = 3


def fit(engine: GRPOVllmEngine) -> tuple[EngineModel, float]:
    """The engine's model, and the mean relative error of its step times at the points that it was fitted to."""
    ignore_eos(engine)
    # The scheduler's own part has nothing of the engine in it.
    events = fake.measure(TreeConfig(segment_length=32), prompts=50, width=16)['segments/s']
    return asyncio.run(_Fit(engine).run(event_seconds=1 / events))


class _Fit:
    def __init__(self, engine: GRPOVllmEngine) -> None:
        self._engine = engine
        self._segments = VllmSegmentEngine(engine)
        self._max_sequences = int(engine.engine.vllm_config.scheduler_config.max_num_seqs)
        self._dice = random.Random(0)
        self._vocabulary = range(10, min(len(engine.tokenizer), 300))

    async def run(self, event_seconds: float) -> tuple[EngineModel, float]:
        from swift.infer_engine.protocol import RequestConfig

        await self._segments.begin_batch(RequestConfig(temperature=1.0))
        info = self._segments.info
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= self._max_sequences]
        # Whole KV blocks and a token: a prompt in the cache leaves that one to compute.
        long = (info.max_model_len - STEPS) // 2 // info.block_size * info.block_size + 1
        # What sequences share, a processor's caches may hold: both kinds of batches tell the two costs apart.
        shapes = [
            (n, c, shared)
            for n in sizes
            for c, shared in ((1, False), (long, False), (long, True))
            if not info.kv_tokens or n * (c + STEPS) < info.kv_tokens
        ]
        lengths = [info.max_model_len // 8, info.max_model_len // 2]
        await self._batch(2, long, STEPS)
        with progress(total=REPEATS * (len(shapes) + len(lengths)) + 2, desc='measuring') as bar:
            seconds, prefills = np.full(len(shapes), np.inf), np.full(len(lengths), np.inf)
            # The fastest of several rounds: what slows the machine down for a while seldom lasts for all of them.
            for _ in range(REPEATS):
                for index, (n, c, shared) in enumerate(shapes):
                    seconds[index] = min(seconds[index], await self._batch(n, c, STEPS, shared=shared))
                    bar.update()
                # Prompts that are in no cache, at one token each.
                for index, length in enumerate(lengths):
                    prefills[index] = min(prefills[index], await self._batch(1, length, 1, cached=False))
                    bar.update()
            steps = seconds / STEPS
            rows = np.array(
                [[1, n, n * (c + STEPS / 2), c * (1 if shared else n) + n * STEPS / 2] for n, c, shared in shapes],
                float,
            )
            costs = _least_squares(rows, steps)
            prefill = max((prefills[1] - prefills[0]) / (lengths[1] - lengths[0]), 0.0)
            started = time.process_time()
            await self._batch(self._max_sequences, 32, 1, cached=False)
            request_seconds = (time.process_time() - started) / self._max_sequences
            bar.update()
            tokens = sizes[-1] * STEPS
            started = time.process_time()
            await self._batch(sizes[-1], 32, STEPS, cached=False)
            token_seconds = max((time.process_time() - started - sizes[-1] * request_seconds) / tokens, 0.0)
            bar.update()
        predicted = rows @ costs
        model = EngineModel(
            step_seconds=float(costs[0]),
            step_seconds_per_sequence=float(costs[1]),
            step_seconds_per_context_token=float(costs[2]),
            step_seconds_per_kv_token=float(costs[3]),
            prefill_seconds_per_token=float(prefill),
            max_sequences=self._max_sequences,
            kv_tokens=info.kv_tokens,
            block_size=info.block_size,
            event_seconds=event_seconds,
            request_seconds=request_seconds,
            token_seconds=token_seconds,
            hardware=hardware(),
        )
        return model, float(np.mean(np.abs(predicted / steps - 1)))

    async def _batch(
        self, sequences: int, context: int, steps: int, *, cached: bool = True, shared: bool = False
    ) -> float:
        """Seconds for so many sequences to decode `steps` tokens each, after prompts of `context` tokens.

        `cached`: the prompts are in the KV cache before the clock starts; `shared`: they are one and the same.
        """
        prompts = [Prompt(self._dice.choices(self._vocabulary, k=context), {}) for _ in range(sequences)]
        if shared:
            prompts = prompts[:1] * sequences
        if cached:
            await asyncio.gather(*(self._decode(prompt, 1) for prompt in prompts))
        started = time.perf_counter()
        await asyncio.gather(*(self._decode(prompt, steps) for prompt in prompts))
        return time.perf_counter() - started

    async def _decode(self, prompt: Prompt, steps: int) -> None:
        async for _ in self._segments.generate(
            prompt, [], max_tokens=steps, segment_tokens=steps, seed=None, placement=Placement()
        ):
            pass


def _least_squares(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative costs of the columns that explain `seconds` with the least relative error."""
    used = list(range(rows.shape[1]))
    while True:
        costs = np.zeros(rows.shape[1])
        costs[used] = np.linalg.lstsq(rows[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if (costs >= 0).all():
            return costs
        # A cost below zero is noise around nothing.
        used.remove(int(np.argmin(costs)))
