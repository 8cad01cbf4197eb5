"""When the text of a path says that it should stop. Model output is hostile input: every check is linear in time."""
from __future__ import annotations

from typing import Sequence

import numpy as np

from ..config import TreeConfig
from ..tree import StopReason

BOXED = '\\boxed{'


def check_text(text: str, config: TreeConfig) -> StopReason | None:
    """The default early stop: an answer first, then repetition. `text` is the path's whole response so far."""
    if config.stop_at_answer and has_boxed_answer(text):
        return StopReason.ANSWER
    if config.stop_at_repetition and has_repetition(text, config.repetition_length, config.repetition_count):
        return StopReason.REPETITION
    return None


def has_boxed_answer(text: str) -> bool:
    r"""Whether `text` holds a complete, non-empty ``\boxed{...}`` (braces balanced, ``\{`` and ``\}`` not counted)."""
    start = text.find(BOXED)
    if start < 0:
        return False
    opened: list[int | None] = []  # for each open brace: where a boxed content begins, else None
    i = start
    while i < len(text):
        if text.startswith(BOXED, i):
            i += len(BOXED)
            opened.append(i)
            continue
        char = text[i]
        if char == '\\':
            i += 2
            continue
        if char == '{':
            opened.append(None)
        elif char == '}' and opened:
            begin = opened.pop()
            if begin is not None and not text[begin:i].isspace() and begin != i:
                return True
        i += 1
    return False


def has_repetition(text: str, length: int, count: int) -> bool:
    """Whether a substring of at least `length` characters occurs at least `count` times, overlaps included.

    That is so exactly when some window of `length` characters does. Windows are hashed by doubling, in vectors;
    only windows in a bucket that is full enough to matter are compared as text, so the result is exact.
    """
    num_windows = len(text) - length + 1
    if num_windows < count:
        return False
    hashes = _window_hashes(text, length)
    # Twice as many buckets as windows, a power of two, the top bits of a multiplicative hash.
    bits = max(8, int(num_windows).bit_length() + 1)
    buckets = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)
    fill = np.bincount(buckets.astype(np.int64), minlength=1)
    suspects = np.flatnonzero(fill[buckets.astype(np.int64)] >= count)
    seen: dict[str, int] = {}
    for begin in suspects.tolist():
        window = text[begin:begin + length]
        seen[window] = seen.get(window, 0) + 1
        if seen[window] >= count:
            return True
    return False


def _window_hashes(text: str, length: int) -> np.ndarray:
    """Polynomial hash of every window of `length` characters, modulo 2**64: uint64 [len(text) - length + 1]."""
    base, mask = 0x100000001B3, (1 << 64) - 1
    power = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32).astype(np.uint64)
    size, result, result_size = 1, None, 0
    while True:
        # `power` hashes windows of `size`; `result` those of the lower bits of `length` that were done so far.
        if length & size:
            if result is None:
                result, result_size = power, size
            else:
                head = power[:len(power) - result_size]
                tail = result[size:]
                usable = min(len(head), len(tail))
                result = head[:usable] * np.uint64(pow(base, result_size, mask + 1)) + tail[:usable]
                result_size += size
        if result_size == length:
            return result
        power = power[:-size] * np.uint64(pow(base, size, mask + 1)) + power[size:]
        size *= 2


def first_stop_string(text: str, stops: Sequence[str]) -> str | None:
    """The stop string that is complete first in `text`, or None."""
    found = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    return min(found)[1] if found else None
