"""pass@k, majority vote and the tokens of subsets: against numbers worked by hand and against brute force."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.lab.sampling.estimates import (
    chance_to_hit,
    majority_vote,
    pass_at_k,
    powers_of_two,
    union_tokens,
)
from treepo_swift.lab.sampling.judging import boxed


def test_pass_at_k_by_hand():
    # 4 answers, 1 right: a pair holds it in 3 of 6 cases.
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 1, 4) == 1
    # 5 answers, 2 right, k = 2: 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10.
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 4, 2) == 1


@pytest.mark.parametrize('answers, right, k', [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_impossible_counts_are_refused(answers, right, k):
    with pytest.raises(ValueError, match=f'total={answers}, marked={right}, drawn={k}'):
        chance_to_hit(answers, right, k)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = [any(chosen) for chosen in combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(float(Fraction(sum(subsets), len(subsets))))


def test_union_tokens_by_hand():
    # A trunk of 10 tokens under both answers, and 4 and 6 of their own: one takes 15 in the mean, both 20.
    nodes = [(10, 2), (4, 1), (6, 1)]
    assert union_tokens(nodes, 2, 1) == 15 and union_tokens(nodes, 2, 2) == 20
    # Without sharing it is k times the mean length.
    assert union_tokens([(4, 1), (6, 1), (8, 1)], 3, 2) == pytest.approx(12)


@st.composite
def trees(draw):
    """Nodes as (parent, tokens), the first under the root (0), and the leaf of each answer."""
    parents, tokens = [None], [0]
    for node in range(1, draw(st.integers(2, 10))):
        parents.append(draw(st.integers(0, node - 1)))
        tokens.append(draw(st.integers(0, 9)))
    ends = [node for node in range(1, len(parents)) if node not in parents]
    return parents, tokens, ends


@given(trees(), st.data())
def test_union_tokens_is_the_mean_over_all_subsets_of_leaves(tree, data):
    parents, tokens, leaves = tree
    k = data.draw(st.integers(1, len(leaves)))

    def path(node):
        return set() if not node else {node} | path(parents[node])

    sums = [sum(tokens[n] for n in set().union(*map(path, chosen))) for chosen in combinations(leaves, k)]
    nodes = [(tokens[n], sum(n in path(leaf) for leaf in leaves)) for n in range(1, len(parents))]
    assert union_tokens(nodes, len(leaves), k) == pytest.approx(sum(sums) / len(sums))


def test_majority_vote_by_hand():
    votes, right = ['7', '7', '8', None], [True, True, False, False]
    assert majority_vote(votes, right, 1, seed='0') == 0.5
    # Of all four, two say 7.
    assert majority_vote(votes, right, 4, seed='0') == 1
    # Of three: {7,7,8} and {7,7,None} are right; {7,8,None}, twice, is a tie that the first drawn wins: 1/2.
    assert majority_vote(votes, right, 3, seed='0') == pytest.approx(0.75, abs=0.05)
    assert majority_vote([None, None], [True, True], 2, seed='0') == 0
    with pytest.raises(ValueError, match='3 votes, 2 judged, k=1'):
        majority_vote(['1', '1', '1'], [True, True], 1, seed='0')
    with pytest.raises(ValueError, match='k=3'):
        majority_vote(['1', '1'], [True, True], 3, seed='0')


@given(st.lists(st.sampled_from(['a', 'b', 'c', None]), min_size=1, max_size=5), st.data())
def test_majority_vote_is_near_the_mean_over_all_orders(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    right = [vote == 'a' for vote in votes]
    won = []
    for chosen in permutations(votes, k):
        said = [vote for vote in chosen if vote is not None]
        most = max(map(said.count, said), default=0)
        won.append(bool(said) and next(vote for vote in said if said.count(vote) == most) == 'a')
    # Five standard errors of 1,000 draws.
    assert majority_vote(votes, right, k, seed='0') == pytest.approx(sum(won) / len(won), abs=0.08)


def test_the_same_seed_draws_the_same():
    votes, right = ['1', '2', '3', '1', None], [True, False, False, True, False]
    assert majority_vote(votes, right, 3, seed='5') == majority_vote(votes, right, 3, seed='5')
    assert len({majority_vote(votes, right, 3, seed=str(seed)) for seed in range(8)}) > 1


def test_the_ks_of_a_curve():
    assert powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(6) == [1, 2, 4, 6]


@pytest.mark.parametrize(
    'text, content',
    [
        (r'so \boxed{7}', '7'),
        (r'\boxed{1} no, \boxed{ 2 } it is', '2'),
        (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
        (r'\boxed{1} and \boxed{2', '1'),
        (r'\boxed{1}} and {x}', '1'),
        (r'\boxed{3} then \boxed{}', '3'),
        (r'\boxed{\boxed{4}}', '4'),
        ('boxed{5} {6}', None),
        ('}' * 1000 + '{' * 1000, None),
        ('', None),
    ],
)
def test_the_last_box_counts(text, content):
    assert boxed(text) == content
