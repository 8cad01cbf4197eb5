"""Laws of the tree search with turns: an environment answers a turn that has ended, or says that it was the last."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import EOS, grow, make_search, sample, segment_of
from tests.flat import flat
from tests.unit.test_search import configs, laws_search, seeds, shape, widths
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.search import NextTurn, Segment
from treepo_swift.core.tree import Node, Path, StopReason, response_ids, response_logprobs, sampled_tokens

IN_TURNS = ('random_segment', 'min_logprob_segment', 'root', 'none')


@st.composite
def turn_configs(draw) -> TreeConfig:
    config = draw(configs)
    fork_at = draw(st.sampled_from(['both', 'segment', 'turn']))
    if fork_at != 'turn':
        return config.replace(fork_at=fork_at)
    return config.replace(fork_at=fork_at, fallback=draw(st.sampled_from(IN_TURNS)), fork_position='boundary')


turn_configs = turn_configs()


def reply(path: Path) -> tuple[list[int], int] | None:
    """Says something of 0 to 3 tokens to most turns, up to the fourth; now and then a turn's end is taken back."""
    ids, start = response_ids(path.leaf), path.leaf.start
    dice = random.Random(hashlib.blake2b(bytes(f'{ids}', 'ascii')).digest())
    turns = 1
    while start.parent is not None:
        start, turns = start.start, turns + 1
    if turns == 4 or dice.random() < 0.3:
        return None
    taken_back = dice.choice([0, 0, 0, 1, 2])
    keep = max(path.leaf.start.length, path.leaf.length - taken_back)
    return [200 + turns] * dice.randint(0, 3), keep


@given(turn_configs, widths, seeds, st.integers(1, 30), st.integers(20, 80))
@settings(max_examples=150, deadline=None)
def test_a_tree_has_w_trajectories_that_end_with_what_was_sampled_within_the_limits_of_each_turn(
    config, width, seed, max_response, max_context
):
    search = make_search(
        config, width, seed=seed, by_segment=seed % 2, max_response=max_response, max_context=max_context
    )
    grow(search, order=random.Random(seed), environment=reply)
    assert search.done and len(search.tree.trajectories) == width and not search.growing
    for path in search.tree.trajectories:
        if path.stop is StopReason.ABSENT:
            continue
        assert path.leaf.sampled and path.leaf.length <= max_context - 2
        for node in path.leaf.lineage():
            if node.sampled:
                assert 1 <= node.length - node.start.length <= min(max_response, config.max_response_tokens)
                assert 1 <= node.depth - node.start.depth <= config.max_depth


@given(turn_configs, widths, seeds)
@settings(max_examples=150, deadline=None)
def test_engine_input_is_prompt_plus_nodes_and_only_sampled_tokens_have_logprobs(config, width, seed):
    search = laws_search(config, width, seed)
    asked: list[tuple[list[int], list[int]]] = []
    grow(
        search,
        watch=lambda request, segment: asked.append(
            (search.tree.prompt_ids + response_ids(request.prefix), segment.token_ids)
        ),
        order=random.Random(seed),
        environment=reply,
    )
    inputs = {tuple(context) for context, _ in asked}
    nodes: dict[int, Node] = {}
    for path in search.tree.trajectories:
        context = list(search.tree.prompt_ids)
        for node in path.leaf.lineage():
            context += node.token_ids
            assert nodes.setdefault(node.id, node) is node
            assert len(node.logprobs) == (len(node.token_ids) if node.sampled else 0)
            if not node.sampled:
                # What an environment said stays whole, and the next turn was sampled from behind it.
                assert node.data[0] == node.token_ids.tolist() and tuple(context) in inputs
        assert len(response_logprobs(path.leaf)) == sampled_tokens(path.leaf)
    assert search.tree.stats.decoded_tokens == sum(len(ids) for _, ids in asked)
    assert search.tree.stats.trajectory_tokens == sum(sampled_tokens(path.leaf) for path in search.tree.trajectories)


@given(turn_configs, widths, seeds)
@settings(max_examples=150, deadline=None)
def test_no_path_goes_on_sampling_a_turn_that_has_ended(config, width, seed):
    """Taken-back ends aside, EOS is the last token of its turn on every path."""
    search = laws_search(config, width, seed)
    grow(search, order=random.Random(seed), environment=reply)
    for path in search.tree.trajectories:
        nodes = path.leaf.lineage()
        for node, after in zip(nodes, nodes[1:]):
            if after.sampled:
                assert EOS not in node.token_ids


@given(turn_configs, widths, seeds, st.integers(0, 5), st.floats(0, 0.2))
@settings(max_examples=150, deadline=None)
def test_paths_and_segments_as_requests_grow_the_same_tree_whatever_the_order_of_the_answers(
    config, width, seed, order, faults
):
    grown = []
    for by_segment, answers in ((False, order), (True, order + 1)):
        search = make_search(config, width, seed=seed, by_segment=by_segment)

        def answer(request, search=search):
            ids = search.tree.prompt_ids + response_ids(request.prefix)
            if random.Random(f'{ids}{request.path_id}').random() < faults:
                return 'engine is out'
            return sample(ids, request.max_tokens, request.path_id, eos_every=15)

        grown.append(grow(search, answer=answer, order=random.Random(answers), environment=reply))
    stream, lockstep = grown
    assert shape(stream) == shape(lockstep)
    if any(path.stop is StopReason.FAILED for path in stream.tree.trajectories):
        return  # The tree gave up, with paths in other places.
    assert stream.tree.stats.engine_requests <= lockstep.tree.stats.engine_requests
    for name in ('trajectory_tokens', 'forks', 'fallbacks', 'turns', 'environment_tokens'):
        assert getattr(stream.tree.stats, name) == getattr(lockstep.tree.stats, name)


