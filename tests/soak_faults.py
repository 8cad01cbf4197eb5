"""An external plugin for `tests.soak_training`, in its servers and its trainer: does the faults that its file asks for.

The file named by SOAK_FAULTS holds the kind of fault that is to be had now, or nothing. What was done is counted in
lines of ``SOAK_FAULTS.PID``, so that the report says what happened and not what was planned.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from swift.rewards import ORM, orms
from swift.rollout import multi_turns

from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.server.vllm_engine import VllmSegmentEngine
from treepo_swift.trainer.tree_writer import TreeWriter

FAULTS = Path(os.environ['SOAK_FAULTS'])
RATE = 0.1
"""Share of calls that go wrong while a fault lasts."""
SLOW_SECONDS = 8.0

rng = random.Random(os.getpid())
last_seen = (0.0, '')


def asked() -> str:
    """The kind of fault that is on; the file is looked at ten times a second at most."""
    global last_seen
    now = time.monotonic()
    if now - last_seen[0] > 0.1:
        last_seen = (now, FAULTS.read_text().strip() if FAULTS.exists() else '')
    return last_seen[1]


def happens(*kinds: str, rate: float = RATE) -> str | None:
    kind = asked()
    if kind not in kinds or rng.random() >= rate:
        return None
    note(kind)
    return kind


def note(kind: str) -> None:
    with open(f'{FAULTS}.{os.getpid()}', 'a') as file:
        file.write(f'{kind}\n')


class Soaked(TreeRolloutScheduler):
    """Its segment check misbehaves; what it decides otherwise is the default."""

    async def check_segment(self, path: Any, text: str) -> Any:
        match happens('a hook raises', 'a hook exits', 'a hook hangs', 'a hook returns a wrong type'):
            case 'a hook raises':
                raise KeyError('board')
            case 'a hook exits':
                raise SystemExit(3)
            case 'a hook hangs':
                await asyncio.sleep(3600)
            case 'a hook returns a wrong type':
                return 'enough'
        return super().check_segment(path, text)


multi_turns['soaked'] = Soaked

request = VllmSegmentEngine._request
sampled = VllmSegmentEngine._sampled


async def faulty_request(self: VllmSegmentEngine, *args: Any) -> AsyncGenerator[Any, None]:
    if happens('the engine raises'):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    if happens('the engine loses a request', rate=0.02):
        await asyncio.sleep(3600)
    async for output in request(self, *args):
        yield output
        if happens('vLLM aborts a request', rate=0.05):
            # By vLLM itself, and of whichever requests it has now.
            ids = [one for one in self._vllm.output_processor.external_req_ids if one.startswith('treepo-')]
            await self._vllm.abort(rng.sample(ids, min(len(ids), 4)))


def faulty_sampled(self: VllmSegmentEngine, completion: Any) -> Any:
    tokens, logprobs, entropies = sampled(self, completion)
    if logprobs and happens('log-probs are NaN', rate=0.05):
        logprobs = [float('nan'), *logprobs[1:]]
    return tokens, logprobs, entropies


VllmSegmentEngine._request = faulty_request
VllmSegmentEngine._sampled = faulty_sampled

lines = TreeWriter._lines


def faulty_lines(self: TreeWriter, *args: Any) -> list[str]:
    if asked() == 'the disk is full':
        note('the disk is full')
        raise OSError(errno.ENOSPC, 'No space left on device')
    return lines(self, *args)


TreeWriter._lines = faulty_lines


class SlowSum(ORM):
    """The quickstart's reward, which takes its time while that is asked for."""

    def __call__(self, completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        if happens('the reward is slow', rate=1.0):
            time.sleep(SLOW_SECONDS)
        return orms['digit_sum']()(completions, solution, **kwargs)


orms['slow_sum'] = SlowSum
