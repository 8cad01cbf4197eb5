"""Laws of the tree search, over random configurations, widths and engine outputs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import EOS, grow, make_search, sample, segment_of
from tests.flat import flat
from treepo_swift.config import TreeConfig
from treepo_swift.core.policies.branching import branching_policies
from treepo_swift.core.policies.fallback import cut_policies
from treepo_swift.core.policies.fork_position import fork_positions
from treepo_swift.core.search import Segment, TreeSearch
from treepo_swift.core.tree import Node, StopReason, Tree, response_ids, response_logprobs

CANDIDATES = ['answer_or_eos', 'finished', 'best_reason_first', 'lowest_reward_first', 'any']
small = st.integers(1, 12)
pairs = st.tuples(st.integers(1, 3), st.integers(3, 9))


@st.composite
def configs(draw) -> TreeConfig:
    """Any combination of policies that a user can write."""
    budget = draw(st.sampled_from(['by_width', 'by_width', 'by_segment_tokens', 'by_trajectory_tokens']))
    segment_length = draw(small)
    pacing = draw(
        st.one_of(
            st.sampled_from(['eager', 'even']),
            st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), min_size=1, max_size=3).map(
                lambda steps: dict(zip(sorted({d for d, _ in steps}), sorted(w for _, w in steps)))
            ),
        )
    )
    return flat(
        segment_length=segment_length,
        max_depth=draw(st.integers(1, 6)),
        divergence=draw(st.one_of(st.integers(1, 4), pairs)),
        root_divergence=draw(st.one_of(st.integers(1, 9), pairs)),
        branching=draw(st.sampled_from(list(branching_policies))),
        branch_score=draw(st.sampled_from(['sum', 'mean', 'last_segment'])),
        branch_favour=draw(st.sampled_from(['low', 'high'])),
        branch_temperature=draw(st.sampled_from([0.01, 1.0, (5.0, 1.0)])),
        branch_schedule=draw(st.sampled_from(['linear', 'cosine', 'sinusoid'])),
        pacing=pacing,
        fork_position=draw(st.sampled_from(['boundary', *fork_positions])),
        budget=budget,
        budget_tokens=0 if budget == 'by_width' else segment_length * draw(small) + draw(st.integers(0, 3)),
        fallback=draw(st.sampled_from([*cut_policies, 'root', 'none'])),
        fallback_candidates=draw(st.sampled_from(CANDIDATES)),
        fallback_window=draw(st.integers(0, 3)),
        fallback_cuts=draw(st.integers(1, 3)),
        fallback_block=draw(small),
        fallback_favour=draw(st.sampled_from(['low', 'high'])),
        fallback_fill=draw(st.sampled_from(['placeholder', 'root'])),
        answer=draw(st.sampled_from(['boxed', 'tags', 'none'])),
        answer_needs_eos=draw(st.booleans()),
        stop_order=draw(st.sampled_from([(), ('repetition',), ('depth_limit', 'eos')])),
    )


def laws_search(config: TreeConfig, width: int, seed: int, **limits: int) -> TreeSearch:
    """Half of them ask segment by segment."""
    return make_search(config, width, seed=seed, by_segment=seed % 2 == 1, **limits)


configs = configs()
widths = st.integers(1, 20)
seeds = st.integers(0, 1000)


def shape(search) -> list[tuple]:
    return [
        (path.stop, tuple(response_ids(path.leaf)), tuple(n.id for n in path.leaf.lineage()))
        for path in search.tree.trajectories
    ]


@given(configs, widths, seeds, st.integers(1, 60), st.integers(5, 80))
@settings(max_examples=150, deadline=None)
def test_a_tree_has_exactly_w_trajectories_within_all_limits(config, width, seed, max_response, max_context):
    search = make_search(config, width, seed=seed, max_response=max_response, max_context=max_context)
    grow(search, order=random.Random(seed))
    assert search.done and len(search.tree.trajectories) == width
    assert search.tree.trajectories[0].stop is not StopReason.ABSENT
    for path in search.tree.trajectories:
        assert path.stop is not None and path.stop is not StopReason.FAILED
        if path.stop is StopReason.ABSENT:
            left_out = config.budget.policy == 'by_trajectory_tokens'
            assert left_out or (config.fallback.policy, config.fallback.fill) == ('none', 'placeholder')
            continue
        assert 1 <= path.leaf.length <= min(max_response, max_context - 2)
        assert path.leaf.depth <= config.max_depth
        assert path.leaf.length <= config.max_response_tokens


@given(configs, widths, seeds)
@settings(max_examples=100, deadline=None)
def test_growing_paths_and_trajectories_are_never_more_than_w(config, width, seed):
    search = laws_search(config, width, seed)

    def watch(request, segment):
        ended = sum(len(round_.finished) for round_ in search._rounds.values())
        assert search.growing + ended + len(search.tree.trajectories) <= width

    grow(search, order=random.Random(seed), watch=watch)
    assert not search.growing


@given(configs, widths, seeds)
@settings(max_examples=100, deadline=None)
def test_engine_input_is_prompt_plus_nodes_and_every_token_sits_on_one_node(config, width, seed):
    search = laws_search(config, width, seed)
    asked: list[tuple[list[int], list[int]]] = []

    def watch(request, segment):
        asked.append((search.tree.prompt_ids + response_ids(request.prefix), segment.token_ids))

    grow(search, watch=watch, order=random.Random(seed))
    inputs = {tuple(context) for context, _ in asked}
    outputs = {tuple(context + ids) for context, ids in asked}
    nodes: dict[int, Node] = {}
    for path in search.tree.trajectories:
        context = list(search.tree.prompt_ids)
        for node in path.leaf.lineage():
            assert node.length == node.parent.length + len(node.token_ids)
            context += node.token_ids
            # A segment ends here, or another one begins here: then it was cut by fallback.
            assert tuple(context) in outputs or tuple(context) in inputs
            assert nodes.setdefault(node.id, node) is node
        assert len(response_logprobs(path.leaf)) == len(response_ids(path.leaf)) == path.leaf.length
    sampled = sum(len(ids) for _, ids in asked)
    assert search.tree.stats.decoded_tokens == sampled == sum(len(node.token_ids) for node in nodes.values())
    assert search.tree.stats.trajectory_tokens == sum(path.leaf.length for path in search.tree.trajectories)
    if seed % 2 or config.budget.policy == 'by_trajectory_tokens':
        # A segment is one request.
        assert search.tree.stats.engine_requests == len(asked)
    else:
        # A path is one request.
        assert search.tree.stats.engine_requests == max((path.id for path in search.tree.trajectories), default=0)


@given(configs, widths, seeds)
@settings(max_examples=60, deadline=None)
def test_one_seed_one_tree(config, width, seed):
    assert shape(grow(laws_search(config, width, seed))) == shape(grow(laws_search(config, width, seed)))


@given(configs, widths, seeds)
@settings(max_examples=60)
def test_trajectories_that_share_a_node_lie_next_to_each_other(config, width, seed):
    sources = {}
    put_in_order = Tree._order_depth_first

    def watched(tree):
        sources.update({p.id: tree.trajectories[p.fallback_from] for p in tree.trajectories if is_cut(p)})
        put_in_order(tree)

    is_cut = lambda path: path.fallback_from not in (None, -1)
    with mock.patch.object(Tree, '_order_depth_first', watched):
        trajectories = grow(laws_search(config, width, seed)).tree.trajectories
    paths = [{id(node) for node in path.leaf.lineage()} for path in trajectories if not path.is_placeholder]
    for node in set().union(*paths):
        through = [i for i, path in enumerate(paths) if node in path]
        assert through == list(range(through[0], through[-1] + 1))
    assert {p.id: trajectories[p.fallback_from] for p in trajectories if is_cut(p)} == sources


@given(configs, widths, seeds)
@settings(max_examples=100, deadline=None)
def test_trajectories_share_exactly_the_tokens_of_their_shared_nodes(config, width, seed):
    """With an engine that never says the same token twice, equal tokens at equal positions are shared tokens."""
    search = laws_search(config, width, seed)
    dice, fresh = random.Random(seed), itertools.count(1)

    def answer(request):
        count = dice.randint(1, request.max_tokens)
        stop = StopReason.EOS if count < request.max_tokens else None
        return segment_of([next(fresh) for _ in range(count)], stop)

    grow(search, answer=answer, order=random.Random(seed))
    lineages = [path.leaf.lineage() for path in search.tree.trajectories]
    for a, b in itertools.combinations(lineages, 2):
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(a, b)))
        assert all(x is not y for x in a[shared:] for y in b[shared:])
        ids = [[token for node in part for token in node.token_ids] for part in (a, b)]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids)))
        assert same == sum(len(node.token_ids) for node in a[:shared])


@given(configs, widths, seeds)
@settings(max_examples=100, deadline=None)
def test_token_budgets_are_never_exceeded(config, width, seed):
    search = laws_search(config, width, seed)
    segments: Counter[int] = Counter()

    def watch(request, segment):
        segments[search._round_of[request.path_id]] += 1

    grow(search, watch=watch, order=random.Random(seed))
    if config.budget.policy == 'by_segment_tokens':
        assert max(segments.values()) * config.segment_length <= max(config.budget.tokens, config.segment_length)
    if config.budget.policy == 'by_trajectory_tokens':
        assert search.tree.stats.trajectory_tokens <= config.budget.tokens
    assert search.tree.stats.trajectory_tokens == sum(path.leaf.length for path in search.tree.trajectories)


@given(configs, widths, seeds, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_order_in_which_answers_arrive_changes_nothing(config, width, seed, one, other):
    grown = [grow(laws_search(config, width, seed), order=random.Random(o)) for o in (one, other)]
    assert shape(grown[0]) == shape(grown[1])


@given(configs, widths, seeds, st.integers(0, 5), st.floats(0, 0.2))
@settings(max_examples=150, deadline=None)
def test_a_request_a_path_and_a_request_a_segment_grow_the_same_tree(config, width, seed, order, faults):
    """Whatever the policies, the order of the answers and the engine's faults."""
    grown = []
    for by_segment in (False, True):
        search = make_search(config, width, seed=seed, by_segment=by_segment)

        def answer(request, search=search):
            ids = search.tree.prompt_ids + response_ids(request.prefix)
            if random.Random(f'{ids}{request.path_id}').random() < faults:
                return 'engine is out'
            return sample(ids, request.max_tokens, request.path_id, eos_every=15)

        grown.append(grow(search, answer=answer, order=random.Random(order)))
    stream, lockstep = grown
    assert shape(stream) == shape(lockstep)
    assert stream.tree.stats.engine_requests <= lockstep.tree.stats.engine_requests
    assert stream.tree.stats.input_tokens <= lockstep.tree.stats.input_tokens
    for name in ('trajectory_tokens', 'forks', 'fallbacks'):
        assert getattr(stream.tree.stats, name) == getattr(lockstep.tree.stats, name)


