"""What k of a prompt's n answers are worth, and what they cost: plain arithmetic over one group of answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb

RESAMPLES = 1000


def chance_to_hit(total: int, marked: int, drawn: int) -> float:
    """Chance that `drawn` of `total` things, drawn without replacement, hold at least one of the `marked` ones.

    ``1 - C(total - marked, drawn) / C(total, drawn)``. Raises ``ValueError`` unless ``0 <= marked <= total`` and
    ``1 <= drawn <= total``.
    """
    if not 0 <= marked <= total or not 1 <= drawn <= total:
        raise ValueError(f'total={total}, marked={marked}, drawn={drawn}: must be 0 <= marked and 1 <= drawn <= total')
    return 1 - comb(total - marked, drawn) / comb(total, drawn)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The unbiased estimator of pass@k from `answers` answers of which `right` are right.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv 2107.03374, Eq. 1): the chance that k of the n answers hold a
    right one. It is unbiased for k fresh answers where the n are independent. Answers of one tree are not: there it is
    exactly what a subset of k leaves of this tree gives, in the mean over all subsets.
    """
    return chance_to_hit(answers, right, k)


def union_tokens(nodes: Iterable[tuple[int, int]], answers: int, k: int) -> float:
    """Tokens that k of a tree's answers take, in the mean over all subsets of k: those of the union of their nodes.

    `nodes` are pairs: a node's sampled tokens, and how many of the `answers` lie through it. A node counts once however
    many of the k it carries, so with k = `answers` this is the sum over all nodes, and without sharing it is k times
    the mean length. The mean over all C(n, k) subsets is exact: a node is in the union with `chance_to_hit`.
    """
    return sum(tokens * chance_to_hit(answers, through, k) for tokens, through in nodes)


def majority_vote(
    votes: Sequence[str | None], right: Sequence[bool], k: int, *, seed: str, resamples: int = RESAMPLES
) -> float:
    """Chance that the most frequent answer among k of the answers is right, over seeded resamples.

    Each resample draws k answers without replacement. An answer without a vote (None) takes part in the draw and says
    nothing; where nobody votes, the result is wrong. Of answers that are equally frequent the one that was drawn first
    wins. The winner is right where the first drawn answer that says so is. With k = n all resamples are the same but
    for ties.

    Raises:
        ValueError: lengths differ, or k is not 1 to n.
    """
    if len(votes) != len(right) or not 1 <= k <= len(votes):
        raise ValueError(f'{len(votes)} votes, {len(right)} judged, k={k}: lengths must agree, and k be 1 to n')
    if k == 1:
        return sum(ok for vote, ok in zip(votes, right, strict=True) if vote is not None) / len(votes)
    dice, everyone = random.Random(f'{seed} {k}'), range(len(votes))
    return sum(_is_right(votes, right, dice.sample(everyone, k)) for _ in range(resamples)) / resamples


def _is_right(votes: Sequence[str | None], right: Sequence[bool], drawn: Sequence[int]) -> bool:
    # A Counter keeps the order of first sight, and `max` takes the first of equals.
    counted = Counter(vote for index in drawn if (vote := votes[index]) is not None)
    if not counted:
        return False
    winner = max(counted, key=counted.__getitem__)
    return right[next(index for index in drawn if votes[index] == winner)]


def powers_of_two(width: int) -> list[int]:
    """1, 2, 4, ... up to `width`, and `width` itself: the k of a curve."""
    return sorted({*(1 << power for power in range(width.bit_length()) if 1 << power <= width), width})
