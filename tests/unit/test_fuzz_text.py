"""Checks of text against whatever a model may write: they agree however it is cut, and cost what its length costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import examples
from treepo_swift.config import TreeConfig
from treepo_swift.core.inert import inert
from treepo_swift.core.policies.stopping import TextChecker, first_stop_string

PARTS = st.sampled_from(
    [
        '\\boxed{',
        '}',
        '{',
        '\\',
        '\\{',
        '\\boxed',
        ' ',
        'a',
        '7',
        '<answer>',
        '</answer>',
        '<answer',
        '\n',
        '\ud800',
        '🙂',
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PARTS, max_size=40).map(''.join))
CONFIGS = [
    TreeConfig(stop={'answer': answer, 'repetition': repetition})
    for answer in ('boxed', 'tags')
    for repetition in ({'rule': 'loop', 'repeats': 3, 'characters': 12}, {'rule': 'windows', 'length': 3, 'count': 3})
]
MEGABYTE = 1_000_000


@given(TEXTS, st.integers(1, 9), st.sampled_from(CONFIGS))
@examples(300)
@example('\\boxed{\\}}', 1, CONFIGS[0])
@example('\\boxed{ }\\boxed{\\boxed{}7}', 3, CONFIGS[0])
@example('<answer></answer><answer>a</answer>', 2, CONFIGS[2])
@example('ab' * 12, 5, CONFIGS[0])
def test_what_is_found_does_not_depend_on_the_pieces(text, size, config):
    checker = TextChecker(config)
    whole = checker.feed(checker.start(), text)
    state = checker.start()
    for begin in range(0, len(text), size):
        state = checker.feed(state, text[begin : begin + size])
    assert (state.answer, state.repetition) == (whole.answer, whole.repetition)


def steps(work: Callable[[], Any]) -> int:
    """Lines of Python that run: a count that is the same on every machine."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == 'line'
        return trace

    before = sys.gettrace()  # coverage's, perhaps
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


HOSTILE: dict[str, Callable[[int], str]] = {
    'braces': lambda n: '\\boxed{' + '{' * n,
    'boxes': lambda n: '\\boxed{' * (n // 7),
    'empty boxes': lambda n: '\\boxed{}' * (n // 8),
    'backslashes': lambda n: '\\' * n,
    'tags': lambda n: '<answer>' * (n // 8),
    'almost a tag': lambda n: '<answer>' + '</answer' * (n // 8),
    'blanks': lambda n: '\\boxed{<answer>' + ' ' * n,
    'one letter': lambda n: 'a' * n,
    'almost a loop': lambda n: ('a' * 490 + 'b') * (n // 491),
    'no text': lambda n: '\x00\x1b' * (n // 2),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_megabyte_costs_ten_times_as_many_steps_as_a_tenth(name):
    """In pieces of a segment's size, as a path grows. What is quadratic would take a hundred times as many."""

    def check(size: int) -> None:
        text = HOSTILE[name](size)
        for config in (TreeConfig(), TreeConfig(stop={'answer': 'tags'})):
            checker = TextChecker(config)
            state = checker.start()
            for begin in range(0, len(text), 20_000):
                state = checker.feed(state, text[begin : begin + 20_000])

    # Where a loop is found nothing more is read, which costs less and not more.
    assert steps(lambda: check(MEGABYTE)) < 15 * steps(lambda: check(MEGABYTE // 10)) + 1000


def test_stop_strings_and_logs_cost_what_the_text_is_long():
    text = 'STO' * (MEGABYTE // 3)
    assert first_stop_string(text, ['STOP', 'END']) is None
    few, many = (steps(lambda n=n: inert('\x1b' * n)) for n in (10_000, 100_000))
    assert many < 15 * few
