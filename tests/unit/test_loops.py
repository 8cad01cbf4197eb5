"""Loops: exact whatever the pieces, blind to what people write, linear however hostile the text is."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_swift.core.policies.loops import LoopDetector, LoopState, is_loop

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
NEAR = {'near_characters': 1000}


def feed(detector: LoopDetector, pieces: list[str], state: LoopState | None = None) -> list[LoopState]:
    """The states after each piece."""
    states = [state or detector.start()]
    for piece in pieces:
        states.append(detector.feed(states[-1], piece))
    return states[1:]


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def cut_anywhere(text: str, rng: random.Random) -> list[str]:
    cuts = [0, *sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8))), len(text)]
    return [text[begin:end] for begin, end in zip(cuts, cuts[1:])]


def has_loop(text: str, repeats: int, characters: int, max_unit: int) -> bool:
    """What is meant, as it is said: at some end, for some period, the last L characters have that period."""
    for end in range(len(text) + 1):
        for period in range(1, max_unit + 1):
            begin = end - max(repeats * period, characters)
            if begin >= 0 and text[begin + period : end] == text[begin : end - period]:
                return True
    return False


def has_near_loop(text: str, characters: int) -> bool:
    text = ''.join('0' if char in '123456789' else char for char in text)
    row = 0
    for begin in range(0, len(text) - 31, 32):
        block = text[begin : begin + 32]
        is_stale = any(text[at : at + 32] == block for at in range(max(0, begin - 1024), begin))
        row = row + 32 if is_stale else 0
        if row >= characters:
            return True
    return False


# Laws


@st.composite
def loopy_pieces(draw, units=('a', 'b', 'ab', 'aab', 'abaab', 'c'), most=12):
    """Pieces of a text that is made of repeated units, cut wherever."""
    part = st.tuples(st.sampled_from(units), st.integers(1, most)).map(lambda part: part[0] * part[1])
    text = ''.join(draw(st.lists(part, max_size=8)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(loopy_pieces(), st.integers(3, 6), st.integers(1, 20), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_definition_whatever_the_pieces(pieces, repeats, characters, max_unit):
    options = {'repeats': repeats, 'characters': characters, 'max_unit': max_unit}
    found = [state.found for state in feed(LoopDetector(**options), pieces)]
    assert found == [has_loop(''.join(pieces[: i + 1]), **options) for i in range(len(pieces))]
    assert found == sorted(found)  # once found, stays found
    assert is_loop(''.join(pieces), **options) is found[-1]


SENTENCES = 'Step 17: so x = 3. ', 'Step 4: so x = 21. ', 'x', 'or not, ', 'we check once more that '


@given(loopy_pieces(units=SENTENCES, most=40), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_near_loops_agree_with_the_definition_whatever_the_pieces(pieces, characters):
    # Exact loops need more repeats than there are characters here.
    detector = LoopDetector(repeats=10**6, near_characters=characters)
    found = [state.found for state in feed(detector, pieces)]
    assert found == [has_near_loop(''.join(pieces[: i + 1]), characters) for i in range(len(pieces))]


@given(loopy_pieces(), loopy_pieces(), loopy_pieces())
@settings(max_examples=100, deadline=None)
def test_forks_do_not_influence_each_other(shared, left, right):
    detector = LoopDetector(repeats=4, characters=10, max_unit=6, near_characters=64)
    fork = feed(detector, shared)[-1]
    before = LoopState(fork.tail, fork.found, fork.partial, fork.stale)
    one, other = fork, fork
    for i in range(max(len(left), len(right))):
        one, other = detector.feed(one, ''.join(left[i : i + 1])), detector.feed(other, ''.join(right[i : i + 1]))
    assert one == feed(detector, [*shared, *left])[-1]
    assert other == feed(detector, [*shared, *right])[-1]
    assert fork == before


@given(st.text(alphabet=st.characters(), min_size=1, max_size=30), st.text(alphabet=st.characters(), max_size=30))
@settings(max_examples=100, deadline=None)
def test_takes_any_unicode(unit, prefix):
    for text in (prefix + unit * 500, '\ud800' + prefix + (unit + '\U0010ffff') * 500):
        assert is_loop(text)
        assert feed(LoopDetector(**NEAR), cut(text, 77))[-1].found


# Loops are found


@pytest.mark.parametrize('begin', range(1, 513, 64))
def test_finds_a_unit_of_any_length_at_its_last_missing_character(begin):
    rng = random.Random(begin)
    for length in range(begin, begin + 64):
        unit = ''.join(rng.choices(LETTERS, k=length))
        size = max(8 * length, 500)
        loop = (unit * (size // length + 1))[:size]
        prefix = ''.join(rng.choices(LETTERS + ' .', k=rng.randrange(5000))) + '#'
        pieces = cut_anywhere(prefix + loop, rng)
        assert feed(LoopDetector(), pieces)[-1].found, length
        states = feed(LoopDetector(), cut_anywhere(prefix + loop[:-1], rng))
        assert not states[-1].found, length
        assert LoopDetector().feed(states[-1], loop[-1]).found, length
        assert is_loop(prefix + loop) and not is_loop(prefix + loop[:-1]), length


def test_finds_a_loop_that_ends_with_the_first_new_character_whatever_follows():
    """The lookups count back from the end of the new text; none may be left out just before its start."""
    detector = LoopDetector(repeats=4, characters=10, max_unit=12)
    noise = ''.join(random.Random(0).choices('XYZ', k=60))
    assert not detector.feed(detector.start(), noise).found
    for length in range(1, 13):
        size = max(4 * length, 10)
        loop = (LETTERS[:length] * size)[:size]
        state = detector.feed(detector.start(), '#' + loop[:-1])
        assert not state.found
        for after in range(60):
            rest = loop[-1] + '#' + noise[:after]
            assert detector.feed(state, rest).found, (length, after)


def test_a_loop_is_found_with_what_comes_after_it():
    """Pieces could end within the loop as well: whether it was left does not count."""
    text = 'Let me see. ' + 'wait, ' * 100 + 'Ah, now I see: the answer is 4.'
    assert is_loop(text)
    assert all(feed(LoopDetector(), cut(text, size))[-1].found for size in (1, 7, 500, 2000))


def test_finds_near_loops_only_when_asked():
    text = ''.join(f'Step {i}: by step {i - 1}, we check x = {i * 3}. ' for i in range(100, 200))
    assert not is_loop(text)
    assert is_loop(text, **NEAR)
    assert is_loop('wait, ' * 200, repeats=10**6, **NEAR)


def test_a_near_loop_may_reach_back_1024_characters():
    for size, found in ((1024, True), (1025, False)):
        text = ''.join(random.Random(0).choices(LETTERS, k=size)) * 3
        for detector in (LoopDetector(max_unit=1, **NEAR), LoopDetector(**NEAR)):
            assert [feed(detector, cut(text, k))[-1].found for k in (1, 31, 33, 4000)] == [found] * 4


# Healthy text


def test_what_people_write_is_no_loop():
    """The standard library and NumPy; `examples/ablations/repetition_rules.py` counts more."""
    paths = [*Path(os.__file__).parent.glob('*.py'), *Path(np.__file__).parent.rglob('*.py')]
    paths = [path for path in paths if 12_000 <= path.stat().st_size <= 40_000]
    texts = [path.read_text(encoding='utf-8', errors='replace')[:24_000] for path in paths]
    for size in (500, 2000):
        assert sum(feed(LoopDetector(), cut(text, size))[-1].found for text in texts) <= len(texts) / 50


@pytest.mark.parametrize(
    'text',
    [
        '-' * 39 + '\n',
        '=' * 120 + '\n',
        '#' * 120 + '\n# Title\n' + '#' * 120 + '\n',
        '| --- | --- | --- | --- | --- | --- | --- | --- |\n',
        '+' + ('-' * 18 + '+') * 6 + '\n',
        '\\begin{bmatrix}\n' + ' & '.join('0' * 10) + ' \\\\\n' * 10 + '\\end{bmatrix}\n',
        str([[0] * 12] * 12),
        'x\n' + '\n' * 40 + ' ' * 100,
        '|' + ' 0 |' * 12 + '\n|' + ' --- |' * 12 + '\n' + ('|' + ' 0 |' * 12 + '\n') * 7,
        '1/3 = 0.' + '3' * 200,
    ],
)
def test_short_runs_are_no_loops(text):
    prefix, suffix = 'The table below has it all:\n', 'As we see, every row is the same.'
    for characters in (None, 1000):
        assert not is_loop(prefix + text + suffix, near_characters=characters)


def test_enumerations_are_no_loops():
    squares = '\n'.join(f'- {i} squared is {i * i}, with a remainder of {i * i % 7} modulo 7.' for i in range(300))
    steps = '\n'.join(f'Step {i}: add {i} and {i * 7}.' for i in range(200))
    bits = '\n'.join(f'{i:08b} has {i.bit_count()} ones' for i in range(256))
    table = '\n'.join(f'| {i} | {i * i} | {i**3} |' for i in range(300))
    for text in (squares, steps, bits, table):
        assert not is_loop(text)
        assert is_loop(text, **NEAR), 'what near_characters cannot tell from a near-loop'


def test_the_same_sentence_here_and_there_is_no_loop():
    rng = random.Random(1)
    said = 'Let us check this once more, carefully: '
    text = ''.join(said + ''.join(rng.choices(LETTERS + ' ', k=rng.randrange(40, 120))) + '.\n' for _ in range(100))
    assert not is_loop(text)
    assert not is_loop(text, **NEAR)


# Model output is hostile


def fibonacci(size: int) -> str:
    last, text = 'a', 'ab'
    while len(text) < size:
        last, text = text, text + last
    return text[:size]


def nearly_periodic(period: int, size: int) -> str:
    """One letter over and over, but for another one about every `period` characters."""
    rng = random.Random(0)
    return ''.join('a' * (period - rng.randrange(4)) + rng.choice('bc') for _ in range(size // period + 1))[:size]


def seven_of_each(size: int) -> str:
    """Each unit is one more to check."""
    rng = random.Random(0)
    return ''.join(''.join(rng.choices(LETTERS, k=150 + i % 363)) * 7 for i in range(size // 1050))[:size]


HOSTILE = {
    'one letter': lambda n: 'a' * n,
    'Fibonacci': fibonacci,
    'nearly periodic, 31': lambda n: nearly_periodic(31, n),
    'nearly periodic, 290': lambda n: nearly_periodic(290, n),
    'nearly periodic, 495': lambda n: nearly_periodic(495, n),
    'two letters': lambda n: ''.join(random.Random(0).choices('ab', k=n)),
    'seven of each': seven_of_each,
    'seven repeats': lambda n: ''.join(('a' * 490 + chr(98 + i % 9)) * 7 for i in range(n // 3437)),
}


@pytest.mark.parametrize('make', HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize('options', [{}, {'near_characters': 10**9}], ids=['loops', 'near-loops'])
def test_hostile_text_costs_linear_time(make, options):
    """Ten times less than this was measured; what is quadratic would take minutes."""
    text, detector = make(200_000), LoopDetector(**options)
    for pieces in ([text], cut(text, 2000), cut(text[:20_000], 16)):
        started = time.process_time()
        feed(detector, pieces)
        assert time.process_time() - started < 1


@pytest.mark.parametrize('option, value', [('repeats', 2), ('characters', 0), ('max_unit', 0), ('near_characters', 0)])
def test_refuses_what_makes_no_sense(option, value):
    with pytest.raises(ValueError, match=f'{option}={value}.*needs at least 3 repeats, and 1 of everything else'):
        LoopDetector(**{option: value})