@given(turn_configs, widths, seeds)
@settings(max_examples=150, deadline=None)
def test_paths_fork_where_fork_at_says(config, width, seed):
    search = laws_search(config, width, seed)
    started: dict[int, Node] = {}
    grow(
        search,
        watch=lambda request, segment: started.setdefault(request.path_id, request.prefix),
        order=random.Random(seed),
        environment=reply,
    )
    aligned = config.fallback in IN_TURNS
    for path in search.tree.trajectories:
        prefix = started.get(path.id)
        if prefix is None or prefix.length == 0 or (path.fallback_from is not None and not aligned):
            continue
        if config.fork_at != 'both':
            assert prefix.begins_turn == (config.fork_at == 'turn')


def test_turn_level_forks_share_what_the_environment_said():
    config = flat(segment_length=4, max_depth=2, root_divergence=1, divergence=2, fork_at='turn')

    def answer(request):
        return segment_of([7, EOS], StopReason.EOS)

    def environment(path):
        turns = len([node for node in path.leaf.lineage() if node.sampled])
        return ([9, 9], path.leaf.length) if turns < 3 else None

    search = grow(make_search(config, 4), answer=answer, environment=environment)
    stats = search.tree.stats
    # 1, 2 and 4 turns of two tokens each; three environment nodes.
    assert stats.decoded_tokens == 14 and stats.trajectory_tokens == 24 and stats.turns == 3
    assert stats.environment_tokens == 6 and stats.engine_requests == 1 + 2 + 4
    assert [len(path.leaf.lineage()) for path in search.tree.trajectories] == [5] * 4


def test_even_pacing_spreads_turn_level_forks_over_the_turns():
    def calls(**options):
        config = flat(
            segment_length=4, max_depth=1, root_divergence=1, fork_at='turn', fallback_candidates='any', **options
        )

        def environment(path):
            turns = len([node for node in path.leaf.lineage() if node.sampled])
            return ([9], path.leaf.length) if turns < 5 else None

        search = make_search(config, 8, max_turns=5)
        grow(search, answer=lambda r: segment_of([7, EOS], StopReason.EOS), environment=environment)
        assert search.tree.stats.fallbacks == 0
        return search.tree.stats.engine_requests

    # The published savings of calls at depth 5 are 42 % and 31 % of 40: d = 2 and 3, forks as early as they can be.
    assert calls(divergence=2) == 1 + 2 + 4 + 8 + 8
    assert calls(divergence=3) == 1 + 3 + 8 + 8 + 8
    assert calls(divergence=2, pacing='even') == 1 + 2 + 4 + 6 + 8
    assert calls(divergence=3, pacing='even') == 1 + 3 + 5 + 6 + 8


def test_depth_and_response_limits_count_in_every_turn():
    config = flat(segment_length=2, max_depth=3)
    search = make_search(config, 1, max_response=5)
    (request,) = search.start()
    assert request.max_tokens == 5
    for size in (2, 2):
        search.extend(request.path_id, segment_of([7] * size))
        assert search.settle(request.path_id) == []
    search.extend(request.path_id, segment_of([7]))
    assert search.stop_of(request.path_id, None) is StopReason.TOKEN_LIMIT
    (again,) = search.begin_turn(request.path_id, NextTurn(5, [9], 'turn 2'))
    assert again.max_tokens == 5 and again.prefix.data == 'turn 2' and again.prefix.length == 6
    search.extend(request.path_id, segment_of([7, EOS], StopReason.EOS))
    search.settle(request.path_id)
    assert search.done and search.tree.trajectories[0].leaf.length == 8


def test_cuts_within_turns_are_refused_where_only_turns_fork():
    for fallback in ('random_token', 'random_block', 'min_logprob_token', 'logprob_block'):
        with pytest.raises(ConfigError, match='fork_at.*fallback'):
            flat(fork_at='turn', fallback=fallback)


def test_an_environment_is_never_split():
    search = make_search(flat(segment_length=4, max_depth=2), 1)
    (request,) = search.start()
    search.extend(request.path_id, Segment([7, EOS], [0.0, 0.0], StopReason.EOS))
    (request,) = search.begin_turn(request.path_id, NextTurn(2, [9, 9, 9], 'turn'))
    search.extend(request.path_id, Segment([7, EOS], [0.0, 0.0], StopReason.EOS))
    search.settle(request.path_id)
    (path,) = search.tree.trajectories
    with pytest.raises(ValueError, match='environment'):
        search.tree.node_at(path, 3)
    assert search.tree.node_at(path, 5).data == 'turn'
