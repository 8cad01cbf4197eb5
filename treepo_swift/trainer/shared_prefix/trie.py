"""Rows of token ids as one trie: every shared prefix once, depth-first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Chain:
    """Tokens that a row adds to the rows sorted before it. Each of them sees its row's path up to itself."""

    start: int
    """Position of its first token in the packed order."""
    depth: int
    """Depth of that token: so many tokens of the path come before it."""
    path: Ints
    """Positions of all tokens of the row."""

    @property
    def length(self) -> int:
        return len(self.path) - self.depth


@dataclass(frozen=True)
class Trie:
    """What rows have in common, once. T tokens in depth-first order; a token's parent is always before it.

    Rows with different first tokens are different trees. A row without tokens has an empty path.
    """

    tokens: Ints
    """Token ids [T]."""
    depths: Ints
    """Place of each token in its rows [T], from 0: its position id."""
    paths: tuple[Ints, ...]
    """For each row, in the order given, the positions of its tokens."""
    chains: tuple[Chain, ...]
    """In packed order; together they hold every position once."""

    @property
    def row_tokens(self) -> int:
        return sum(map(len, self.paths))

    @property
    def pairs(self) -> int:
        """Query-key pairs of attention, computed chain by chain with the whole path as keys."""
        return sum(chain.length * len(chain.path) for chain in self.chains)

    @property
    def ratio(self) -> float:
        """Row tokens per token of the trie; 1 where nothing is shared."""
        return self.row_tokens / max(len(self.tokens), 1)


def build_trie(rows: Sequence[Sequence[int] | Ints]) -> Trie:
    """Merge equal prefixes of `rows`, whose token ids are not negative.

    Sorted rows share most with their neighbour, so each adds what follows the prefix that it has in common with the
    row before it. Big-endian bytes sort as the token ids do.
    """
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    order = sorted(range(len(arrays)), key=[array.astype('>u4').tobytes() for array in arrays].__getitem__)
    paths: list[Ints] = [np.empty(0, np.int64)] * len(arrays)
    tokens: list[Ints] = []
    depths: list[Ints] = []
    chains: list[Chain] = []
    row, path, size = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for index in order:
        before, row = row, arrays[index]
        shared = _common_prefix(before, row)
        added = len(row) - shared
        path = np.concatenate((path[:shared], np.arange(size, size + added)))
        paths[index] = path
        if added:
            chains.append(Chain(start=size, depth=shared, path=path))
            tokens.append(row[shared:])
            depths.append(np.arange(shared, len(row)))
            size += added
    empty = np.empty(0, np.int64)
    return Trie(np.concatenate([empty, *tokens]), np.concatenate([empty, *depths]), tuple(paths), tuple(chains))


def lay_out_rows(rows: Sequence[Sequence[int] | Ints]) -> Trie:
    """Rows one after the other, nothing merged, for comparison: what a batch without padding computes."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    starts = np.cumsum([0, *map(len, arrays)])
    paths = tuple(np.arange(start, start + len(array)) for start, array in zip(starts, arrays))
    empty = np.empty(0, np.int64)
    return Trie(
        np.concatenate([empty, *arrays]),
        np.concatenate([empty, *(np.arange(len(array)) for array in arrays)]),
        paths,
        tuple(Chain(start=int(path[0]), depth=0, path=path) for path in paths if len(path)),
    )


def _common_prefix(a: Ints, b: Ints) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length
