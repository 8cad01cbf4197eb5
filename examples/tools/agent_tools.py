"""Two tools for a language model, a calculator and a search, and what is needed to call them from its text.

Whatever a model writes is hostile input. Here every step is linear in the length of what it wrote or works on a text
of bounded length, numbers and nesting are bounded, no text is ever run as code, and what goes back is capped. A model
that gets something wrong reads an `error: ...` that says what is allowed; an exception means a bug of ours.

This module needs the standard library only: a reward function may import it in any process.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import reduce
from typing import Any

MAX_EXPRESSION = 500
"""Characters."""
MAX_DEPTH = 64
"""Levels of brackets, signs and right operands. Each is three calls of Python, far below its recursion limit."""
MAX_VALUE = 10**30
"""No value on the way may be larger, and no result may be smaller than its inverse."""
MAX_BITS = 4000
"""Of a numerator or denominator: enough for (1 + 0.06/12) ** 360, and still quick to add and to print."""
MAX_PLACES = 30
"""The second argument of `round`, either way."""
SIGNIFICANT_DIGITS = 10

MAX_QUERY = 200
MAX_CALL = 2000
"""Characters between the tags of a call."""
CUT_MARK = ' ...'

_OPEN, _CLOSE = '<tool_call>', '</tool_call>'
# Without the tags themselves: in what the model reads they would be special tokens, and a call to who parses it again.
_CALL_FORM = '{"name": ..., "arguments": {...}} in tool_call tags'

# --- calculator ---

_ALLOWED = 'allowed: numbers, + - * / // % **, parentheses, sum, min, max, abs, round'

# No two alternatives start with the same character except where the longer one comes first: nothing is read twice.
_TOKEN = re.compile(r'[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\*\*|//|[-+*/%(),\[\]]|[A-Za-z_]+')
_END = 'end of the expression'
_DIGITS = frozenset('.0123456789')


class _Refused(Exception):
    """Says to the model why its expression has no value."""


def calculate(expression: str) -> str:
    """The exact value of an expression in Python's notation; an `error: ...` text where it has none.

    `calculate('1/3 + 1/6')` is `'0.5'`: the arithmetic is in fractions, and only what is printed is rounded.
    """
    try:
        if len(expression) > MAX_EXPRESSION:
            raise _Refused(f'the expression has {len(expression)} characters; allowed: at most {MAX_EXPRESSION}')
        return _to_text(_Expression(expression).value())
    except ZeroDivisionError:
        return 'error: division by zero'
    except _Refused as refused:
        return f'error: {refused}'


class _Expression:
    """A parser by precedence climbing that computes as it goes."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokenize(text)
        self.position = 0
        self.depth = 0

    def value(self) -> Fraction:
        value = self._expression(0)
        self._expect(_END)
        return value

    def _expression(self, precedence: int) -> Fraction:
        """An operand and all operators after it that bind at least as tightly as `precedence`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(f'the expression is nested too deeply; allowed: {MAX_DEPTH} brackets, signs and operators')
        left = self._operand()
        while (token := self.tokens[self.position]) in _OPERATORS and _OPERATORS[token][0] >= precedence:
            self.position += 1
            binds, function = _OPERATORS[token]
            # A power is grouped from the right and takes a sign there; everything else is grouped from the left.
            right = self._expression(_SIGN if token == '**' else binds + 1)
            left = _bounded(Fraction(function(left, right)))
        self.depth -= 1
        return left

    def _operand(self) -> Fraction:
        token = self.tokens[self.position]
        self.position += 1
        if token in ('+', '-'):
            value = self._expression(_SIGN)
            return -value if token == '-' else value
        if token == '(':
            value = self._expression(0)
            self._expect(')')
            return value
        if token in _FUNCTIONS:
            return self._call(token)
        if token[:1] in _DIGITS:
            return _bounded(Fraction(token))
        raise _unexpected(token)

    def _call(self, name: str) -> Fraction:
        most, function = _FUNCTIONS[name]
        self._expect('(')
        has_list = most is None and self._skip('[')
        values = [self._expression(0)]
        while self._skip(','):
            values.append(self._expression(0))
        if has_list:
            self._expect(']')
        self._expect(')')
        if most is not None and len(values) > most:
            raise _Refused(f'{name} has {len(values)} arguments; allowed: at most {most}')
        return _bounded(function(*values))

    def _skip(self, token: str) -> bool:
        found = self.tokens[self.position] == token
        self.position += found
        return found

    def _expect(self, token: str) -> None:
        if not self._skip(token):
            raise _unexpected(self.tokens[self.position])


def _tokenize(text: str) -> list[str]:
    """The tokens and _END, so that a parser may always look at the next one."""
    tokens, position = [], 0
    while position < len(text):
        if text[position] in ' \t\r\n':
            position += 1
        elif match := _TOKEN.match(text, position):
            tokens.append(match.group())
            position = match.end()
        else:
            raise _unexpected(text[position])
    return [*tokens, _END]


def _unexpected(token: str) -> _Refused:
    return _Refused(f'unexpected {token if token == _END else _shown(token)}; {_ALLOWED}')


def _bounded(value: Fraction) -> Fraction:
    """Applied to every value on the way, so that what is computed from two of them is computed quickly."""
    if abs(value) > MAX_VALUE:
        raise _Refused('a number is too large; allowed: up to 10**30')
    if value.denominator.bit_length() > MAX_BITS:
        raise _Refused('a fraction is too fine; round it on the way')
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """The size of a power is known before it is computed: `9 ** 9 ** 9` is refused and not tried."""
    if exponent.denominator != 1:
        raise _Refused('an exponent is not whole; allowed: whole exponents')
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > MAX_BITS:
        raise _Refused('a power is too large or too fine; allowed: up to 10**30')
    return base ** int(exponent)


def _sum(*values: Fraction) -> Fraction:
    # Bounded at each step: a sum of many fine fractions would have a denominator as large as all of theirs together.
    return reduce(lambda total, value: _bounded(total + value), values)


def _round(value: Fraction, places: Fraction = Fraction(0)) -> Fraction:
    if places.denominator != 1 or abs(places) > MAX_PLACES:
        raise _Refused(f'round takes a whole number of places; allowed: {-MAX_PLACES} to {MAX_PLACES}')
    return Fraction(round(value, int(places)))


# As in Python, `-2 ** 2` is -4 and `2 ** -1` is a half: a sign binds less than a power after it, more than one before.
_SIGN = 3
_OPERATORS: dict[str, tuple[int, Callable[[Fraction, Fraction], Fraction | int]]] = {
    '+': (1, operator.add),
    '-': (1, operator.sub),
    '*': (2, operator.mul),
    '/': (2, operator.truediv),
    '//': (2, operator.floordiv),
    '%': (2, operator.mod),
    '**': (4, _power),
}
"""How tightly it binds, and what computes it."""
_FUNCTIONS: dict[str, tuple[int | None, Callable[..., Fraction]]] = {
    'sum': (None, _sum),
    'min': (None, lambda *values: min(values)),
    'max': (None, lambda *values: max(values)),
    'abs': (1, abs),
    'round': (2, _round),
}
"""How many arguments it takes at most (None: any number, or a list), and what computes it."""


def _to_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    if abs(value) * MAX_VALUE < 1:
        raise _Refused('the result is too close to zero; allowed: down to 10**-30')
    quotient = Context(prec=SIGNIFICANT_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    quotient = quotient.normalize()
    # A rounded number must not look like a whole one, so a large one is written as 1.23456789E+10.
    return str(quotient) if quotient.adjusted() >= SIGNIFICANT_DIGITS - 1 else f'{quotient:f}'


def _shown(text: str) -> str:
    """A model's own words in an error: short, without tags, in ASCII (half a surrogate pair can not be sent)."""
    return ascii(text if len(text) <= 20 else f'{text[:20]}{CUT_MARK}').replace('<', '\\x3c')


