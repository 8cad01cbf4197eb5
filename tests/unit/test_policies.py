from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import grow, make_search
from tests.flat import flat
from treepo_swift import register_branching, register_fallback
from treepo_swift.config import TreeConfig
from treepo_swift.core.budgets import expected_saving, next_width, paced_width
from treepo_swift.core.policies.branching import (
    BranchContext,
    branching_policies,
    scheduled,
    split_branches,
)
from treepo_swift.core.policies.fallback import candidates, cut_context, cut_policies
from treepo_swift.core.search import Segment
from treepo_swift.core.tree import Path, StopReason, Tree, response_ids


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 10), st.integers(1, 64), st.integers(1, 4))
def test_next_width_never_drops_a_live_path_and_stays_in_the_budget(live, extra, ended, width, divergence):
    finished = max(0, width - live - extra)
    total = next_width(live=live, finished=finished, ended=ended, width=width, divergence=divergence)
    assert total >= live
    assert total <= max(live, width - finished)
    assert total <= max(live, divergence * (live + ended))


def grown(reasons: list[StopReason], depth: int = 3, tokens: int = 1) -> Tree:
    tree = Tree('t', [])
    for reason in reasons:
        node = tree.root
        for _ in range(0 if reason.is_placeholder else depth):
            node = tree.add_node(node, [1] * tokens, [-1.0] * tokens)
        tree.trajectories.append(Path(node, stop=reason))
    return tree


def live_path(*segments: list[float], entropies: list[float] | None = None) -> Path:
    tree = Tree('t', [])
    node = tree.root
    for logprobs in segments:
        node = tree.add_node(node, [1] * len(logprobs), logprobs, entropies)
    return Path(node)


def shares(name: str, live: list[Path], total: int, seed: int = 0, progress: float = 0.0, **config) -> list[int]:
    context = BranchContext(flat(branching=name, **config), random.Random(seed), progress)
    return branching_policies[name](live, total, context)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20), st.integers(0, 40), st.integers(0, 100))
def test_shares_are_largest_remainders_with_one_for_everybody(weights, extra, seed):
    counts = split_branches(weights, len(weights) + extra, random.Random(seed))
    assert sum(counts) == len(weights) + extra and min(counts) >= 1
    for weight, count in zip(weights, counts):
        assert abs(count - 1 - extra * weight / sum(weights)) < 1 + 1e-6
    assert counts == split_branches(weights, len(weights) + extra, random.Random(seed))


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 100))
def test_even_differs_by_one_at_most(live, extra, seed):
    counts = shares('even', [live_path([-1.0])] * live, live + extra, seed)
    assert sum(counts) == live + extra and min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_logprob_favours_by_the_score_that_was_asked_for():
    likely, unlikely = live_path([-0.1] * 4, [-0.1] * 4), live_path([-0.1] * 4, [-3.0] * 4)
    assert shares('logprob', [likely, unlikely], 8, branch_temperature=0.1) == [1, 7]
    assert shares('logprob', [likely, unlikely], 8, branch_temperature=0.1, branch_favour='high') == [7, 1]
    # Sums grow with the length, means do not.
    short, long = live_path([-1.0] * 2), live_path([-1.0] * 20)
    assert shares('logprob', [short, long], 8, branch_temperature=0.1, branch_score='sum') == [1, 7]
    assert shares('logprob', [short, long], 8, branch_temperature=0.1, branch_score='mean') == [4, 4]
    # What happened before the last segment counts in the mean only.
    recovered = live_path([-9.0] * 4, [-0.1] * 4)
    assert shares('logprob', [likely, recovered], 6, branch_temperature=0.1, branch_score='last_segment') == [3, 3]
    assert shares('logprob', [likely, recovered], 6, branch_temperature=0.1, branch_score='mean') == [1, 5]
    # softmax((3 - 0.1) / 2) = 0.81 of the 8 that are left after one each
    assert shares('logprob', [likely, unlikely], 10, branch_temperature=2.0) == [1 + 2, 1 + 6]


def test_a_temperature_schedule_moves_with_the_training():
    paths = [live_path([-0.1] * 4), live_path([-3.0] * 4)]
    pair = {'branch_temperature': (100.0, 0.1)}
    assert shares('logprob', paths, 10, progress=0.0, **pair) == [5, 5]
    assert shares('logprob', paths, 10, progress=1.0, **pair) == [1, 9]
    assert [scheduled((5.0, 1.0), 'linear', p) for p in (0, 0.5, 1, 2)] == [5, 3, 1, 1]
    assert scheduled((5.0, 1.0), 'cosine', 0.25) > 4 > scheduled((5.0, 1.0), 'sinusoid', 0.25)
    assert all(
        math.isclose(scheduled((5.0, 1.0), name, end), 5 - 4 * end) for name in ('cosine', 'sinusoid') for end in (0, 1)
    )


