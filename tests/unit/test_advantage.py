from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_swift.advantage import estimate, register_advantage, whiten

PATHS = [['u', 's1', 's2'], ['u', 's1', 's3'], ['u', 's4', 's5'], ['u', 's4', 's6']]
REWARDS = [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    'options, expected',
    [
        ({}, [0.625, -0.375, -0.125, -0.125]),
        ({'weighting': 'size'}, [2 / 3, -1 / 3, -1 / 6, -1 / 6]),
        ({'reject_flat_subgroups': True}, [0.625, -0.375, -0.25, -0.25]),
        ({'include_root': False}, [0.5, -0.5, 0, 0]),
        ({'include_root': False, 'reject_flat_subgroups': True}, [0.5, -0.5, -0.25, -0.25]),
    ],
)
def test_the_worked_example(options, expected):
    assert estimate(PATHS, REWARDS, **options) == pytest.approx(expected)


def test_a_chain_counts_once_per_segment_or_once():
    paths = [['u', 1, 2, 3], ['u', 1, 2, 4], ['u', 5, 6, 7]]
    rewards = [1.0, 0.0, 0.0]
    root, fork = 1 - 1 / 3, 1 - 1 / 2
    assert estimate(paths, rewards)[0] == pytest.approx((root + fork + fork) / 3)
    assert estimate(paths, rewards, count_chains='per_fork')[0] == pytest.approx((root + fork) / 2)


def test_without_sharing_it_is_plain_grpo():
    rewards = [1.0, 0.0, 0.5, 0.0]
    paths = [['u', i, 10 + i] for i in range(4)]
    mean = statistics.mean(rewards)
    assert estimate(paths, rewards) == pytest.approx([r - mean for r in rewards])


def test_a_tree_of_one_trajectory_has_baseline_zero():
    assert estimate([['u', 1, 2]], [0.7]) == [0.7]


forests = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=4).map(tuple), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 2)),
    min_size=1,
    max_size=24,
)
options = st.fixed_dictionaries(
    {
        'weighting': st.sampled_from(['average', 'size']),
        'reject_flat_subgroups': st.booleans(),
        'include_root': st.booleans(),
        'count_chains': st.sampled_from(['per_depth', 'per_fork']),
    }
)


def build(forest):
    # Node ids are unique in a tree, as the search makes them: a prefix names its node.
    paths = [[tree, *(steps[: k + 1] for k in range(len(steps)))] for steps, _, tree in forest]
    return paths, [reward for _, reward, _ in forest]


@given(forests, options, st.randoms())
@settings(max_examples=150, deadline=None)
def test_order_of_trajectories_changes_nothing(forest, options, rng):
    paths, rewards = build(forest)
    order = list(range(len(paths)))
    rng.shuffle(order)
    shuffled = estimate([paths[i] for i in order], [rewards[i] for i in order], **options)
    assert shuffled == pytest.approx([estimate(paths, rewards, **options)[i] for i in order])


@given(forests, options, st.floats(-5, 5))
@settings(max_examples=150, deadline=None)
def test_adding_a_constant_to_rewards_changes_nothing_where_a_baseline_exists(forest, options, shift):
    paths, rewards = build(forest)
    sizes = {tree: sum(p[0] == tree for p in paths) for tree in {p[0] for p in paths}}
    a, b = estimate(paths, rewards, **options), estimate(paths, [r + shift for r in rewards], **options)
    if options['reject_flat_subgroups'] and len({r + shift for r in rewards}) != len(set(rewards)):
        return  # the shift rounded two rewards into one
    for path, x, y in zip(paths, a, b, strict=True):
        if sizes[path[0]] > 1:
            assert x == pytest.approx(y, abs=1e-9)


@given(forests, options)
@settings(max_examples=100, deadline=None)
def test_rewards_all_alike_give_zeros(forest, options):
    paths, _ = build(forest)
    sizes = {tree: sum(p[0] == tree for p in paths) for tree in {p[0] for p in paths}}
    values = estimate(paths, [0.3] * len(paths), **options)
    assert all(math.isclose(v, 0, abs_tol=1e-12) for p, v in zip(paths, values) if sizes[p[0]] > 1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match='2 paths with 1 rewards'):
        estimate([['u'], ['u']], [1.0])
    with pytest.raises(ValueError, match=r'paths\[0\] is empty'):
        estimate([[]], [1.0])
    with pytest.raises(ValueError, match="Unknown advantage estimator 'nope': allowed are .*treepo"):
        estimate([['u']], [1.0], estimator='nope')
    with pytest.raises(ValueError, match="weighting='max'"):
        estimate([['u']], [1.0], weighting='max')


def test_users_register_their_own():
    @register_advantage('test_twice_the_reward')
    def twice(paths, rewards, **options):
        return [2 * r for r in rewards]

    assert estimate([['u']], [3.0], estimator='test_twice_the_reward') == [6.0]
    with pytest.raises(ValueError, match='registered already'):
        register_advantage('test_twice_the_reward')(lambda paths, rewards, **options: [])


def test_whitening_weighs_by_loss_tokens():
    values, lengths = [1.0, -1.0, 0.5], [3, 1, 4]
    tokens = [v for v, n in zip(values, lengths) for _ in range(n)]
    mean, std = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    assert whiten(values, lengths) == pytest.approx([(v - mean) / std for v in values])
    assert whiten(values, lengths, shift_mean=False) == pytest.approx([(v - mean) / std + mean for v in values])


def test_whitening_of_degenerate_batches():
    assert whiten([0.2, 0.2], [5, 3]) == pytest.approx([0, 0], abs=1e-9)
    assert whiten([1.0, 2.0], [0, 0]) == [0.0, 0.0]
    assert whiten([9.0, 1.0, -1.0], [0, 2, 2])[0] == 0.0
    assert whiten([3.0], [1]) == [0.0]
    with pytest.raises(ValueError, match='2 values with 1 lengths'):
        whiten([1.0, 2.0], [1])


def test_large_batches_do_not_recurse_or_blow_up():
    rng = random.Random(0)
    paths = [[i // 16, *((i // 16, depth, rng.randrange(2 + depth)) for depth in range(14))] for i in range(3200)]
    rewards = [float(rng.random() < 0.5) for _ in paths]
    assert len(estimate(paths, rewards)) == 3200
