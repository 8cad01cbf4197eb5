from __future__ import annotations

import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flat import flat
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.policies import repetition
from treepo_swift.core.policies.answers import answer_detectors, register_answer
from treepo_swift.core.policies.repetition import RepetitionDetector
from treepo_swift.core.policies.stopping import (
    TextChecker,
    check_text,
    first_stop_string,
    has_boxed_answer,
    has_repetition,
)
from treepo_swift.core.tree import StopReason


@register_answer('test-final-line')
def ends_with_final_line(text: str) -> bool:
    """A user's rule that can become false again."""
    return text.endswith('FINAL')


@register_answer('test-forgot-return')
def forgot_return(text: str) -> bool:
    text.endswith('FINAL')


def detector(name: str, **options):
    return answer_detectors[name](flat(answer=name, **options))


def run(checker, *pieces: str):
    """The states after each piece."""
    states = [checker.start()]
    for piece in pieces:
        states.append(checker.feed(states[-1], piece))
    return states[1:]


def found_at_each_end(checker, pieces: list[str]) -> list[bool]:
    return [state.found for state in run(checker, *pieces)]


def whole_at_each_end(checker, pieces: list[str]) -> list[bool]:
    return [run(checker, ''.join(pieces[: i + 1]))[-1].found for i in range(len(pieces))]


def in_pieces(tokens: list[str], most: int = 40):
    """Texts made of `tokens`, cut anywhere: also inside a token, and into empty pieces."""

    def cut(text: str):
        return st.lists(st.integers(0, len(text)), max_size=8).map(
            lambda at: [text[begin:end] for begin, end in zip([0, *sorted(at)], [*sorted(at), len(text)], strict=True)]
        )

    return st.lists(st.sampled_from(tokens), max_size=most).map(''.join).flatmap(cut)


BOX_PIECES = in_pieces(['\\boxed{', '\\', 'boxed', '\\box', 'ed{', '{', '}', '\\}', ' ', '\n', 'x'], 14)
TAGS = ('<answer>', '</answer>')
TAG_PIECES = in_pieces([*TAGS, '<', '<answer', '>', '</', 'answer>', ' ', '\n', 'x'], 14)

# Answers


def boxed_by_stack(text: str) -> bool:
    """The definition, with the whole text and a stack at hand."""
    start = text.find('\\boxed{')
    opened: list[int | None] = []
    i = start
    while 0 <= start and i < len(text):
        if text.startswith('\\boxed{', i):
            i += len('\\boxed{')
            opened.append(i)
            continue
        if text[i] == '\\':
            i += 2
            continue
        if text[i] == '{':
            opened.append(None)
        elif text[i] == '}' and opened:
            begin = opened.pop()
            if begin is not None and text[begin:i].strip():
                return True
        i += 1
    return False


@pytest.mark.parametrize(
    'text, expected',
    [
        (r'so \boxed{42}.', True),
        (r'\boxed{\frac{1}{2}}', True),
        (r'\boxed{\frac{1}{2}', False),
        (r'\boxed{', False),
        (r'\boxed{}', False),
        (r'\boxed{  }', False),
        (r'\boxed{ }} 1}', False),
        (r'\boxed{a\}', False),
        (r'\boxed{a\}}', True),
        (r'} } \boxed{1}', True),
        (r'\boxed{ \boxed{3}', True),
        (r'\boxed{ \boxed{} }', True),
        (r'\boxed{{\boxed{}', False),
        (r'{\boxed{} {1}}', False),
        (r'\\boxed{1}', True),
        ('boxed{42}', False),
    ],
)
def test_boxed_answers(text, expected):
    assert has_boxed_answer(text) is expected
    assert found_at_each_end(detector('boxed'), list(text))[-1] is expected
    assert boxed_by_stack(text) is expected


@given(BOX_PIECES)
@settings(max_examples=1000, deadline=None)
def test_boxed_answers_do_not_depend_on_the_pieces(pieces):
    found = found_at_each_end(detector('boxed'), pieces)
    assert found == whole_at_each_end(detector('boxed'), pieces)
    assert found == [boxed_by_stack(''.join(pieces[: i + 1])) for i in range(len(pieces))]


@pytest.mark.parametrize(
    'text, expected',
    [
        ('<answer>42</answer>', True),
        ('<answer>42', False),
        ('42</answer>', False),
        ('</answer>42<answer>', False),
        ('<answer></answer>', False),
        ('<answer> \n</answer> 42</answer>', False),
        ('<answer></answer><answer>42</answer>', True),
        ('<answer><answer></answer>', True),
        ('<answer></answe</answer>', True),
        ('<answer', False),
    ],
)
def test_tagged_answers(text, expected):
    assert detector('tags').feed(detector('tags').start(), text).found is expected
    assert found_at_each_end(detector('tags'), list(text))[-1] is expected


