"""Text of models and tools can't act on a terminal, pass for a line of ours, or break a log file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.core.failure import MAX_MESSAGE, NodeFailure
from treepo_swift.core.inert import inert, one_line


@pytest.mark.parametrize(
    'text, shown',
    [
        ('\x1b[2J\x1b]0;title\x07', '\\x1b[2J\\x1b]0;title\\x07'),
        ('\x9b31m', '\\x9b31m'),
        ('over\rwritten', 'over\\x0dwritten'),
        ('a\u202etxt.exe', 'a\\u202etxt.exe'),
        ('zero\u200bwidth\ufeff', 'zero\\u200bwidth\\ufeff'),
        ('half \ud800', 'half \\ud800'),
        ('tab\tline\n漢🙂é', 'tab\tline\n漢🙂é'),
    ],
)
def test_what_acts_on_a_terminal_is_written_out(text, shown):
    assert inert(text) == shown


@given(st.text(st.characters(codec=None)))
def test_any_text_becomes_lines_that_print(text):
    shown = inert(text)
    assert inert(shown) == shown
    shown.encode()
    assert all(character.isprintable() or character in '\n\t' or ord(character) >= 160 for character in shown)
    assert len(one_line(text).splitlines()) <= 1


def test_a_failure_is_one_short_line_whatever_it_quotes():
    failure = NodeFailure('tool: ' + '\x1b[31m\n' * 1_000_000, kind='tool\x1braised\nit', remedy='Mend it.')
    assert len(str(failure)) < 6 * MAX_MESSAGE and '\n' not in str(failure) and '\x1b' not in str(failure)
    assert failure.kind == 'tool\\x1braised\\nit' and '6,000,006 characters' in str(failure)
