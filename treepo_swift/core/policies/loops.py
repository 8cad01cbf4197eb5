"""Whether a text has run into a loop: one unit over and over. Linear in the text however hostile it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

NEAR_BLOCK = 32
"""Characters of the blocks that near-loops are made of."""
NEAR_REACH = 1024
"""How many characters before a block are searched for it."""


@dataclass(frozen=True, slots=True)
class LoopState:
    """What is known about a text so far. Immutable: forks go on from the same one."""

    tail: str = ''
    """The end of the text, as much of it as a loop or near-loop that goes on may need. Empty once found."""
    found: bool = False
    partial: int = 0
    """Characters after the last whole block, counted from the start of the text. Near-loops only."""
    stale: int = 0
    """Characters of the blocks before these that hold nothing new. Near-loops only."""


class LoopDetector:
    """Finds L(p) = max(repeats * p, characters) characters with s[i] == s[i - p], for a period p of at most `max_unit`.

    `found` says whether the text was in such a loop at any of its characters. So it does not depend on how the text is
    cut into pieces, and a text that has left a loop by itself counts as one that was in it.

    Why one `str.rfind` every few hundred characters finds them all: let p be the least period of such a stretch, and
    take a block of w >= p characters in it that has p more before it. Those occur p characters earlier. If they
    occurred d < p characters earlier, then p + d characters or more would have the periods p and d, so also gcd(p, d)
    (Fine and Wilf), and with them the whole stretch: p would not be the least. So the closest occurrence is p away.
    A stretch is sure to hold the end of such a block if blocks end every L(p) - p - w + 1 characters. What `rfind` says
    is checked by comparing the text with itself, shifted. `rfind` compares at most w characters at w places for a
    block, and blocks end at least w / 2 apart: the worst text costs 2 * w comparisons a character.

    With `near_characters` also near-loops: so many characters in a row that hold nothing new but digits ("Step 17: we
    check x. Step 18: we check x."). The text is cut into blocks of 32 characters from its start on. A block holds
    nothing new if it occurs within the 1,024 characters before it, all digits taken as the same. This is off unless
    asked for: a long enumeration and a table of numbers look precisely like that.
    `examples/ablations/repetition_rules.py` counts what either rule stops.
    """

    def __init__(
        self, *, repeats: int = 8, characters: int = 500, max_unit: int = 512, near_characters: int | None = None
    ) -> None:
        if repeats < 3 or min(characters, max_unit, 1 if near_characters is None else near_characters) < 1:
            raise ValueError(
                f'LoopDetector(repeats={repeats}, characters={characters}, max_unit={max_unit}, '
                f'near_characters={near_characters}): needs at least 3 repeats, and 1 of everything else.'
            )
        self.repeats = repeats
        self.characters = characters
        self.max_unit = max_unit
        self.near_characters = near_characters
        self._scales = tuple(_scales(self.needed, max_unit))
        self._keep = self.needed(max_unit) - 1
        if near_characters is not None:
            self._keep = max(self._keep, NEAR_REACH + NEAR_BLOCK - 1)

    def start(self) -> LoopState:
        """The state before any text."""
        return LoopState()

    def needed(self, unit: int) -> int:
        """L(p): the fewest characters of a loop whose unit has `unit` characters."""
        return max(self.repeats * unit, self.characters)

    def feed(self, state: LoopState, text: str) -> LoopState:
        """The state after `text` has followed what led to `state`. Once found, stays found."""
        # A candidate is compared with all of a piece, so long texts are cut: into what is not short beside the tail.
        size = max(8192, self._keep)
        for begin in range(0, len(text), size):
            if not state.found:
                state = self._feed_piece(state, text[begin : begin + size])
        return state

    def _feed_piece(self, state: LoopState, text: str) -> LoopState:
        seam = state.tail + text
        if self._has_loop(seam, len(state.tail)):
            return LoopState(found=True)
        partial, stale = 0, 0
        if self.near_characters is not None:
            partial, stale = self._feed_blocks(state, seam, enough=self.near_characters)
            if stale >= self.near_characters:
                return LoopState(found=True)
        return LoopState(seam[-self._keep :], partial=partial, stale=stale)

    def _has_loop(self, text: str, old: int) -> bool:
        """Whether a loop ends after the first `old` characters. There is none within these, or it had been found."""
        distances = set(self._distances(text, old))
        if not distances:
            return False
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        return any(_longest_stretch(codes, unit) >= self.needed(unit) for unit in distances)

    def _distances(self, text: str, old: int) -> Iterator[int]:
        """How far back the closest occurrence of each block is: the period of every loop that ends after `old`."""
        for scale in self._scales:
            # A loop that ends at old + 1 may hold only a block that ends up to step - 1 characters earlier.
            for end in range(len(text), max(old + 1 - scale.step, scale.width), -scale.step):
                begin = end - scale.width
                found = text.rfind(text[begin:end], max(0, begin - scale.width), end - 1)
                if found >= 0:
                    yield begin - found

    def _feed_blocks(self, state: LoopState, seam: str, *, enough: int) -> tuple[int, int]:
        """`partial` and `stale` after the new text, or where there are `enough` stale characters in a row."""
        skipped = max(0, len(state.tail) - state.partial - NEAR_REACH)
        text = _digits_alike(seam[skipped:])
        begin, stale = len(state.tail) - state.partial - skipped, state.stale
        while stale < enough and begin + NEAR_BLOCK <= len(text):
            block = text[begin : begin + NEAR_BLOCK]
            is_stale = text.rfind(block, max(0, begin - NEAR_REACH), begin + NEAR_BLOCK - 1) >= 0
            stale = stale + NEAR_BLOCK if is_stale else 0
            begin += NEAR_BLOCK
        return len(text) - begin, stale


def is_loop(
    text: str, *, repeats: int = 8, characters: int = 500, max_unit: int = 512, near_characters: int | None = None
) -> bool:
    """Whether `text` was in a loop anywhere: what a `LoopDetector` finds, however the text is cut."""
    detector = LoopDetector(repeats=repeats, characters=characters, max_unit=max_unit, near_characters=near_characters)
    return detector.feed(detector.start(), text).found


@dataclass(frozen=True, slots=True)
class _Scale:
    """Which blocks find the loops of some range of units."""

    width: int
    """Characters of a block; also the longest unit of the range."""
    step: int
    """Characters from the end of a block to the end of the next."""


def _scales(needed: Callable[[int], int], max_unit: int) -> Iterator[_Scale]:
    """Ranges of units from 1 to `max_unit`, each as wide as keeps a step at least half a block."""
    longest = 0
    while longest < max_unit:
        longest += 1
        room = needed(longest) - longest
        while longest < max_unit:
            next_room = min(room, needed(longest + 1) - (longest + 1))
            if 2 * (next_room - longest) < longest + 1:
                break
            longest, room = longest + 1, next_room
        yield _Scale(longest, room - longest + 1)


def _longest_stretch(codes: np.ndarray, period: int) -> int:
    """Characters of the longest stretch with that period. `codes`: uint32 [len(text)]."""
    differs = np.flatnonzero(codes[period:] != codes[:-period])
    gaps = np.diff(differs, prepend=-1, append=len(codes) - period)
    return int(gaps.max()) - 1 + period


def _digits_alike(text: str) -> str:
    """Several times as fast as `str.translate`."""
    for digit in '123456789':
        text = text.replace(digit, '0')
    return text
