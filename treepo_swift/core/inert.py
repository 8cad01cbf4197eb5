"""Text that a model, a tool or somebody's code wrote, made harmless for terminals and log files."""

from __future__ import annotations

import re

_ACTIVE = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]'
)
"""Control characters but for tab and line feed; marks that hide text or turn its direction; halves of surrogate pairs,
which no file takes as UTF-8."""


def inert(text: str) -> str:
    r"""`text` with all that a terminal acts on written out: an escape becomes the four characters ``\x1b``.

    Tabs and line breaks stay. Every log line and report that may hold text of a model goes through here or through
    `one_line`. Linear in the text.
    """
    return _ACTIVE.sub(lambda found: _written_out(found[0]), text)


def one_line(text: str, most: int | None = None) -> str:
    r"""`inert` text on one line, so that it can't pass for a line of ours; cut after about `most` characters."""
    if most is not None and len(text) > most:
        text = f'{text[:most]}... ({len(text):,} characters)'
    return inert(text).replace('\n', '\\n').replace('\t', '\\t')


def _written_out(character: str) -> str:
    return f'\\x{ord(character):02x}' if ord(character) < 256 else f'\\u{ord(character):04x}'
