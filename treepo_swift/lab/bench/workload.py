"""What the rollouts of a benchmark are asked, and how their answers end."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Segment
from treepo_swift.core.tree import StopReason
from treepo_swift.lab.lengths import LengthDistribution
from treepo_swift.server.engine import Placement, Prompt, SegmentEngine

KINDS = ('fixed', 'natural', 'lengths')


@dataclass(frozen=True)
class Workload:
    """The same prompts and limits for every mode."""

    kind: str
    """`fixed`: every answer runs to the limit; `natural`: until the model ends it; `lengths`: as `lengths` says."""
    messages: list[list[dict[str, Any]]]
    width: int
    config: TreeConfig
    lengths: LengthDistribution | None = None

    @property
    def max_tokens(self) -> int:
        return self.config.max_response_tokens

    @property
    def trajectories(self) -> int:
        return len(self.messages) * self.width


def read_messages(path: str, count: int) -> list[list[dict[str, Any]]]:
    """The first `count` prompts of a swift dataset file (JSON lines with `messages`), without their answers."""
    prompts = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            messages = json.loads(line)['messages']
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: must be a JSON object with "messages".') from None
        prompts.append([message for message in messages if message['role'] != 'assistant'])
    if len(prompts) < count:
        raise ValueError(f'{path} has {len(prompts)} prompts, --prompts asks for {count}.')
    return prompts[:count]


def made_up_messages(count: int) -> list[list[dict[str, Any]]]:
    """Short questions that every model can answer somehow."""
    dice = random.Random(0)
    return [
        [{'role': 'user', 'content': f'What is the digit sum of {dice.randrange(10**5, 10**6)}? Go step by step.'}]
        for _ in range(count)
    ]


class EndingEngine:
    """A `SegmentEngine` whose answers end at lengths drawn from a distribution, whatever the model says.

    A request draws its path's length given that it is longer than its prefix, so a fork's end is its own, and asking
    segment by segment draws from the same distribution as asking once.
    """

    def __init__(self, engine: SegmentEngine, lengths: LengthDistribution, rng: random.Random, limit: int) -> None:
        """A length of at least `limit` tokens, the most that a response may have, is one that was cut there."""
        self._engine = engine
        self._lengths = lengths
        self._rng = rng
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

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
        length = self._lengths.draw(self._rng, longer_than=len(response_ids))
        left = length - len(response_ids)
        ends_here = left <= max_tokens and length < self._limit
        inner = self._engine.generate(
            prompt,
            response_ids,
            max_tokens=min(max_tokens, left),
            segment_tokens=segment_tokens,
            seed=seed,
            placement=placement,
        )
        async with aclosing(inner) as segments:
            async for segment in segments:
                left -= len(segment.token_ids)
                yield segment if left or not ends_here else replace(segment, stop=StopReason.EOS)