def test_a_path_that_is_ahead_does_not_wait_and_its_forks_do():
    config = flat(segment_length=2, max_depth=4, root_divergence=2, divergence=2)
    search = make_search(config, 8)
    fast, slow = search.start()

    def advance(request):
        search.extend(request.path_id, segment_of([7, 7]))
        return search.settle(request.path_id)

    assert (fast.max_tokens, fast.segment_tokens) == (8, 2)
    assert [advance(fast) for _ in range(4)] == [[]] * 4  # to the depth limit
    first = advance(slow)
    # Both boundaries of depth 1 fork now; the fast path, which has long ended, too.
    assert [(fork.prefix.depth, fork.max_tokens) for fork in first] == [(1, 6), (1, 6)]
    assert search.tree.trajectories == []


def test_the_papers_binary_tree_spends_its_forks_in_the_first_levels():
    config = flat(segment_length=4, max_depth=5, root_divergence=2, divergence=2)
    search = grow(make_search(config, 8), answer=lambda r: Segment([7] * r.max_tokens, [0.0] * r.max_tokens))
    stats = search.tree.stats
    # Levels of 2, 4, 8, 8 and 8 segments.
    assert stats.engine_requests == 8 and stats.decoded_tokens == 120 and stats.trajectory_tokens == 160
    assert stats.forks == 7 and stats.fallbacks == 0
    assert {p.stop for p in search.tree.trajectories} == {StopReason.DEPTH_LIMIT}