@given(TAG_PIECES, st.sampled_from([TAGS, ('<', '>'), ('x', 'x'), ('<<', '<<>'), ('<answer', 'swer>')]))
@settings(max_examples=1000, deadline=None)
def test_tagged_answers_do_not_depend_on_the_pieces(pieces, tags):
    def by_regex(text: str) -> bool:
        opening, closing = map(re.escape, tags)
        return any(match.strip() for match in re.findall(f'{opening}(.*?){closing}', text, re.DOTALL))

    found = found_at_each_end(detector('tags', answer_tags=tags), pieces)
    assert found == whole_at_each_end(detector('tags', answer_tags=tags), pieces)
    assert found == [by_regex(''.join(pieces[: i + 1])) for i in range(len(pieces))]


def test_a_registered_function_sees_the_whole_text_at_each_piece_and_keeps_its_answer():
    states = run(detector('test-final-line'), 'so FI', 'NAL', ' or not')
    assert [state.found for state in states] == [False, True, True]


def test_a_registered_function_must_say_true_or_false():
    with pytest.raises(TypeError, match="'test-forgot-return' .forgot_return.: returned None, allowed are True and"):
        run(detector('test-forgot-return'), 'text')


def test_an_unknown_answer_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match="stop.answer.detector='boxd': .*allowed are boxed, none, tags"):
        TextChecker(flat(answer='boxd'))


# Repetition


def most_frequent(text: str, length: int) -> int:
    return max(Counter(text[i : i + length] for i in range(len(text) - length + 1)).values(), default=0)


@given(in_pieces(['a', 'b', 'ab', 'aab', 'abab'], 30), st.integers(2, 9), st.integers(2, 5))
@settings(max_examples=1000, deadline=None)
def test_repetition_is_exact_and_does_not_depend_on_the_pieces(pieces, length, count):
    found = found_at_each_end(RepetitionDetector(length, count), pieces)
    assert found == [most_frequent(''.join(pieces[: i + 1]), length) >= count for i in range(len(pieces))]
    assert has_repetition(''.join(pieces), length, count) is found[-1]