def test_entropy_favours_uncertain_paths_and_needs_an_engine_that_tells():
    sure, unsure = live_path([-1.0] * 4, entropies=[0.1] * 4), live_path([-1.0] * 4, entropies=[3.0] * 4)
    assert shares('entropy', [sure, unsure], 8, branch_temperature=0.1) == [1, 7]
    assert shares('entropy', [sure, unsure], 8, branch_temperature=0.1, branch_favour='high') == [7, 1]
    with pytest.raises(ValueError, match='top-k log-probs'):
        shares('entropy', [live_path([-1.0])], 2)


def test_a_policy_of_ones_own_takes_five_lines():
    @register_branching('test_longest')
    def longest(live, total, context):
        """Everything that is left over goes to the longest path."""
        best = max(range(len(live)), key=lambda i: live[i].leaf.length)
        return [1 + (total - len(live)) * (i == best) for i in range(len(live))]

    try:
        config = flat(segment_length=4, max_depth=3, branching='test_longest')
        assert grow(make_search(config, 8)).done
        branching_policies._entries['test_longest'] = lambda live, total, context: [0] * len(live)
        (error,) = {path.error for path in grow(make_search(config, 8)).tree.trajectories}
        assert error.startswith("branching policy 'test_longest' returned [0, 0] for 2 live paths and 4 branches")
    finally:
        del branching_policies._entries['test_longest']


def test_options_reach_a_policy_of_ones_own():
    @register_branching('test_weighted')
    def weighted(live, total, context):
        favourite = context.config.branching.options['favourite']
        return [1 + (total - len(live)) * (i == favourite) for i in range(len(live))]

    @register_fallback('test_keep')
    def keep(path, context):
        return max(context.low, min(context.config.fallback.options['tokens'], context.high))

    try:
        config = TreeConfig(
            segment_length=4,
            max_depth=3,
            branching={'policy': 'test_weighted', 'options': {'favourite': 1}},
            fallback={'policy': 'test_keep', 'options': {'tokens': 3}, 'candidates': 'any'},
            divergence=1,
        )
        search = grow(make_search(config, 8))
        assert all(path.error is None for path in search.tree.trajectories)
        cuts = [path for path in search.tree.trajectories if path.fallback_from is not None]
        assert cuts and all(any(node.length == 3 for node in path.leaf.lineage()) for path in cuts)
        with pytest.raises(KeyError, match='favourite'):
            weighted([1, 2], 4, BranchContext(config.replace(branching={'policy': 'test_weighted'}), random.Random(0)))
    finally:
        del branching_policies._entries['test_weighted'], cut_policies._entries['test_keep']


@pytest.mark.parametrize('kind', ['branching', 'fallback'])
def test_a_policy_that_raises_fails_its_tree_and_is_named(kind):
    registry = branching_policies if kind == 'branching' else cut_policies

    @registry.register('test_raises')
    def raises(paths, *context):
        raise ZeroDivisionError('by nothing')

    try:
        divergence = 1 if kind == 'fallback' else 2
        config = TreeConfig(segment_length=4, max_depth=3, divergence=divergence, **{kind: 'test_raises'})
        search = grow(make_search(config, 8))
        failed = [path for path in search.tree.trajectories if path.stop is StopReason.FAILED]
        assert search.done and failed
        assert all("'test_raises' raised ZeroDivisionError: by nothing" in path.error for path in failed)
    finally:
        del registry._entries['test_raises']


def test_pacing_spreads_the_forks_and_says_what_it_saves():
    eager, even = flat(), flat(pacing='even')
    assert [paced_width(even, width=16, depth=d, first=2) for d in (1, 2, 8, 14)] == [2, 3, 10, 16]
    steps = flat(pacing={3: 4, 6: 16})
    assert [paced_width(steps, width=16, depth=d, first=2) for d in (1, 2, 3, 5, 6, 14)] == [16, 16, 4, 4, 16, 16]
    # Levels of 2, 4, 8, then eleven times 16: 190 of 224 segments.
    assert expected_saving(eager, 16) == pytest.approx(1 - 190 / 224)
    assert expected_saving(even, 16) == pytest.approx(1 - 126 / 224, abs=0.01)