# --- search ---


class Corpus:
    """Short documents and BM25 over their words.

    A word that stands in n of N documents weighs ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative; a document
    of length l that has it f times scores f (k + 1) / (f + k (1 - b + b l / mean l)) of that weight.
    """

    K = 1.2
    B = 0.75

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = [' '.join(document.split()) for document in documents]
        self._lengths: list[int] = []
        self._found_in: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, document in enumerate(self.documents):
            words = _words(document)
            self._lengths.append(len(words))
            for word, count in Counter(words).items():
                self._found_in[word].append((number, count))
        self._mean_length = sum(self._lengths) / max(1, len(self._lengths))

    def search(self, query: str, limit: int = 2) -> str:
        """The best documents, one a line, the first of equals first; 'nothing found' where no word of it is known."""
        scores: dict[int, float] = defaultdict(float)
        # A word that is repeated counts once. `dict` and not `set`: the order of the additions is part of the result.
        for word in dict.fromkeys(_words(query[:MAX_QUERY])):
            places = self._found_in.get(word, ())
            weight = math.log(1 + (len(self.documents) - len(places) + 0.5) / (len(places) + 0.5))
            for number, count in places:
                length = 1 - self.B + self.B * self._lengths[number] / self._mean_length
                scores[number] += weight * count * (self.K + 1) / (count + self.K * length)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:limit]
        return '\n'.join(self.documents[number] for number in best) or 'nothing found'


