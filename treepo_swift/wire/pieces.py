"""Texts of a tree's nodes, token by token, in which no character is lost where its bytes lie in several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .record import TreeRecord

BROKEN = '\N{REPLACEMENT CHARACTER}'
LONGEST = 16
"""Tokens after which an incomplete character is taken as it is: a model may sample rubbish without end."""

Decode = Callable[[list[int]], str]
"""A tokenizer's, with special tokens shown and no spaces tidied."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What tokens add to a text that goes on."""

    text: str
    lengths: list[int]
    """Characters of `text` that each token completes."""
    pending: list[int]
    """Tokens at the end whose character is not complete."""


class PieceReader:
    """Decodes tokens one by one, each distinct one once.

    A tokenizer may drop the space before the first word of a text, so tokens are decoded behind an `anchor` (the tokens
    of a plain letter), and its text is taken off again.
    """

    def __init__(self, decode: Decode, anchor: Sequence[int]) -> None:
        self._decode = decode
        self._anchor = list(anchor)
        self._skipped = len(decode(self._anchor))
        self._known: dict[int, str] = {}

    def read(self, token_ids: Sequence[int], pending: Sequence[int] = ()) -> Decoded:
        """`pending` are tokens before these that are part of a character which these complete."""
        parts: list[str] = []
        waiting = list(pending)
        for token in token_ids:
            piece = self._piece(token)
            if waiting or BROKEN in piece:
                waiting.append(token)
                piece = self._behind_anchor(waiting)
                if piece.endswith(BROKEN) and len(waiting) < LONGEST:
                    parts.append('')
                    continue
                waiting = []
            parts.append(piece)
        return Decoded(''.join(parts), [len(part) for part in parts], waiting)

    def rest(self, pending: Sequence[int]) -> str:
        """What is shown for a character that is never completed."""
        return self._behind_anchor(list(pending)) if pending else ''

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._behind_anchor([token])
        return self._known[token]

    def _behind_anchor(self, token_ids: list[int]) -> str:
        return self._decode(self._anchor + token_ids)[self._skipped :]


def write_texts(record: TreeRecord, reader: PieceReader) -> None:
    """Fill `prompt` of a record, and `text` and `pieces` of its nodes. A path's texts join to what its tokens say."""
    prompt = reader.read(record.prompt_tokens)
    record.prompt = prompt.text + reader.rest(prompt.pending)
    inner = {node.parent for node in record.nodes}
    pending: dict[int, list[int]] = {0: []}
    for node in record.nodes:
        decoded = reader.read(node.tokens, pending[node.parent])
        node.text, node.pieces, pending[node.id] = decoded.text, decoded.lengths, decoded.pending
        if decoded.pending and node.id not in inner and node.pieces:
            rest = reader.rest(decoded.pending)
            node.text += rest
            node.pieces[-1] += len(rest)