@pytest.mark.parametrize(
    'config',
    [
        flat(segment_length=4, max_depth=6),
        flat(segment_length=4, max_depth=6, pacing='even'),
        flat(segment_length=4, max_depth=6, pacing={1: 1, 3: 5}, root_divergence=4),
        flat(segment_length=4, max_depth=6, divergence=3, root_divergence=1),
        flat(segment_length=4, max_depth=3, divergence=1, root_divergence=3),
    ],
)
def test_the_expected_saving_is_what_full_length_paths_save(config):
    search = grow(make_search(config, 16), answer=lambda r: Segment([7] * r.max_tokens, [0.0] * r.max_tokens))
    stats = search.tree.stats
    assert expected_saving(config, 16) == pytest.approx(1 - stats.decoded_tokens / stats.trajectory_tokens)


@given(
    st.lists(st.sampled_from(list(StopReason)), max_size=8),
    st.sampled_from(['answer_or_eos', 'finished', 'best_reason_first', 'lowest_reward_first', 'any']),
    st.integers(0, 50),
)
def test_candidates_are_those_that_the_config_names(reasons, which, seed):
    chosen = candidates(grown(reasons).trajectories, flat(fallback_candidates=which), random.Random(seed))
    allowed = {'answer_or_eos': {'answer', 'eos'}, 'finished': {'answer', 'eos', 'stop_string', 'hook'}}.get(
        which, {reason.value for reason in StopReason if not reason.is_placeholder}
    )
    assert sorted(chosen) == [i for i, reason in enumerate(reasons) if reason.value in allowed]
    if which == 'best_reason_first':
        ranks = [list(StopReason).index(reasons[i]) for i in chosen]
        assert ranks == sorted(ranks)


def test_the_lowest_reward_is_cut_first_and_an_unknown_one_last():
    tree = grown([StopReason.EOS] * 5)
    for path, reward in zip(tree.trajectories, [1.0, None, 0.0, 0.5, 0.0]):
        path.reward = reward
    orders = [
        candidates(tree.trajectories, flat(fallback_candidates='lowest_reward_first'), random.Random(seed))
        for seed in range(20)
    ]
    assert {tuple(order[2:]) for order in orders} == {(3, 0, 1)}
    assert {tuple(order[:2]) for order in orders} == {(2, 4), (4, 2)}


def cuts(name: str, path: Path, count: int = 1, **config) -> Counter:
    settings = flat(fallback=name, **{'max_depth': 10, **config})
    rng = random.Random(0)
    return Counter(cut_policies[name](path, cut_context(path, settings, rng)) for _ in range(count))


def test_cuts_are_where_their_names_say():
    path = live_path([-1.0] * 4, [-1.0, -1.0, -5.0, -1.0], [-1.0] * 4)
    even = cuts('random_segment', path, 3000)
    assert set(even) == {0, 4, 8} and all(abs(n - 1000) < 150 for n in even.values())
    assert set(cuts('random_token', path, 3000)) == set(range(12))
    assert set(cuts('min_logprob_segment', path, 10)) == {4}
    assert set(cuts('random_block', path, 300, fallback_block=3)) == {0, 3, 6, 9}
    assert set(cuts('min_logprob_token', path, 10)) == {6}
    blocks = cuts('logprob_block', path, 3000, fallback_block=4)
    # Mean log-probs -1, -2, -1: weights 1, e, 1.
    assert set(blocks) == {0, 4, 8} and abs(blocks[4] / 3000 - math.e / (2 + math.e)) < 0.05
    other = cuts('logprob_block', path, 3000, fallback_block=4, fallback_favour='high')
    assert abs(other[4] / 3000 - 1 / (1 + 2 * math.e)) < 0.05


def test_several_cuts_are_before_several_tokens():
    path = live_path([-1.0, -2.0, -5.0, -4.0], entropies=[0.1, 0.4, 0.2, 0.3])
    for name, expected in (('min_logprob_token', [2, 3, 1, 0, 2]), ('max_entropy_token', [1, 3, 2, 0, 1])):
        taken: list[int] = []
        for _ in range(5):
            taken.append(cut_policies[name](path, cut_context(path, flat(max_depth=9), random.Random(0), taken)))
        assert taken == expected, name
    with pytest.raises(ValueError, match='top-k log-probs'):
        cuts('max_entropy_token', live_path([-1.0]))


def test_the_least_certain_segment_is_a_turn_where_only_turns_fork():
    tree = Tree('t', [])
    node = tree.add_node(tree.root, [1, 2], [-1.0, -4.0])
    node = tree.add_environment(node, [9], None)
    turn = tree.add_node(node, [3, 4], [-2.0, -2.0])
    path = Path(tree.add_node(turn, [5], [-6.0]))
    taken: list[int] = []
    for fork_at in ('turn', 'both'):
        context = cut_context(path, TreeConfig(fork_at=fork_at, max_depth=9), random.Random(0))
        taken.append(cut_policies['min_logprob_segment'](path, context))
    # Turns: means of -2.5 and -10 / 3. Segments: -2.5, -2 and -6.
    assert taken == [3, 5]
    config = TreeConfig(fork_at='turn', max_depth=9)
    context = cut_context(path, config, random.Random(0), [3])
    assert cut_policies['min_logprob_segment'](path, context) == 0


