"""How long tests that make up their own input look for trouble: `FUZZ=20` twenty times as long as CI."""

from __future__ import annotations

import os

from hypothesis import settings


def examples(count: int) -> settings:
    """`count` examples in CI."""
    return settings(max_examples=round(count * float(os.environ.get('FUZZ', '1'))))