def test_budget_of_an_ended_path_moves_to_the_live_ones():
    config = flat(segment_length=4, max_depth=2, root_divergence=2, divergence=2)

    def answer(request):
        ends = request.path_id == 1
        return Segment([7], [0.0], StopReason.EOS) if ends else Segment([7] * 4, [0.0] * 4)

    search = grow(make_search(config, 6), answer=answer)
    # One live path, one ended: 2*1 + 2*1 = 4 branches from the live one; the sixth comes by fallback
    # from the ended path, whose only boundary besides its end is the root: two segments.
    # In lockstep the path that forks asks once more.
    assert search.tree.stats.engine_requests == 2 + 3 + 1
    assert search.tree.stats.decoded_tokens == (1 + 4) + 4 * 4 + 2 * 4
    assert search.tree.stats.fallbacks == 1


def test_fallback_starts_from_prefixes_of_answers_or_else_from_the_root():
    config = flat(segment_length=4, max_depth=3, root_divergence=1, divergence=2)

    def answer(request):
        if request.prefix.depth == 2:
            return Segment([EOS], [0.0], StopReason.EOS)
        return Segment([7] * 4, [0.0] * 4)

    search = grow(make_search(config, 12), answer=answer)
    fallen = [p for p in search.tree.trajectories if p.fallback_from is not None]
    assert fallen and all(0 <= p.fallback_from < 12 for p in fallen)

    cut = grow(
        make_search(flat(segment_length=4, max_depth=1, root_divergence=1), 5),
        answer=lambda r: Segment([7] * r.max_tokens, [0.0] * r.max_tokens),
    )
    assert [p.fallback_from for p in cut.tree.trajectories] == [None, -1, -1, -1, -1]


