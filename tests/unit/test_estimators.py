"""Golden values and laws of every advantage estimator and normalisation."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treepo_swift.advantage import (
    check_estimator,
    estimate,
    estimate_segments,
    is_segment_level,
    normalise,
    register_advantage,
    whiten,
)
from treepo_swift.advantage.batch import tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.core.tree import StopReason
from treepo_swift.wire.report import TreeReport

TRAJECTORY_LEVEL = ['treepo', 'grpo', 'rloo', 'reinforce_plus_plus', 'tree_grpo']
SEGMENT_LEVEL = ['progress', 'spo', 'spo_tree', 'treerl', 'at2po', 'depth_wise', 'rtmc', 'fr3e']
ESTIMATORS = TRAJECTORY_LEVEL + SEGMENT_LEVEL
NORMALISATIONS = ['whiten', 'group', 'none']

#        u (.5)
#       /      \
#   a (1/3)    b (1)
#   /     \       \
# c (.5)  d (0)    e (1)
# /   \
# f 1  g 0
PATHS = [['u', 'a', 'c', 'f'], ['u', 'a', 'c', 'g'], ['u', 'a', 'd'], ['u', 'b', 'e']]
REWARDS = [1.0, 0.0, 0.0, 1.0]
EPS = 1e-4


def flat(segments):
    return [value for values in segments for value in values]


def values_of(estimator, paths, rewards, **options):
    """One list per trajectory, whatever the level."""
    return estimate_segments(paths, rewards, estimator=estimator, **options)


# Golden values.

Z = math.sqrt(1 / 2)  # of two siblings, whose std is their distance / sqrt(2)


def z(distance):
    """z-score of the better of two siblings."""
    return distance / 2 / (distance * Z + EPS)


def test_options_reach_an_estimator_of_ones_own():
    @register_advantage('test-scaled')
    def scaled(paths, rewards, *, factor=1.0):
        return [factor * reward for reward in rewards]

    assert estimate([['u', 1]], [2.0], estimator='test-scaled', options={'factor': 3.0}) == [6.0]
    config = TreeConfig(advantage={'estimator': 'test-scaled', 'options': {'factor': 3.0}, 'normalisation': 'none'})
    report = TreeReport('u', [1], [4], StopReason.EOS, 1)
    assert [a.mean for a in tree_advantages([report], [2.0], [4], config)] == [6.0]


@pytest.mark.parametrize(
    'estimator, expected',
    [
        ('treepo', [(0.5 + 2 / 3 + 0.5) / 3, (-0.5 - 1 / 3 - 0.5) / 3, (-0.5 - 1 / 3) / 2, 0.5]),
        ('grpo', [g / (math.sqrt(1 / 3) + EPS) for g in (0.5, -0.5, -0.5, 0.5)]),
        ('rloo', [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ('reinforce_plus_plus', [0.5, -0.5, -0.5, 0.5]),
        # Below a: rewards 1 0 0 of mean 1/3 and squared gaps 4/9 + 1/9 + 1/9, over 2. b has one trajectory: 0.
        (
            'tree_grpo',
            [
                0.5 / (math.sqrt(1 / 3) + 1e-6) + 2 / 3 / (math.sqrt(1 / 3) + 1e-6),
                -0.5 / (math.sqrt(1 / 3) + 1e-6) - 1 / 3 / (math.sqrt(1 / 3) + 1e-6),
                -0.5 / (math.sqrt(1 / 3) + 1e-6) - 1 / 3 / (math.sqrt(1 / 3) + 1e-6),
                0.5 / (math.sqrt(1 / 3) + 1e-6),
            ],
        ),
    ],
)
def test_golden_values_of_trajectories(estimator, expected):
    assert estimate(PATHS, REWARDS, estimator=estimator) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    'estimator, expected',
    [
        ('progress', [[-1 / 6, 1 / 6, 0.5], [-1 / 6, 1 / 6, -0.5], [-1 / 6, -1 / 3], [0.5, 0]]),
        ('spo', [[-z(2 / 3), z(0.5), z(1)], [-z(2 / 3), z(0.5), -z(1)], [-z(2 / 3), -z(0.5)], [z(2 / 3), 0]]),
        # Averaged child by child: c 1/2, a (1/2 + 0) / 2, b 1, u (1/4 + 1) / 2.
        ('spo_tree', [[-0.375, 0.25, 0.5], [-0.375, 0.25, -0.5], [-0.375, -0.25], [0.375, 0]]),
        # The same less the mean reward 1/2, over the standard deviation 1/2 (of 4, not 3).
        (
            'at2po',
            [[v / (0.5 + 1e-6) for v in row] for row in ([-0.25, 0, 0.5], [-0.25, 0, -0.5], [-0.25, -0.5], [0.5, 0.5])],
        ),
        # The tree's 1/2 with the weight of two: (3 / 3 + 1) / 5 at a, (2 / 2 + 1) / 4 at c, (1 + 1) / 3 at b.
        ('rtmc', [[-1 / 6, 0.1, 0.5], [-1 / 6, 0.1, -0.5], [-1 / 6, -0.4], [0.5, 1 / 3]]),
        # Last forks: c of f and g, a of d alone, u of b-e alone. V(c) is 1/2, and no group with contrast is above it.
        ('fr3e', [[0, 0, 0.5 / math.exp(0.5)], [0, 0, -0.5 / math.exp(0.5)], [0, 0], [0, 0]]),
        # Depth 1: 1/3 and 1. Depth 2: 1/2, 0 and 1, of mean 1/2 and std 1/2. Depth 3: 1 and 0.
        (
            'depth_wise',
            [[-Z, 0, Z], [-Z, 0, -Z], [-Z, -1], [Z, 1]],
        ),
        (
            'treerl',
            [
                [-1 / 3 / math.sqrt(3), 1 / 6 / math.sqrt(2), 1.0],
                [-1 / 3 / math.sqrt(3), 1 / 6 / math.sqrt(2), -1.0],
                [-1 / 3 / math.sqrt(3), -0.5 - 1 / 3],
                [1.0, 0.5],
            ],
        ),
    ],
)
def test_golden_values_of_segments(estimator, expected):
    for mine, theirs in zip(estimate_segments(PATHS, REWARDS, estimator=estimator), expected, strict=True):
        # `depth_wise` adds 1e-8 to its standard deviation.
        assert mine == pytest.approx(theirs, abs=1e-7 if estimator == 'depth_wise' else 1e-12)


def test_tree_grpo_of_one_first_branch_counts_it_twice_and_of_single_ones_once():
    rewards = [1.0, 0.0, 0.0, 1.0]
    chain = [['u', 'a', i] for i in range(4)]
    fan = [['u', i] for i in range(4)]
    one = estimate(fan, rewards, estimator='tree_grpo')
    assert one == pytest.approx([g / (math.sqrt(1 / 3) + 1e-6) for g in (0.5, -0.5, -0.5, 0.5)])
    assert estimate(chain, rewards, estimator='tree_grpo') == pytest.approx([2 * v for v in one])


def test_depths_are_those_of_one_tree_and_a_node_alone_at_its_depth_gets_zero():
    paths = [['u', 1, 2], ['u', 3], ['v', 1], ['v', 3]]
    values = estimate_segments(paths, [1.0, 0.0, 0.0, 2.0], estimator='depth_wise')
    assert flat(values) == pytest.approx([Z, 0, -Z, -Z, Z], abs=1e-7)


def test_fr3e_compares_continuations_of_one_place_and_divides_by_what_the_place_is_better_than_the_last():
    # One answer (a, b, c) of three from the prompt, continued three times behind a and twice behind b.
    paths = [['u', 'a', 'b', 'c'], ['u', 'w'], ['u', 'x', 'y']]
    paths += [['u', 'a', n] for n in 'pqr'] + [['u', 'a', 'b', n] for n in 'st']
    rewards = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    first, behind_a, behind_b = math.exp(1 - 1 / 2), math.exp(1 / 3 - 1 / 2), math.exp(2 / 3 - 1 / 3)
    expected = [
        *([0, 0, 1 / 3 / behind_b], [0.5 / first], [-0.5 / first, -0.5 / first]),
        *([0, 2 / 3 / behind_a], [0, -1 / 3 / behind_a], [0, -1 / 3 / behind_a]),
        *([0, 0, 1 / 3 / behind_b], [0, 0, -2 / 3 / behind_b]),
    ]
    for mine, theirs in zip(estimate_segments(paths, rewards, estimator='fr3e'), expected, strict=True):
        assert mine == pytest.approx(theirs)
    # Where all behind a are right nothing is learned there, and b is compared with the prompt.
    rewards[3:6] = [1.0, 1.0, 1.0]
    found = estimate_segments(paths, rewards, estimator='fr3e')
    assert found[3:6] == [[0, 0]] * 3
    assert found[6][-1] == pytest.approx(1 / 3 / math.exp(2 / 3 - 1 / 2))


def test_fr3e_counts_a_reward_at_the_mean_as_not_above_it():
    paths = [['u', i] for i in range(3)]
    found = estimate_segments(paths, [0.1, 0.2, 0.3], estimator='fr3e')
    assert flat(found) == pytest.approx([-0.1 / math.exp(2 / 3), 0, 0.1 / math.exp(2 / 3)], abs=1e-12)
    rewards = np.asarray([0.0, 0.1, 0.2, 0.7, 0.0], dtype=np.float32).tolist()  # of which 0.2 is a little above
    found = estimate_segments([['u', i] for i in range(5)], rewards, estimator='fr3e')
    assert flat(found)[2:4] == pytest.approx([0, 0.5 / math.exp(4 / 5)])


@pytest.mark.parametrize('estimator', ['spo_tree', 'at2po'])
def test_a_trajectory_that_ends_where_another_goes_on_is_one_more_child(estimator):
    # Two end below 1, one in 1 itself: U(1) is their mean.
    paths = [['u', 1], ['u', 1, 2], ['u', 1, 3], ['u', 4]]
    values = estimate_segments(paths, [1.0, 0.0, 0.0, 0.0], estimator=estimator)
    if estimator == 'spo_tree':
        assert flat(values) == pytest.approx([1 / 6, 1 / 6, -1 / 3, 1 / 6, -1 / 3, -1 / 6])
    else:
        std = math.sqrt(3 / 16) + 1e-6
        assert flat(values) == pytest.approx([v / std for v in (1 / 12, 1 / 12, -0.25, 1 / 12, -0.25, -0.25)])


def test_rtmc_without_a_prior_is_progress_and_reads_it_from_the_config():
    for prior, same in ((0.0, True), (2.0, False), (5.0, False)):
        values = estimate_segments(PATHS, REWARDS, estimator='rtmc', options={'prior': prior})
        assert (flat(values) == pytest.approx(flat(estimate_segments(PATHS, REWARDS)))) is same
    assert estimate_segments(PATHS, REWARDS, estimator='rtmc', options={'prior': 5.0})[2] == pytest.approx(
        [-1 / 6, -(1 + 2.5) / 8]
    )
    with pytest.raises(ValueError, match='prior=-1 of the advantage estimator rtmc'):
        estimate_segments(PATHS, REWARDS, estimator='rtmc', options={'prior': -1})
    report = TreeReport('u', [1], [4], StopReason.EOS, 1)
    config = TreeConfig(advantage={'estimator': 'rtmc', 'options': {'prior': 1.0}, 'normalisation': 'none'})
    assert [a.mean for a in tree_advantages([report, report], [2.0, 1.0], [4, 4], config)] == [0.0, 0.0]


def test_spo_of_three_siblings_counts_each_once():
    paths = [['u', 1, 4], ['u', 1, 5], ['u', 2], ['u', 3]]
    values = [0.75, 0.0, 0.3]  # 1 is the mean of .5 and 1
    mean, std = statistics.mean(values), statistics.stdev(values)
    result = estimate_segments(paths, [0.5, 1.0, 0.0, 0.3], estimator='spo')
    assert [result[i][0] for i in (0, 2, 3)] == pytest.approx([(v - mean) / (std + EPS) for v in values])
    assert result[0][0] == result[1][0]


def test_the_same_id_under_two_parents_is_two_nodes():
    assert estimate_segments([['u', 1, 3], ['u', 2, 3]], [1.0, 0.0]) == [[0.5, 0], [-0.5, 0]]


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_a_tree_of_one_trajectory(estimator):
    reward = 0.7 if estimator == 'treepo' else 0.0
    assert values_of(estimator, [['u', 1, 2]], [0.7]) == [[reward, reward]]
    assert values_of(estimator, [['u']], [0.7]) == [[]]
    for how in NORMALISATIONS[:2]:
        assert normalise([reward, reward], [4, 4], ['u', 'u'], how=how) == [0.0, 0.0]


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_an_empty_batch(estimator):
    assert values_of(estimator, [], []) == []
    for how in NORMALISATIONS:
        assert normalise([], [], [], how=how) == []


# Levels and the registry.


def test_levels():
    assert [is_segment_level(name) for name in ESTIMATORS] == [False] * 5 + [True] * 8
    for name in ESTIMATORS:
        check_estimator(name)
    assert estimate_segments(PATHS, REWARDS, estimator='rloo')[0] == pytest.approx([2 / 3] * 3)
    with pytest.raises(ValueError, match="'progress' gives one value per segment: call estimate_segments"):
        estimate(PATHS, REWARDS, estimator='progress')
    with pytest.raises(ValueError, match="Unknown advantage estimator 'nope': allowed are .*grpo, .*treerl"):
        is_segment_level('nope')
    with pytest.raises(ValueError, match="level='token'.*allowed are trajectory, segment"):
        register_advantage('test_token', level='token')


def test_users_register_segment_estimators():
    @register_advantage('test_depth', level='segment')
    def depth(paths, rewards, **options):
        return [[float(i) for i in range(len(path) - 1)] for path in paths]

    assert estimate_segments(PATHS, REWARDS, estimator='test_depth')[2] == [0, 1]


@pytest.mark.parametrize(
    'name, level, result, message',
    [
        ('test_short', 'trajectory', [1.0], "'test_short' returned 1 results for 4 paths"),
        ('test_lists', 'segment', [[1.0]] * 4, r"'test_lists' returned 1 values for paths\[0\], which has 3 nodes"),
        ('test_nan', 'trajectory', [math.nan] * 4, "'test_nan' returned a value that is not finite"),
    ],
)
def test_a_result_that_does_not_fit_names_its_estimator(name, level, result, message):
    register_advantage(name, level=level)(lambda paths, rewards, **options: result)
    with pytest.raises(ValueError, match=message):
        estimate_segments(PATHS, REWARDS, estimator=name)


@pytest.mark.parametrize('reward', [math.nan, math.inf, -math.inf, None])
def test_a_reward_that_is_not_finite_is_named(reward):
    for call, estimator in ((estimate, 'grpo'), (estimate_segments, 'progress')):
        with pytest.raises(ValueError, match=rf'rewards\[2\] is {reward}'):
            call(PATHS, [1.0, 0.0, reward, math.nan], estimator=estimator)


# Laws.

OPTIONS = st.fixed_dictionaries(
    {
        'weighting': st.sampled_from(['average', 'size']),
        'reject_flat_subgroups': st.booleans(),
        'include_root': st.booleans(),
        'count_chains': st.sampled_from(['per_depth', 'per_fork']),
    }
)
REWARD = st.integers(0, 4).map(lambda n: n / 4)
LAW = settings(max_examples=60, deadline=None)


def forests(max_size=24, trees=3, reward=REWARD):
    """Lists of (steps from the root, reward, tree id); trajectories may share a whole path, or end inside another."""
    steps = st.lists(st.integers(0, 2), max_size=4).map(tuple)
    return st.lists(st.tuples(steps, reward, st.integers(0, trees - 1)), min_size=1, max_size=max_size)


def build(forest):
    return [[tree, *(steps[: k + 1] for k in range(len(steps)))] for steps, _, tree in forest], [
        r for _, r, _ in forest
    ]


def has_baseline(estimator, paths):
    """`treepo` alone compares the only trajectory of a tree with 0."""
    trees = [path[0] for path in paths]
    return [estimator != 'treepo' or trees.count(tree) > 1 for tree in trees]


@pytest.mark.parametrize('estimator', ESTIMATORS)
@given(forest=forests(), options=OPTIONS, shift=st.sampled_from([-3.0, 0.5, 64.0]))
@LAW
def test_adding_a_constant_to_all_rewards_changes_nothing(estimator, forest, options, shift):
    paths, rewards = build(forest)
    before = values_of(estimator, paths, rewards, **options)
    after = values_of(estimator, paths, [r + shift for r in rewards], **options)
    for a, b, based in zip(before, after, has_baseline(estimator, paths), strict=True):
        if based:
            assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@given(forest=forests(), options=OPTIONS, rng=st.randoms(use_true_random=False))
@LAW
def test_order_of_trajectories_and_names_of_nodes_change_nothing(estimator, forest, options, rng):
    paths, rewards = build(forest)
    order = rng.sample(range(len(paths)), len(paths))
    names = {node: f'node {i}' for i, node in enumerate({node for path in paths for node in path})}
    before = values_of(estimator, paths, rewards, **options)
    after = values_of(
        estimator, [[names[node] for node in paths[i]] for i in order], [rewards[i] for i in order], **options
    )
    for i, values in zip(order, after, strict=True):
        assert values == pytest.approx(before[i], abs=1e-9)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@given(forest=forests(), options=OPTIONS)
@LAW
def test_a_gathered_batch_equals_each_tree_alone(estimator, forest, options):
    paths, rewards = build(forest)
    together = values_of(estimator, paths, rewards, **options)
    for tree in {path[0] for path in paths}:
        members = [i for i, path in enumerate(paths) if path[0] == tree]
        alone = values_of(estimator, [paths[i] for i in members], [rewards[i] for i in members], **options)
        for i, values in zip(members, alone, strict=True):
            assert together[i] == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@given(forest=forests(), options=OPTIONS, reward=st.sampled_from([0.0, 0.3, -1.1, 1e6 + 0.1]))
@LAW
def test_a_flat_batch_gives_zeros(estimator, forest, options, reward):
    paths, _ = build(forest)
    assume(all(has_baseline(estimator, paths)))
    segments = values_of(estimator, paths, [reward] * len(paths), **options)
    values, trees = flat(segments), [path[0] for path in paths for _ in path[1:]]
    assert values == [0.0] * len(values)
    for how in NORMALISATIONS:
        assert normalise(values, [3] * len(values), trees, how=how) == [0.0] * len(values)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@given(forest=forests(max_size=8, trees=1, reward=st.integers(0, 10).map(lambda n: n / 10)), options=OPTIONS)
@LAW
def test_float32_rewards_agree(estimator, forest, options):
    paths, rewards = build(forest)
    rounded = np.asarray(rewards, dtype=np.float32).tolist()
    expected = flat(values_of(estimator, paths, rewards, **options))
    assert flat(values_of(estimator, paths, rounded, **options)) == pytest.approx(expected, abs=1e-5)


@given(forest=forests())
@LAW
def test_progress_telescopes(forest):
    paths, rewards = build(forest)
    paths = [[*path, ('leaf', i)] for i, path in enumerate(paths)]
    for path, reward, values in zip(paths, rewards, estimate_segments(paths, rewards), strict=True):
        tree_mean = statistics.mean(r for p, r in zip(paths, rewards) if p[0] == path[0])
        assert math.fsum(values) == pytest.approx(reward - tree_mean, abs=1e-12)


@given(forest=forests(), options=OPTIONS)
@LAW
def test_treepo_equals_its_definition(forest, options):
    """Against the formula written out, subgroup by subgroup."""
    paths, rewards = build(forest)

    def group(path, depth):
        return [r for p, r in zip(paths, rewards) if p[: depth + 1] == path[: depth + 1]]

    expected = []
    for path, reward in zip(paths, rewards):
        groups = [group(path, depth) for depth in range(len(path))]
        used = [
            g
            for above, g in zip(groups, groups[1:])
            if len(g) > 1
            and not (options['reject_flat_subgroups'] and len(set(g)) == 1)
            and not (options['count_chains'] == 'per_fork' and len(g) == len(above))
        ]
        if options['include_root'] or not used:
            used.append(groups[0])
        weights = [len(g) if options['weighting'] == 'size' else 1 for g in used]
        gaps = [reward - (statistics.mean(g) if len(g) > 1 else 0) for g in used]
        expected.append(sum(w * gap for w, gap in zip(weights, gaps)) / sum(weights))
    assert estimate(paths, rewards, **options) == pytest.approx(expected, abs=1e-12)


# Normalisation.


def test_group_divides_by_the_sample_std_of_each_tree():
    values, trees = [1.0, -1.0, 0.5, 3.0, 1.0], ['a', 'a', 'a', 'b', 'b']
    stds = {'a': statistics.stdev(values[:3]), 'b': statistics.stdev(values[3:])}
    expected = [v / (stds[t] + 1e-8) for v, t in zip(values, trees)]
    assert normalise(values, [9, 1, 4, 2, 2], trees, how='group') == pytest.approx(expected)


@pytest.mark.parametrize('how', NORMALISATIONS)
def test_values_without_loss_tokens_get_zero_and_move_nothing(how):
    values, lengths, trees = [1.0, -1.0, 0.5], [2, 3, 4], ['a', 'a', 'b']
    alone = normalise(values, lengths, trees, how=how)
    with_empty = normalise([*values, 100.0, -7.0], [*lengths, 0, 0], [*trees, 'a', 'c'], how=how)
    assert with_empty == pytest.approx([*alone, 0, 0])


def test_group_of_a_tree_without_contrast_is_zero():
    assert normalise([0.7, 0.7 + 1e-15, 5.0], [1, 1, 1], ['a', 'a', 'b'], how='group') == [0.0, 0.0, 0.0]


def test_whiten_and_none():
    values, lengths, trees = [1.0, -1.0, 0.5], [3, 1, 4], ['a', 'a', 'b']
    for shift_mean in (True, False):
        assert normalise(values, lengths, trees, how='whiten', shift_mean=shift_mean) == whiten(
            values, lengths, shift_mean=shift_mean
        )
    assert normalise(values, lengths, trees, how='none') == values


def test_bad_arguments_of_normalise_are_named():
    with pytest.raises(ValueError, match="how='zscore': allowed are whiten, group, none"):
        normalise([1.0], [1], ['a'], how='zscore')
    with pytest.raises(ValueError, match='2 values with 1 lengths and 2 trees'):
        normalise([1.0, 2.0], [1], ['a', 'a'], how='none')


def test_the_snippets_of_the_page_print_what_it_says(capsys):
    page = (Path(__file__).parents[2] / 'docs' / 'estimators.md').read_text()
    snippets = re.findall(r'```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```', page, flags=re.DOTALL)
    assert len(snippets) == page.count('```python') == 2
    for code, printed in snippets:
        exec(code, {})
        assert capsys.readouterr().out == printed