def test_finished_chains_are_expanded_at_their_least_certain_tokens():
    """TreeRL's rounds: m chains, the n most surprising tokens of each, t branches at each of these."""
    m, n, t = 3, 2, 2
    config = TreeConfig(
        segment_length=8,
        max_depth=2,
        root_divergence=m,
        pacing={1: m},
        divergence=t,
        fallback={'policy': 'min_logprob_token', 'candidates': 'any', 'cuts': n},
        stop={'answer': 'none', 'repetition': 'none'},
    )
    values = {
        1: [-1, -9, -1, -8, -1, -1, -1, -1],
        2: [-1, -1, -7, -1, -9, -1, -1, -1],
        3: [-9, -1, -1, -1, -8, -1, -1, -1],
    }
    search = make_search(config, m + m * n * t)
    started = {}

    def answer(request):
        started[request.path_id] = response_ids(request.prefix)
        values_of = values.get(request.path_id, [-1.0] * 8)
        return Segment([10 * request.path_id + i for i in range(8)], [float(v) for v in values_of], StopReason.EOS)

    grow(search, answer=answer)
    assert search.tree.stats.fallbacks == m * n * t and search.tree.stats.forks == m - 1
    prefixes = Counter(tuple(ids) for path_id, ids in started.items() if path_id > m)
    expected = [(10,), (10, 11, 12), (20, 21), (20, 21, 22, 23), (), (30, 31, 32, 33)]
    assert prefixes == dict.fromkeys(expected, t)


def test_windows_and_depths_bound_every_cut():
    path = live_path([-1.0] * 4, [-5.0] * 4, [-1.0] * 4, entropies=[1.0, 2.0, 4.0, 3.0])
    for name in cut_policies:
        assert min(cuts(name, path, 300, fallback_window=1, fallback_block=3)) >= 8, name
        assert min(cuts(name, path, 300, fallback_window=2, fallback_block=3)) >= 4, name
        # A branch from inside the last segment that fits would have no depth left to grow.
        assert max(cuts(name, path, 300, max_depth=3, fallback_block=3)) <= 8, name


def test_a_cut_inside_a_segment_splits_it():
    tree = Tree('t', [])
    first = tree.add_node(tree.root, [1, 2, 3, 4], [-1.0, -2.0, -3.0, -4.0], [0.1, 0.2, 0.3, 0.4])
    path, other = Path(tree.add_node(first, [5, 6], [0.0, 0.0])), Path(first)
    upper = tree.node_at(path, 1)
    assert tree.node_at(path, 4) is first and tree.node_at(path, 0) is tree.root
    assert response_ids(path.leaf) == [1, 2, 3, 4, 5, 6] and other.leaf.lineage() == [upper, first]
    assert (list(upper.token_ids), list(upper.logprobs), upper.entropies) == ([1], [-1.0], [0.1])
    assert list(first.token_ids) == [2, 3, 4] and list(first.logprobs) == [-2.0, -3.0, -4.0]
    assert first.entropies == [0.2, 0.3, 0.4]
    assert upper.depth == first.depth == 1 and (upper.length, first.length) == (1, 4)
    for index, trajectory in enumerate((other, path)):
        tree.add_trajectory(trajectory, last=index == 1)
    assert [node.id for node in path.leaf.lineage()] == [1, 2, 3]


def test_unknown_policies_are_named():
    with pytest.raises(ValueError, match="Unknown branching policy 'odd': allowed are entropy, even, logprob"):
        make_search(flat(branching='odd'), 2)
    with pytest.raises(ValueError, match="Unknown fallback 'odd': allowed are .*random_token"):
        make_search(flat(fallback='odd'), 2)


def test_without_fallback_a_tree_is_filled_as_the_config_says():
    def one_path(**config):
        return grow(make_search(flat(segment_length=4, max_depth=1, root_divergence=1, **config), 5)).tree

    stops = [path.stop for path in one_path(fallback='none').trajectories]
    assert stops[1:] == [StopReason.ABSENT] * 4 and not stops[0].is_placeholder
    tree = one_path(fallback='none', fallback_fill='root')
    assert [path.fallback_from for path in tree.trajectories] == [None, -1, -1, -1, -1]
    assert tree.stats.engine_requests == 5
