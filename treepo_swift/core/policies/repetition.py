"""Whether a text repeats itself: exact, and linear in the text however hostile it is."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_PRIME = 2**32 - 5
# Text that is made to collide needs to know this. Results do not depend on it: suspects are compared as text.
_BASE = secrets.randbelow(_PRIME - 2**24) + 2**23


def _no_hashes() -> np.ndarray:
    return np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class RepetitionState:
    """One piece of text and what came before it. Forks share their common past."""

    parent: RepetitionState | None = None
    text: str = ''
    """This piece only."""
    hashes: np.ndarray = field(default_factory=_no_hashes)
    """uint64, of the windows that end in this piece, in order."""
    tail: str = ''
    """The last characters up to here, one fewer than a window has."""
    num_windows: int = 0
    """From the start of the text to here."""
    found: bool = False

    def lineage(self) -> list[RepetitionState]:
        """The pieces from the start of the text to this one."""
        pieces: list[RepetitionState] = []
        state: RepetitionState | None = self
        while state is not None:
            pieces.append(state)
            state = state.parent
        return pieces[::-1]


class RepetitionDetector:
    """Finds a substring of at least `length` characters that occurs at least `count` times, overlaps included.

    There is one exactly when some window of `length` characters occurs so often. Each window is hashed once (a
    polynomial hash modulo a prime of 32 bits, with a base that is drawn when the process starts). A piece of text is
    checked by counting all windows of its path into buckets; only where a new window's bucket is full enough are
    hashes compared, and only windows whose hashes occur often enough are compared as text, so the result is exact.
    """

    def __init__(self, length: int, count: int) -> None:
        self.length = length
        self.count = count

    def start(self) -> RepetitionState:
        return RepetitionState()

    def feed(self, state: RepetitionState, text: str) -> RepetitionState:
        """The state after `text` has followed what led to `state`. Once found, nothing more is recorded."""
        if state.found or not text:
            return state
        seam = state.tail + text
        hashes = _window_hashes(seam, self.length) if len(seam) >= self.length else _no_hashes()
        tail = seam[max(0, len(seam) - self.length + 1) :]
        num_windows = state.num_windows + len(hashes)
        after = RepetitionState(state, text, hashes, tail, num_windows)
        return RepetitionState(state, text, hashes, tail, num_windows, found=True) if self._repeats(after) else after

    def _repeats(self, state: RepetitionState) -> bool:
        """Whether one of the windows that end in the last piece occurs often enough in the whole text."""
        if not len(state.hashes) or state.num_windows < self.count:
            return False
        pieces = state.lineage()
        hashes = np.concatenate([piece.hashes for piece in pieces])
        # At least twice as many buckets as windows; the hashes' low bits are as good as any.
        size = 1 << max(8, state.num_windows.bit_length() + 1)
        buckets = (hashes & np.uint64(size - 1)).view(np.int64)
        fill = np.bincount(buckets, minlength=size)
        new = buckets[-len(state.hashes) :]
        full = new[fill[new] >= self.count]
        if not len(full):
            return False
        is_full = np.zeros(size, bool)
        is_full[full] = True
        values, counts = np.unique(hashes[is_full[buckets]], return_counts=True)
        suspects = values[counts >= self.count]
        if not len(suspects):
            return False
        text = ''.join(piece.text for piece in pieces)
        return any(self._occurs(text, np.flatnonzero(hashes == suspect)) for suspect in suspects)

    def _occurs(self, text: str, begins: np.ndarray) -> bool:
        """Whether `count` of the windows that begin there are the same. `count` comparisons, but for a collision."""
        seen: Counter[str] = Counter()
        for begin in begins.tolist():
            window = text[begin : begin + self.length]
            seen[window] += 1
            if seen[window] >= self.count:
                return True
        return False


def has_repetition(text: str, length: int, count: int) -> bool:
    """Whether a substring of at least `length` characters occurs at least `count` times in `text`, taken whole."""
    detector = RepetitionDetector(length, count)
    return detector.feed(detector.start(), text).found


@lru_cache(maxsize=64)
def _power(size: int) -> np.uint64:
    return np.uint64(pow(_BASE, size, _PRIME))


def _window_hashes(text: str, length: int) -> np.ndarray:
    """Hash of every window of `length` characters: uint64 [len(text) - length + 1], by doubling, in vectors."""
    prime = np.uint64(_PRIME)

    def joined(left: np.ndarray, right: np.ndarray, right_size: int) -> np.ndarray:
        return np.asarray((left[: len(right)] * _power(right_size) + right[: len(left)]) % prime)

    # `part` hashes windows of `size`, a power of two; `result` those of the bits of `length` that are done.
    part, size = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.uint64), 1
    result, result_size = part, 0
    while True:
        if length & size:
            result = joined(part, result[size:], result_size) if result_size else part
            result_size += size
        if result_size == length:
            return result
        part = joined(part, part[size:], size)
        size *= 2
