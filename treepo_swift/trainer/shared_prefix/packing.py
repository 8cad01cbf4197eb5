"""Where in a trie each asked log-prob is computed: once for each (parent, token), whatever number of rows ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .trie import Ints, Trie


@dataclass(frozen=True)
class Targets:
    """The log-probs that are computed: E edges of the trie, from U different parents.

    The log-prob of a token is read at its parent. The backward of `gather` sums over the rows that share an edge.
    """

    parents: Ints
    """Positions whose next-token distribution is needed [U], ascending."""
    edge_parents: Ints
    """For each edge, which of `parents` it leaves [E], ascending."""
    edge_tokens: Ints
    """For each edge, the token that follows [E]."""
    gather: Ints
    """For each asked log-prob, row after row, its edge."""


def find_targets(trie: Trie, asked: Sequence[Ints]) -> Targets:
    """`asked` holds, for each row, the places of the tokens whose log-probs are wanted; none is 0, the first token."""
    for places in asked:
        if len(places) and places.min() < 1:
            raise ValueError('The first token of a row has no log-prob: ask for places from 1 on.')
    children = np.concatenate([np.empty(0, np.int64), *(path[at] for path, at in zip(trie.paths, asked, strict=True))])
    before = np.concatenate(
        [np.empty(0, np.int64), *(path[at - 1] for path, at in zip(trie.paths, asked, strict=True))]
    )
    parent_of = np.zeros(len(trie.tokens), np.int64)
    parent_of[children] = before
    wanted = np.unique(children)
    edges = wanted[np.argsort(parent_of[wanted], kind='stable')]
    parents, edge_parents = np.unique(parent_of[edges], return_inverse=True)
    edge_of = np.zeros(len(trie.tokens), np.int64)
    edge_of[edges] = np.arange(len(edges))
    return Targets(parents, edge_parents.reshape(-1), trie.tokens[edges], edge_of[children])
