from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_swift.config import TreeConfig
from treepo_swift.policies.stopping import check_text, first_stop_string, has_boxed_answer, has_repetition
from treepo_swift.tree import StopReason


@pytest.mark.parametrize('text, expected', [
    (r'so \boxed{42}.', True),
    (r'\boxed{\frac{1}{2}}', True),
    (r'\boxed{\frac{1}{2}', False),
    (r'\boxed{', False),
    (r'\boxed{}', False),
    (r'\boxed{  }', False),
    (r'\boxed{a\}', False),
    (r'\boxed{a\}}', True),
    (r'} } \boxed{1}', True),
    (r'\boxed{ \boxed{3}', True),
    (r'{\boxed{} {1}}', False),
    ('boxed{42}', False),
])
def test_boxed_answers(text, expected):
    assert has_boxed_answer(text) is expected


def naive(text: str, length: int, count: int) -> bool:
    windows = [text[i:i + length] for i in range(len(text) - length + 1)]
    return any(windows.count(w) >= count for w in set(windows))


@given(st.text(alphabet='ab', max_size=80), st.integers(2, 9), st.integers(2, 5))
@settings(max_examples=300, deadline=None)
def test_repetition_is_exact(text, length, count):
    assert has_repetition(text, length, count) is naive(text, length, count)


@given(st.text(alphabet=st.characters(), max_size=60), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_repetition_takes_any_unicode(text, times):
    assert has_repetition((text + '#') * times, len(text) + 1, 2) is (times >= 2)


def test_defaults_find_a_loop_and_not_a_list():
    loop = 'I should check this once more, carefully. ' * 8
    assert check_text(loop, TreeConfig()) is StopReason.REPETITION
    assert check_text(loop, TreeConfig(stop_at_repetition=False)) is None
    assert check_text('\n'.join(f'Step {i}: add {i} and {i * 7}.' for i in range(200)), TreeConfig()) is None


def test_an_answer_comes_first():
    text = 'x' * 400 + r'\boxed{1}'
    assert check_text(text, TreeConfig()) is StopReason.ANSWER
    assert check_text(text, TreeConfig(stop_at_answer=False)) is StopReason.REPETITION


@pytest.mark.parametrize('make', [
    lambda n: '\\boxed{' * n,
    lambda n: '\\boxed{' + '{' * n,
    lambda n: 'ab' * n,
    lambda n: '\\' * n,
])
def test_hostile_text_costs_linear_time(make):
    """Eight times the text may not cost much more than eight times the work (a quadratic check costs 64 times)."""
    def cost(n: int) -> float:
        text = make(n)
        best = float('inf')
        for _ in range(3):
            started = time.process_time()
            has_boxed_answer(text)
            has_repetition(text, 32, 10**9)
            best = min(best, time.process_time() - started)
        return best

    small, large = cost(20_000), cost(160_000)
    assert large < 30 * max(small, 1e-3)


def test_first_stop_string_is_the_one_that_completes_first():
    assert first_stop_string('a<end>b<stop>', ['<stop>', '<end>']) == '<end>'
    assert first_stop_string('abc', ['bc', 'abc']) == 'abc' or first_stop_string('abc', ['bc', 'abc']) == 'bc'
    assert first_stop_string('abc', ['d']) is None
