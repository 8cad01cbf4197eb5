"""`EngineModel`: how long the steps of one real engine take, as a few numbers in a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineModel:
    """Step time of an engine with continuous batching, linear in what a step does.

    A step samples one token for each of its n running sequences and computes p prompt tokens that were not cached:
    ``step_seconds + step_seconds_per_sequence * n + step_seconds_per_context_token * context +
    step_seconds_per_kv_token * kv + prefill_seconds_per_token * p``, where context is the sum of the tokens that the n
    sequences attend to, and kv the same with those that several sequences share counted once.
    """

    step_seconds: float
    """Of a step with an empty batch: weights read once, launches, the engine's own Python."""
    step_seconds_per_sequence: float
    step_seconds_per_context_token: float
    """Attention; 0 where it does not show."""
    prefill_seconds_per_token: float
    step_seconds_per_kv_token: float = 0.0
    """Attention, the part of it that shared tokens cost once: reading them into the processor's caches."""
    max_sequences: int = 256
    """Most sequences of a batch (vLLM's max_num_seqs)."""
    kv_tokens: int = 0
    """Tokens that the KV cache holds; 0: unlimited."""
    block_size: int = 16
    """Tokens of a KV block: prefixes are reused in whole blocks."""
    event_seconds: float = 0.0
    """CPU time of the server's event loop for a segment that comes back."""
    request_seconds: float = 0.0
    """CPU time of the server's event loop for an engine request, the engine's own Python there included."""
    token_seconds: float = 0.0
    """CPU time of the server's event loop for a sampled token: the engine's own Python there."""
    hardware: str = ''
    """What was measured."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _holds(field, value):
                raise ValueError(f'EngineModel.{field.name}={value!r}: must be {_allowed(field)}.')

    @classmethod
    def from_json(cls, path: str | Path) -> EngineModel:
        """Read what `to_json` wrote. Raises `ValueError` naming `path` and what is wrong in it."""
        try:
            values = json.loads(Path(path).read_text())
        except OSError as e:
            raise ValueError(f'{path}: {e.strerror}.') from None
        except ValueError as e:
            raise ValueError(f'{path}: not JSON ({e}).') from None
        if not isinstance(values, dict):
            raise ValueError(f'{path}: must hold a JSON object with the fields of EngineModel.')
        fields = dataclasses.fields(cls)
        unknown = values.keys() - {field.name for field in fields}
        missing = {field.name for field in fields if field.default is dataclasses.MISSING} - values.keys()
        if unknown or missing:
            raise ValueError(
                f'{path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}. '
                f'Allowed are: {", ".join(field.name for field in fields)}.'
            )
        try:
            return cls(**values)
        except ValueError as e:
            raise ValueError(f'{path}: {e}') from None

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + '\n')

    def seconds(self, steps: int, *, sequences: int, context: int, kv: int = 0, prefill: int = 0) -> float:
        """Time of `steps` steps with the same sequences.

        Args:
            context: tokens of all sequences together before the first step; each step adds one a sequence.
            kv: the same with shared ones counted once.
            prefill: tokens that are computed in the first step.
        """
        sampled = sequences * (steps * (steps - 1) // 2)
        attention = self.step_seconds_per_context_token * (
            steps * context + sampled
        ) + self.step_seconds_per_kv_token * (steps * kv + sampled)
        return (
            steps * (self.step_seconds + self.step_seconds_per_sequence * sequences)
            + attention
            + self.prefill_seconds_per_token * prefill
        )


_POSITIVE = ('step_seconds', 'max_sequences', 'block_size')


def _allowed(field: dataclasses.Field) -> str:
    if field.type == 'str':
        return 'a string'
    number = 'an integer' if field.type == 'int' else 'a finite number'
    return f'{number} {"above" if field.name in _POSITIVE else "of at least"} 0'


def _holds(field: dataclasses.Field, value: Any) -> bool:
    if field.type == 'str':
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if field.type == 'int' else (int, float)):
        return False
    return math.isfinite(value) and (value > 0 if field.name in _POSITIVE else value >= 0)
