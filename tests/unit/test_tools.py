"""The example's tools give right answers to good calls, and short answers at once to everything else."""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / 'examples' / 'tools'))
from agent_tools import Corpus, Tool, calculate, make_tools, parse_call, run_call

DOCUMENTS = [
    'The bridge at Alm was built in 1902.',
    'The mill at Alm grinds rye.',
    'The bridge at Brook has three arches\nand was built in 1911.',
    'Rye and oats grow at Brook.',
]
TOOLS = make_tools(Corpus(DOCUMENTS))

# An expression as its text, its value (None: it has none) and how tightly its outermost operator binds.
Expression = tuple[str, Fraction | None, int]
ATOM, POWER, SIGN = 5, 4, 3
BINARY = {
    '+': (1, lambda a, b: a + b),
    '-': (1, lambda a, b: a - b),
    '*': (2, lambda a, b: a * b),
    '/': (2, lambda a, b: a / b),
    '//': (2, lambda a, b: Fraction(a // b)),
    '%': (2, lambda a, b: a % b),
}
FUNCTIONS = {'sum': sum, 'min': min, 'max': max}


def in_brackets(expression: Expression, binds: int) -> str:
    """Brackets only where they are needed, so that a wrong precedence gives a wrong value."""
    text, _, binding = expression
    return text if binding >= binds else f'({text})'


def within_bounds(value: Fraction | None) -> Fraction | None:
    return None if value is None or abs(value) > 10**30 else value


def binary(operator: str, left: Expression, right: Expression) -> Expression:
    binds, compute = BINARY[operator]
    text = f'{in_brackets(left, binds)} {operator} {in_brackets(right, binds + 1)}'
    if left[1] is None or right[1] is None or (right[1] == 0 and operator in ('/', '//', '%')):
        return text, None, binds
    return text, within_bounds(compute(left[1], right[1])), binds


def power(base: Expression, exponent: Expression) -> Expression:
    """Bases and exponents that are not small are tested by examples: here they become a product."""
    if (
        None in (base[1], exponent[1])
        or exponent[1].denominator != 1
        or abs(exponent[1]) > 9
        or max(map(int.bit_length, base[1].as_integer_ratio())) > 60
    ):
        return binary('*', base, exponent)
    text = f'{in_brackets(base, ATOM)}**{in_brackets(exponent, SIGN)}'
    impossible = base[1] == 0 and exponent[1] < 0
    return text, None if impossible else within_bounds(base[1] ** int(exponent[1])), POWER


def sign(operand: Expression) -> Expression:
    return f'-{in_brackets(operand, SIGN)}', None if operand[1] is None else -operand[1], SIGN


def call(name: str, arguments: list[Expression], as_list: bool) -> Expression:
    text = ', '.join(argument[0] for argument in arguments)
    values = [argument[1] for argument in arguments]
    # A sum is bounded at each step: it is refused as the same sum written with + would be.
    in_bounds = None not in values and None not in map(within_bounds, accumulate(values))
    value = None if None in values or (name == 'sum' and not in_bounds) else Fraction(FUNCTIONS[name](values))
    return f'{name}([{text}])' if as_list else f'{name}({text})', value, ATOM


def rounded(operand: Expression) -> Expression:
    return f'round({operand[0]}, 2)', None if operand[1] is None else round(operand[1], 2), ATOM


numbers = st.one_of(st.integers(0, 20).map(str), st.decimals(0, 99, places=2).map(str))
lists = st.booleans()
expressions = st.recursive(
    numbers.map(lambda text: (text, Fraction(text), ATOM)),
    lambda inner: st.one_of(
        st.builds(binary, st.sampled_from(sorted(BINARY)), inner, inner),
        st.builds(power, inner, inner),
        st.builds(sign, inner),
        st.builds(rounded, inner),
        st.builds(call, st.sampled_from(sorted(FUNCTIONS)), st.lists(inner, min_size=1, max_size=3), lists),
    ),
    max_leaves=12,
)


@given(expressions)
@settings(max_examples=400, deadline=None)
def test_an_expression_has_the_value_that_its_tree_has(expression):
    text, value, _ = expression
    answer = calculate(text)
    if value is None or 0 < abs(value) < Fraction(1, 10**30):
        assert answer.startswith('error: ')
    elif value.denominator == 1:
        assert answer == str(value.numerator)
    else:
        assert abs(Fraction(answer) - value) <= abs(value) / (2 * 10**9)
        assert len(answer.partition('E')[0].replace('.', '').strip('-0')) <= 10


@pytest.mark.parametrize(
    'expression, answer',
    [
        ('1 + 2 * 3', '7'),
        ('10 - 4 - 3', '3'),
        ('2 ** 3 ** 2', '512'),
        ('-2 ** 2', '-4'),
        ('(-2) ** 2', '4'),
        ('2 ** -1', '0.5'),
        ('2 * -3', '-6'),
        ('- - 2', '2'),
        ('-7 // 2', '-4'),
        ('-7 % 3', '2'),
        ('0.1 + 0.2', '0.3'),
        ('6 / 3', '2'),
        ('1/3', '0.3333333333'),
        ('2/3', '0.6666666667'),
        ('.5 + 5.', '5.5'),
        ('1/3 + 1/6', '0.5'),
        ('123456789 + 1/8', '123456789.1'),
        ('1234567890 + 1/2', '1.23456789E+9'),
        ('10**29 + 1/3', '1E+29'),
        ('sum([1, 2.5, -1])', '2.5'),
        ('sum(1, 2)', '3'),
        ('sum([7])', '7'),
        ('min(3, 1 + 1)', '2'),
        ('max([3, 4])', '4'),
        ('abs(-3)', '3'),
        ('round(2.5)', '2'),
        ('round(3.14159, 2)', '3.14'),
        ('round(1250, -2)', '1200'),
        ('10 ** 30', '1' + '0' * 30),
        ('10 ** -30', '0.' + '0' * 29 + '1'),
        ('round((1 + 0.06/12) ** 360, 4)', '6.0226'),
    ],
)
def test_calculate(expression, answer):
    assert calculate(expression) == answer


@pytest.mark.parametrize(
    'expression, message',
    [
        ('', 'unexpected end of the expression; allowed: numbers, '),
        ('1 +', 'unexpected end'),
        ('2 ^ 3', r"unexpected '^'; allowed: numbers, + - * / // % **"),
        ('1,000', "unexpected ','"),
        ('1 2', "unexpected '2'"),
        ('(1', 'unexpected end'),
        ('1)', "unexpected ')'"),
        ('[1]', "unexpected '['"),
        ('abs([1])', "unexpected '['"),
        ('sum()', "unexpected ')'"),
        ('sum([1, 2)', "unexpected ')'"),
        ('sum', 'unexpected end'),
        ('sqrt(2)', "unexpected 'sqrt'; allowed: numbers, "),
        ('abs(1, 2)', 'abs has 2 arguments; allowed: at most 1'),
        ('round(1, 2, 3)', 'round has 3 arguments'),
        ('round(1, 0.5)', 'round takes a whole number of places'),
        ('round(1, 10**9)', 'round takes a whole number of places'),
        ('1 / 0', 'division by zero'),
        ('1 // (2 - 2)', 'division by zero'),
        ('1 % 0', 'division by zero'),
        ('0 ** -1', 'division by zero'),
        ('2 ** 0.5', 'an exponent is not whole'),
        ('1.0001 ** 1000', 'a power is too large or too fine'),
        ('10 ** 31', 'a number is too large; allowed: up to 10**30'),
        ('1' + '0' * 31, 'a number is too large'),
        ('10 ** 30 + 1', 'a number is too large'),
        ('10 ** -31', 'the result is too close to zero'),
        ('\u00b2', r"unexpected '\xb2'"),
        ('\u0661', r"unexpected '\u0661'"),
        ('1 + \ud800', r"unexpected '\ud800'"),
    ],
)
def test_what_has_no_value_says_why(expression, message):
    assert calculate(expression).startswith(f'error: {message}')


HOSTILE = [
    '__import__("os")',
    '9**9**9',
    '(' * 10_000 + ')' * 10_000,
    '(' * 499,
    '-' * 499,
    '1' + '**1' * 166,
    'sum([' * 99,
    '1' * 10**6,
    '9' * 500,
    '((1/9**30)**99)**99',
    'sum(' + ','.join(f'1/({n}**900)' for n in range(11, 49)) + ')',
    '1 ** (10 ** 30)',
    'a' * 500,
    '\x00' * 500,
]


@pytest.mark.parametrize(
    'expression', HOSTILE, ids=lambda expression: expression[:12].encode('unicode_escape').decode()
)
def test_hostile_expressions_are_refused_at_once(expression):
    start = time.process_time()
    answer = calculate(expression)
    assert time.process_time() - start < 0.5
    assert answer.startswith('error: ') and len(answer) < 120


def test_an_expression_may_be_as_long_and_as_deep_as_it_says():
    assert calculate('1' + '+1' * 249) == '250'
    assert calculate(' ' * (500 - 1) + '1') == '1'
    assert calculate(' ' * 500 + '1') == 'error: the expression has 501 characters; allowed: at most 500'
    assert calculate('(' * 63 + '1' + ')' * 63) == '1'
    assert calculate('(' * 64 + '1' + ')' * 64).startswith('error: the expression is nested too deeply')


near_misses = st.text('0123456789.+-*/%()[], sumabxrond')
anything = st.text(st.characters(), max_size=600)


@given(st.one_of(anything, near_misses))
@settings(max_examples=400, deadline=None)
def test_calculate_answers_any_text_with_a_short_text(expression):
    answer = calculate(expression)
    assert len(answer.encode()) < 200
    assert answer.startswith('error: ') or Fraction(answer) is not None


def test_search_ranks_by_the_words_that_are_rare():
    corpus = Corpus(DOCUMENTS)
    assert corpus.search('When was the bridge at Brook built?') == (
        'The bridge at Brook has three arches and was built in 1911.\nThe bridge at Alm was built in 1902.'
    )
    assert corpus.search('OATS', limit=1) == DOCUMENTS[3]
    assert corpus.search('oats') == DOCUMENTS[3]


def test_of_equal_documents_the_first_is_first():
    corpus = Corpus(['a cat sat', 'a dog sat', 'a cat ran', 'cat a sat'])
    assert corpus.search('cat', limit=3) == 'a cat sat\na cat ran\ncat a sat'
    assert corpus.search('cat cat cat a', limit=1) == 'a cat sat'


def test_a_word_weighs_more_in_a_shorter_document_and_where_it_is_repeated():
    assert Corpus(['rye and oats and wheat', 'rye']).search('rye', limit=1) == 'rye'
    assert Corpus(['rye and oats', 'rye and rye']).search('rye', limit=1) == 'rye and rye'


@pytest.mark.parametrize('query', ['', '?!', 'zeppelin', 'x' * 10**6, ' ' * 200 + 'oats'])
def test_nothing_found(query):
    assert Corpus(DOCUMENTS).search(query) == 'nothing found'
    assert Corpus([]).search(query) == Corpus(['', '...']).search(query) == 'nothing found'


@given(anything)
@settings(deadline=None)
def test_search_answers_any_text_with_documents(query):
    lines = {' '.join(document.split()) for document in DOCUMENTS}
    answer = Corpus(DOCUMENTS).search(query).split('\n')
    assert answer == ['nothing found'] or (set(answer) <= lines and len(answer) <= 2)


def tool_call(name: object = 'calculator', arguments: object = None) -> str:
    body = json.dumps({'name': name, 'arguments': {'expression': '1 + 1'} if arguments is None else arguments})
    return f'<tool_call>\n{body}\n</tool_call>'


def test_the_first_call_counts():
    text = f'I will compute that. {tool_call()} and {tool_call("search", {"query": "oats"})}'
    assert parse_call(text) == ('calculator', {'expression': '1 + 1'})
    assert parse_call(tool_call('x', {})) == ('x', {})


@pytest.mark.parametrize('text', ['', 'calculator(1 + 1)', '</tool_call>', '<tool_call', '{"name": "calculator"}'])
def test_a_text_without_a_call(text):
    assert parse_call(text) is None


@pytest.mark.parametrize(
    'text, message',
    [
        ('<tool_call>{"name": "a", "arguments": {}}', 'the call is not closed; write {"name": ...'),
        ('</tool_call><tool_call>', 'the call is not closed'),
        ('<tool_call></tool_call>', 'the call is not valid JSON; write {"name": ...'),
        ("<tool_call>{'name': 'a'}</tool_call>", 'the call is not valid JSON'),
        ('<tool_call>' + tool_call(), 'the call is not valid JSON'),
        ('<tool_call>' + '[' * 2000 + '</tool_call>', 'the call is not valid JSON'),
        # Which error it is depends on how deep the interpreter's stack already is.
        ('<tool_call>' + '[' * 1000 + ']' * 1000 + '</tool_call>', 'the call '),
        ('<tool_call>' + ' ' * (2000 + 1) + '</tool_call>', 'the call has 2001 characters; allowed: at most 2000'),
        ('<tool_call>' + '[' * 10**6 + '</tool_call>', 'the call has 1000000 characters'),
        ('<tool_call>' * 10**5, 'the call is not closed'),
        ('<tool_call>7</tool_call>', 'the call has no "name"'),
        ('<tool_call>{"arguments": {}}</tool_call>', 'the call has no "name"'),
        (tool_call(''), 'the call has no "name"'),
        (tool_call(['calculator']), 'the call has no "name"'),
        (tool_call('calculator', '1 + 1'), '"arguments" is not an object'),
        (tool_call('calculator', ['1 + 1']), '"arguments" is not an object'),
        ('<tool_call>{"name": "calculator"}</tool_call>', '"arguments" is not an object'),
    ],
)
def test_a_malformed_call_says_why(text, message):
    start = time.process_time()
    answer = parse_call(text)
    assert time.process_time() - start < 0.5
    assert isinstance(answer, str) and answer.startswith(f'error: {message}') and len(answer) < 150


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)
names = st.sampled_from(['calculator', 'search']) | values
arguments = st.dictionaries(st.sampled_from(['expression', 'query']) | st.text(), values, max_size=2) | values


@given(
    st.one_of(
        anything, anything.map(lambda body: f'<tool_call>{body}</tool_call>'), st.builds(tool_call, names, arguments)
    )
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_answered_or_has_no_call(text):
    found = parse_call(text)
    if found is None:
        assert '<tool_call>' not in text
    else:
        answer = run_call(found, TOOLS)
        assert answer and len(answer) <= 300 and answer.encode() and '<' not in answer


def test_run_call():
    assert run_call(('calculator', {'expression': '6 * 7'}), TOOLS) == '42'
    assert run_call(('search', {'query': 'oats'}), TOOLS) == DOCUMENTS[3]
    assert run_call('error: the call is not closed', TOOLS) == 'error: the call is not closed'


@pytest.mark.parametrize(
    'call, answer',
    [
        (('browse', {}), "error: there is no tool 'browse'; allowed: calculator, search"),
        (('b\ud800' * 99, {}), "error: there is no tool '" + r'b\ud800' * 10 + " ...'; allowed: calculator, search"),
        (('<tool_call>', {}), r"error: there is no tool '\x3ctool_call>'; allowed: calculator, search"),
        (('search', {}), 'error: search needs query; allowed: query (string)'),
        (
            ('search', {'query': 'oats', 'limit': 10**9}),
            "error: search has no argument 'limit'; allowed: query (string)",
        ),
        (
            ('calculator', {'expression': 7}),
            'error: expression of calculator is not a string; allowed: expression (string)',
        ),
        (
            ('calculator', {'expression': None}),
            'error: expression of calculator is not a string; allowed: expression (string)',
        ),
    ],
)
def test_a_wrong_call_reads_what_is_allowed(call, answer):
    assert run_call(call, TOOLS) == answer


def echo(function) -> dict[str, Tool]:
    schema = {'type': 'object', 'properties': {'text': {'type': 'string'}}, 'required': []}
    return {'echo': Tool('echo', 'Says it again.', schema, function)}


def test_a_long_answer_is_cut_with_a_mark():
    tools = echo(lambda text: text)
    assert run_call(('echo', {'text': 'x' * 20}), tools, max_characters=20) == 'x' * 20
    assert run_call(('echo', {'text': 'x' * 21}), tools, max_characters=20) == 'x' * 16 + ' ...'
    assert run_call('error: ' + 'x' * 30, tools, max_characters=20) == 'error: xxxxxxxxx ...'


def test_an_exception_of_a_tool_is_a_bug_and_is_not_hidden():
    def broken(text: str = '') -> str:
        raise ValueError(text)

    with pytest.raises(ValueError, match='ours'):
        run_call(('echo', {'text': 'ours'}), echo(broken))


def test_the_schema_is_what_a_chat_template_takes():
    assert TOOLS['search'].to_schema() == {
        'type': 'function',
        'function': {
            'name': 'search',
            'description': 'Finds the documents that fit some words best.',
            'parameters': {
                'type': 'object',
                'properties': {'query': {'type': 'string', 'description': 'a few words to look for'}},
                'required': ['query'],
            },
        },
    }
    assert json.loads(json.dumps([tool.to_schema() for tool in TOOLS.values()]))[0]['function']['name'] == 'calculator'