@given(st.text(alphabet=st.characters(), max_size=60), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_repetition_takes_any_unicode(text, times):
    assert has_repetition((text + '#') * times, len(text) + 1, 2) is (times >= 2)
    assert has_repetition('\ud800' + 'ab\U0010ffff' * times, 3, 2) is (times >= 2)


def thue_morse(size: int) -> str:
    """On which every polynomial hash modulo 2**64 collides, whatever its base."""
    text = 'a'
    while len(text) < size:
        text += text.translate(str.maketrans('ab', 'ba'))
    return text[:size]


@pytest.mark.parametrize('length', [32, 1024, 2048])
def test_repetition_is_exact_where_hashes_collide(length):
    text = thue_morse(1 << 14)
    most = most_frequent(text, length)
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    for count, expected in ((most, True), (most + 1, False)):
        assert has_repetition(text, length, count) is expected
        assert found_at_each_end(RepetitionDetector(length, count), pieces)[-1] is expected


@given(in_pieces(['a', 'b', 'ab'], 30), st.integers(2, 9), st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_repetition_is_exact_when_every_window_collides(pieces, length, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repetition, '_window_hashes', lambda text, size: np.full(len(text) - size + 1, 7, np.uint64))
        found = found_at_each_end(RepetitionDetector(length, count), pieces)
    assert found == [most_frequent(''.join(pieces[: i + 1]), length) >= count for i in range(len(pieces))]


# Both together


@given(BOX_PIECES, in_pieces(['ab', 'a', 'FINAL', '<answer>x', '</answer>'], 12), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_forks_do_not_influence_each_other(left, right, shared):
    for answer in ('boxed', 'tags', 'none', 'test-final-line'):
        checker = TextChecker(flat(answer=answer, repetition_length=3, repetition_count=3))
        fork = run(checker, '', *left[:shared])[-1]
        before = (fork.answer, fork.repetition)
        one, other = fork, fork
        for i in range(max(len(left), len(right))):
            one, other = checker.feed(one, ''.join(left[i : i + 1])), checker.feed(other, ''.join(right[i : i + 1]))
        for state, pieces in ((one, left), (other, right)):
            alone = run(checker, '', *left[:shared], *pieces)[-1]
            assert (state.answer, state.repetition) == (alone.answer, alone.repetition)
        assert (fork.answer, fork.repetition) == before


def test_what_is_off_is_not_looked_for():
    text = 'x' * 400 + r'\boxed{1}'
    state = run(TextChecker(flat(answer='none', stop_at_repetition=False)), text)[-1]
    assert (state.answer, state.repetition) == (False, False)
    state = run(TextChecker(flat()), text)[-1]
    assert (state.answer, state.repetition) == (True, True)


def test_defaults_find_a_loop_and_not_a_list():
    loop = 'I should check this once more, carefully. ' * 8
    assert check_text(loop, flat()) is StopReason.REPETITION
    assert check_text(loop, flat(stop_at_repetition=False)) is None
    assert check_text('\n'.join(f'Step {i}: add {i} and {i * 7}.' for i in range(200)), flat()) is None


def test_an_answer_comes_first():
    text = 'x' * 400 + r'\boxed{1}'
    assert check_text(text, flat()) is StopReason.ANSWER
    assert check_text(text, flat(answer='none')) is StopReason.REPETITION
    assert check_text('<answer>1</answer>', flat(answer='tags')) is StopReason.ANSWER


# Model output is hostile


@pytest.mark.parametrize('answer', ['boxed', 'tags'])
@pytest.mark.parametrize(
    'make',
    [
        lambda n: '{' * n,
        lambda n: '\\boxed{' * n,
        lambda n: '\\boxed{' + '{' * n,
        lambda n: '\\boxed{}' * n,
        lambda n: '\\boxed{' + ' ' * n,
        lambda n: '\\' * n,
        lambda n: '<answer>' * n,
        lambda n: '<answer></answer>' * n,
        lambda n: '<answer>' + '</answer' * n,
        lambda n: '<answer>' + ' ' * n,
        lambda n: 'a' * n,
    ],
)
def test_hostile_answers_cost_linear_time(answer, make):
    """What is quadratic here would take minutes, whole or in small pieces."""
    text = make(100_000)[:400_000]
    started = time.process_time()
    assert not run(detector(answer), text)[-1].found
    assert not run(detector(answer), *(text[i : i + 16] for i in range(0, len(text), 16)))[-1].found
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    'make, length, count',
    [
        (lambda n: 'a' * n, 32, 90_000),
        (lambda n: 'a' * n, 20_000, 60_000),
        (lambda n: 'ab' * (n // 2), 32, 45_000),
        (thue_morse, 32, 90_000),
        (thue_morse, 2048, 90),
        (lambda n: noise(n // 7) * 7, 32, 8),
        (lambda n: noise(n), 32, 2),
    ],
)
def test_hostile_repetition_costs_linear_time(make, length, count):
    """Ten times the text may not cost much more than ten times the work (what is quadratic costs 100 times)."""

    def cost(n: int) -> float:
        text, fewest = make(n), min(count, n * 9 // 10)
        pieces = [text[i : i + n // 8] for i in range(0, n, n // 8)]
        best = float('inf')
        for _ in range(3):
            started = time.process_time()
            run(RepetitionDetector(length * n // 100_000 if length > 10_000 else length, fewest), *pieces)
            best = min(best, time.process_time() - started)
        return best

    assert cost(100_000) < max(1.0, 50 * cost(10_000))


def noise(size: int) -> str:
    return ''.join(random.Random(7).choices('abcdefgh', k=size))


def test_first_stop_string_is_the_one_that_completes_first():
    assert first_stop_string('a<end>b<stop>', ['<stop>', '<end>']) == '<end>'
    assert first_stop_string('abc', ['bc', 'abc']) == 'abc' or first_stop_string('abc', ['bc', 'abc']) == 'bc'
    assert first_stop_string('abc', ['d']) is None


def test_near_loops_are_found_where_asked():
    steps = ''.join(f'Step {i}: we look at the next case and see that nothing has changed. ' for i in range(60))
    assert check_text(steps, TreeConfig()) is None
    near = TreeConfig(stop={'repetition': {'rule': 'loop', 'near_characters': 2000}})
    assert check_text(steps, near) is StopReason.REPETITION and check_text(steps[:1900], near) is None


def test_a_loop_stops_a_path_and_text_that_repeats_itself_does_not():
    table = '| --- | --- |\n' * 20 + '-' * 39
    assert check_text(table, TreeConfig()) is None
    assert check_text(table, TreeConfig(stop={'repetition': 'windows'})) is StopReason.REPETITION
    assert check_text('Let me think about this again. ' * 17, TreeConfig()) is StopReason.REPETITION