def test_failed_segments_are_grown_again_from_healthy_siblings():
    config = flat(segment_length=4, max_depth=3, root_divergence=4)
    failures = iter(range(3))

    def answer(request):
        return 'engine is out' if next(failures, None) is not None else Segment([7] * 4, [0.0] * 4)

    search = grow(make_search(config, 8), answer=answer)
    assert search.tree.stats.failures == 3
    assert all(path.stop is StopReason.DEPTH_LIMIT for path in search.tree.trajectories)


def test_a_tree_that_only_fails_ends_in_placeholders_that_name_the_cause():
    search = grow(make_search(flat(), 3), answer=lambda request: 'engine is out')
    assert [p.stop for p in search.tree.trajectories] == [StopReason.FAILED] * 3
    assert all('engine is out' in p.error and not p.leaf.lineage() for p in search.tree.trajectories)


def test_an_overlong_prompt_asks_nothing_of_the_engine():
    search = make_search(flat(), 2, prompt_ids=[1] * 10, max_context=10)
    assert search.start() == [] and search.done
    assert search.tree.stats.engine_requests == 0 and '10 tokens' in search.tree.trajectories[0].error


def test_stop_reasons_have_a_fixed_precedence():
    config = flat(segment_length=4, max_depth=1)
    search = make_search(config, 1)
    (request,) = search.start()
    search.extend(request.path_id, Segment([1, EOS], [0.0, 0.0], StopReason.EOS))
    assert search.stop_of(request.path_id, StopReason.ANSWER) is StopReason.ANSWER
    assert search.stop_of(request.path_id, StopReason.HOOK) is StopReason.EOS
    assert search.stop_of(request.path_id, None) is StopReason.EOS


def test_limits_are_told_apart():
    def stop(**kwargs):
        search = make_search(flat(segment_length=4, max_depth=2), 1, **kwargs)
        answer = lambda r: Segment([7] * r.max_tokens, [0.0] * r.max_tokens)
        return grow(search, answer=answer).tree.trajectories[0].stop

    assert stop() is StopReason.DEPTH_LIMIT
    assert stop(max_response=8) is StopReason.TOKEN_LIMIT
    assert stop(max_response=5) is StopReason.TOKEN_LIMIT
    assert stop(max_context=7) is StopReason.CONTEXT_LIMIT


def test_request_seeds_differ_between_forks_of_one_prefix():
    search = make_search(flat(root_divergence=6), 6)
    assert len({request.seed for request in search.start()}) == 6


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match='width=0'):
        make_search(flat(), 0)


def test_samples_of_the_test_language_depend_on_context_and_seed():
    assert sample([1], 20, 0) == sample([1], 20, 0) != sample([1], 20, 1)


def test_prefix_cache_hits_are_counted():
    config = flat(segment_length=4, max_depth=2, root_divergence=1)
    search = make_search(config, 2, prompt_ids=[1] * 6, by_segment=True)
    grow(search, answer=lambda r: Segment([7] * 4, [0.0] * 4, cached_tokens=r.prefix.length))
    # One request from the prompt of 6 tokens, two from 4 tokens further.
    assert (search.tree.stats.input_tokens, search.tree.stats.cached_tokens) == (6 + 2 * 10, 2 * 4)
