"""`NodeFailure`: what goes wrong with a node, a path or a tree, and is grown around."""

from __future__ import annotations

from .inert import one_line

MAX_MESSAGE = 500
"""Characters of a failure's message that are kept: exceptions of tools and hooks may quote megabytes of model text."""


class NodeFailure(RuntimeError):
    """Says whose it is and what happened, in one line that is harmless in a log. It never ends a batch by itself."""

    def __init__(self, message: str, *, kind: str, remedy: str) -> None:
        """`kind` is what failures have in common that are counted together, and begins with their owner. `remedy` says
        in a sentence what the user can do."""
        super().__init__(one_line(message, MAX_MESSAGE))
        self.kind = one_line(kind, MAX_MESSAGE)
        self.remedy = remedy
