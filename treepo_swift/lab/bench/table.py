"""Rows of figures as a table that reads well in a terminal and pastes into Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]], *, transpose: bool | None = None) -> str:
    """A Markdown table with a column a key, on its side where that would be too wide or is asked for."""
    head = list(rows[0])
    cells = [head, *([str(row[key]) for key in head] for row in rows)]
    if len(head) > 8 if transpose is None else transpose:
        cells = [list(column) for column in zip(*cells)]
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(values: Sequence[str]) -> str:
        first, *rest = (value.rjust(width) for value, width in zip(values, widths))
        return '| ' + ' | '.join([values[0].ljust(widths[0]), *rest]) + ' |'

    rule = '| ' + ' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]) + ' |'
    return '\n'.join([line(cells[0]), rule, *map(line, cells[1:])])