def _words(text: str) -> list[str]:
    return re.findall('[a-z0-9]+', text.lower())


# --- calls ---


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    """For the model: when to use it and what it gives."""
    parameters: dict[str, Any]
    """The JSON schema of the arguments, an object with `properties` and `required`."""
    function: Callable[..., str]
    """Called with the arguments by name, which have the names and, for strings, the types of the schema."""

    def to_schema(self) -> dict[str, Any]:
        """One entry of the `tools` column of an ms-swift dataset."""
        function = {'name': self.name, 'description': self.description, 'parameters': self.parameters}
        return {'type': 'function', 'function': function}


def make_tools(corpus: Corpus) -> dict[str, Tool]:
    """By name, as `run_call` takes them. How many documents a search gives is not for the model to choose."""
    tools = (
        Tool(
            'calculator',
            'Computes with exact numbers: + - * / // % ** ( ) sum min max abs round.',
            _one_string('expression', 'for example: (12 + 30) * 4'),
            calculate,
        ),
        Tool(
            'search',
            'Finds the documents that fit some words best.',
            _one_string('query', 'a few words to look for'),
            corpus.search,
        ),
    )
    return {tool.name: tool for tool in tools}


def _one_string(name: str, description: str) -> dict[str, Any]:
    properties = {name: {'type': 'string', 'description': description}}
    return {'type': 'object', 'properties': properties, 'required': [name]}


def parse_call(text: str) -> tuple[str, dict[str, Any]] | str | None:
    """The name and arguments of the first call in a model's text, an `error: ...` if it is malformed, None without one.

    Each tag is looked for once, and only what is short reaches the JSON parser.
    """
    start = text.find(_OPEN)
    if start < 0:
        return None
    start += len(_OPEN)
    end = text.find(_CLOSE, start)
    if end < 0:
        return f'error: the call is not closed; write {_CALL_FORM}'
    if end - start > MAX_CALL:
        return f'error: the call has {end - start} characters; allowed: at most {MAX_CALL}'
    try:
        call = json.loads(text[start:end])
    # A deeply nested text is valid JSON that the parser can not hold.
    except (ValueError, RecursionError):
        return f'error: the call is not valid JSON; write {_CALL_FORM}'
    name = call.get('name') if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        return f'error: the call has no "name"; write {_CALL_FORM}'
    if not isinstance(call.get('arguments'), dict):
        return f'error: "arguments" is not an object; write {_CALL_FORM}'
    return name, call['arguments']


def run_call(call: tuple[str, dict[str, Any]] | str, tools: Mapping[str, Tool], *, max_characters: int = 300) -> str:
    """What the model reads after its call, which is a result of `parse_call`: an error found there is passed on."""
    text = call if isinstance(call, str) else _run(*call, tools)
    return text if len(text) <= max_characters else text[: max_characters - len(CUT_MARK)] + CUT_MARK


def _run(name: str, arguments: dict[str, Any], tools: Mapping[str, Tool]) -> str:
    if name not in tools:
        return f'error: there is no tool {_shown(name)}; allowed: {", ".join(tools)}'
    tool = tools[name]
    properties = tool.parameters['properties']
    allowed = 'allowed: ' + ', '.join(f'{key} ({schema["type"]})' for key, schema in properties.items())
    for key in tool.parameters['required']:
        if key not in arguments:
            return f'error: {name} needs {key}; {allowed}'
    for key, value in arguments.items():
        if key not in properties:
            return f'error: {name} has no argument {_shown(key)}; {allowed}'
        if properties[key]['type'] == 'string' and not isinstance(value, str):
            return f'error: {key} of {name} is not a string; {allowed}'
    return tool.function(**arguments)
