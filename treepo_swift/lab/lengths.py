"""How long responses are, in tokens: the lengths that were seen, to draw from."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = 'a non-empty list of positive integers (tokens of a response each)'


@dataclass(frozen=True)
class LengthDistribution:
    """The empirical distribution of `lengths`, each as likely as it is frequent among them."""

    lengths: tuple[int, ...]
    """Tokens of a response each, kept in ascending order."""

    def __post_init__(self) -> None:
        fine = isinstance(self.lengths, (list, tuple)) and all(map(_is_length, self.lengths))
        if not fine or not self.lengths:
            raise ValueError(f'lengths={_shortened(self.lengths)}: must be {ALLOWED}.')
        object.__setattr__(self, 'lengths', tuple(sorted(self.lengths)))

    @classmethod
    def fixed(cls, length: int) -> LengthDistribution:
        """All responses have `length` tokens."""
        return cls((length,))

    @classmethod
    def from_json(cls, path: str | Path) -> LengthDistribution:
        """Read a JSON list. Raises `ValueError` naming `path` where it holds anything else."""
        try:
            return cls(json.loads(Path(path).read_text()))
        except OSError as e:
            raise ValueError(f'{path}: {e.strerror}. It must be a JSON file with {ALLOWED}.') from None
        except json.JSONDecodeError as e:
            raise ValueError(f'{path}: not JSON ({e}). It must hold {ALLOWED}.') from None
        except ValueError as e:
            raise ValueError(f'{path}: {e}') from None

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def max(self) -> int:
        return self.lengths[-1]

    def draw(self, rng: random.Random, longer_than: int = 0) -> int:
        """The length of a response that has `longer_than` tokens and goes on; one more where none was seen longer."""
        first = bisect_right(self.lengths, longer_than)
        if first == len(self.lengths):
            return longer_than + 1
        return self.lengths[rng.randrange(first, len(self.lengths))]


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
