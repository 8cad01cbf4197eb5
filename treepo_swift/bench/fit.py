"""Measure how fast an engine is, for `treepo-swift simulate`: least squares over batches of different shapes."""
from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ..config import TreeConfig
from ..engine import Place, Prompt, VllmSegmentEngine
from ..simulation import EngineModel
from . import fake
from .engine import hardware, ignore_eos

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
        contexts = [32, max(info.max_model_len - STEPS, 64) // 2]
        fits = [(n, c) for n in sizes for c in contexts if not info.kv_tokens or n * (c + STEPS) < info.kv_tokens]
        await self._batch(2, 32, STEPS)
        with tqdm(total=len(fits) + 3, desc='measuring', dynamic_ncols=True) as bar:
            # A step of n sequences whose contexts have c tokens in the mean: base + n * (x + c * y).
            steps = []
            for n, c in fits:
                steps.append(await self._fastest(n, c, STEPS) / STEPS)
                bar.update()
            rows = np.array([[1, n, n * (c + STEPS / 2)] for n, c in fits], float)
            costs = _least_squares(rows, np.array(steps))
            # Prompts that are in no cache, at one token each.
            lengths = [info.max_model_len // 8, info.max_model_len // 2]
            seconds = [await self._fastest(1, length, 1, cached=False) for length in lengths]
            bar.update()
            prefill = max((seconds[1] - seconds[0]) / (lengths[1] - lengths[0]), 0.0)
            started = time.process_time()
            await self._batch(self._max_sequences, 32, 1)
            request_seconds = (time.process_time() - started) / self._max_sequences
            tokens = sizes[-1] * STEPS
            started = time.process_time()
            await self._batch(sizes[-1], 32, STEPS)
            token_seconds = max((time.process_time() - started - sizes[-1] * request_seconds) / tokens, 0.0)
            bar.update()
        predicted = rows @ costs
        model = EngineModel(
            step_seconds=float(costs[0]),
            step_seconds_per_sequence=float(costs[1]),
            step_seconds_per_context_token=float(costs[2]),
            prefill_seconds_per_token=prefill,
            max_sequences=self._max_sequences,
            kv_tokens=info.kv_tokens,
            block_size=info.block_size,
            event_seconds=event_seconds,
            request_seconds=request_seconds,
            token_seconds=token_seconds,
            hardware=hardware())
        return model, float(np.mean(np.abs(predicted / np.array(steps) - 1)))

    async def _fastest(self, sequences: int, context: int, steps: int, *, cached: bool = True) -> float:
        return min([await self._batch(sequences, context, steps, cached=cached) for _ in range(REPEATS)])

    async def _batch(self, sequences: int, context: int, steps: int, *, cached: bool = True) -> float:
        """Seconds for so many sequences, of a prompt with `context` tokens, to decode `steps` tokens each."""
        prompt = Prompt(self._dice.choices(self._vocabulary, k=context), {})
        if cached:
            await self._decode(prompt, 1)
        started = time.perf_counter()
        await asyncio.gather(*(self._decode(prompt, steps) for _ in range(sequences)))
        return time.perf_counter() - started

    async def _decode(self, prompt: Prompt, steps: int) -> None:
        async for _ in self._segments.generate(
                prompt, [], max_tokens=steps, segment_tokens=steps, seed=None, place=Place()):
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
