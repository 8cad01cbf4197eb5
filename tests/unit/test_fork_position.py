"""Forks that start inside the segment that has just ended."""

from __future__ import annotations

import math
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import EOS, grow, make_search, segment_of
from tests.unit.test_search import configs, laws_search, seeds, widths
from tests.unit.test_search_turns import reply, turn_configs
from treepo_swift import register_fork_position
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.budgets import expected_saving
from treepo_swift.core.messages import NextTurn, Segment
from treepo_swift.core.policies.fork_position import fork_positions, position_context
from treepo_swift.core.tree import Path, StopReason, Tree, response_ids


def chosen(name: str, path: Path, seed: int = 0) -> int:
    context = position_context(path, TreeConfig(fork_position=name), random.Random(seed), 1)
    return path.leaf.length if context is None else fork_positions[name](path, context)


def path_of(*segments: list[float], split_at: int | None = None) -> Path:
    """Its log-probs, and as entropies their negatives."""
    tree = Tree('t', [])
    node = tree.root
    for values in segments:
        node = tree.add_node(node, [1] * len(values), values, [-value for value in values])
    if split_at is not None:
        tree.node_at(Path(node), split_at)
    return Path(node)


@pytest.mark.parametrize('name', ['min_logprob_token', 'max_entropy_token'])
@pytest.mark.parametrize('split_at', [None, 5, 6, 7])
def test_positions_are_where_their_names_say_wherever_the_segment_was_split(name, split_at):
    # The lowest value of all is in the first segment, which ended before.
    path = path_of([-9.0] * 4, [-2.0, -1.0, -3.0, -2.0], split_at=split_at)
    assert chosen(name, path) == 6
    # Before a segment's first token is the boundary before it.
    assert chosen(name, path_of([-9.0] * 4, [-8.0, -1.0, -3.0, -2.0], split_at=split_at)) == 4


@pytest.mark.parametrize('name', ['min_logprob_token', 'max_entropy_token'])
def test_ties_are_drawn(name):
    path = path_of([-1.0] * 4, [-2.0] * 4)
    assert {chosen(name, path, seed) for seed in range(50)} == {4, 5, 6, 7}


def test_entropies_need_an_engine_that_tells():
    tree = Tree('t', [])
    path = Path(tree.add_node(tree.root, [1, 2], [-1.0, -1.0]))
    with pytest.raises(ValueError, match='top-k log-probs'):
        chosen('max_entropy_token', path)


def test_a_fork_inside_a_segment_splits_its_node_and_keeps_depth_and_width():
    config = TreeConfig(segment_length=4, max_depth=3, root_divergence=1, fork_position='min_logprob_token')
    search = make_search(config, 2)
    (going,) = search.start()
    search.extend(going.path_id, Segment([1, 2, 3, 4], [-1.0, -1.0, -7.0, -1.0]))
    (fork,) = search.settle(going.path_id)
    # Before the third token, of which another is sampled; the path itself runs on as one request.
    assert response_ids(fork.prefix) == [1, 2] and fork.prefix.depth == 1
    assert (fork.max_tokens, fork.segment_tokens) == (8, 4)
    leaf = search.leaf(going.path_id)
    assert [list(node.token_ids) for node in leaf.lineage()] == [[1, 2], [3, 4]] and leaf.parent is fork.prefix
    assert leaf.depth == 1 and leaf.length == 4 and list(leaf.logprobs) == [-7.0, -1.0]
    for request, ids in ((going, [5] * 4), (fork, [6] * 4), (going, [7] * 4), (fork, [8] * 4)):
        search.extend(request.path_id, segment_of(ids))
        assert search.settle(request.path_id) == []
    assert search.done and search.tree.stats.forks == 1
    lengths = [path.leaf.length for path in search.tree.trajectories]
    # A branch has the depth of the segment in which it began.
    assert lengths == [12, 10] and {path.stop for path in search.tree.trajectories} == {StopReason.DEPTH_LIMIT}


def test_a_path_that_is_ahead_keeps_what_it_has_when_its_segment_is_split():
    config = TreeConfig(segment_length=4, max_depth=3, fork_position='min_logprob_token')
    search = make_search(config, 4)
    fast, slow = search.start()
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]):
        search.extend(fast.path_id, Segment(ids, [-1.0, -9.0, -1.0, -1.0]))
        search.settle(fast.path_id)
    search.extend(slow.path_id, Segment([20, 21, 22, 23], [-1.0, -1.0, -1.0, -9.0]))
    forks = search.settle(slow.path_id)
    assert [response_ids(fork.prefix) for fork in forks] == [[1], [20, 21, 22]]
    for fork in forks:
        search.extend(fork.path_id, segment_of([30, EOS], StopReason.EOS))
        search.settle(fork.path_id)
    for _ in range(2):
        search.extend(slow.path_id, segment_of([40] * 4))
        search.settle(slow.path_id)
    assert search.done
    said = [response_ids(path.leaf) for path in search.tree.trajectories]
    assert sorted(said) == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 30, EOS],
        [20, 21, 22, 23, *[40] * 8],
        [20, 21, 22, 30, EOS],
    ]


def test_where_a_turn_begins_forks_start_behind_what_the_environment_said():
    config = TreeConfig(segment_length=4, max_depth=2, root_divergence=1, fork_position='min_logprob_token')
    search = make_search(config, 2)
    (request,) = search.start()
    search.extend(request.path_id, Segment([7, 8, EOS], [-1.0, -5.0, -1.0], StopReason.EOS))
    requests = search.begin_turn(request.path_id, NextTurn(3, [9, 9], 'turn'))
    assert len(requests) == 2 and {response_ids(r.prefix)[-2:] == [9, 9] for r in requests} == {True}


def test_turn_level_forks_have_no_segment_to_start_in():
    with pytest.raises(ConfigError, match="fork_at='turn' with fork_position.policy='min_logprob_token'"):
        TreeConfig(fork_at='turn', fork_position='min_logprob_token')


@given(configs, widths, seeds)
@settings(max_examples=50, deadline=None)
def test_width_forks_and_requests_of_a_tree_are_those_of_forks_at_the_boundary(config, width, seed):
    """Where nothing is sampled or drawn that depends on where forks start, only their prefixes differ. At a segment's
    very beginning a fork has a segment more to grow, and lives longer."""
    divergence = config.divergence if isinstance(config.divergence, int) else 2
    config = config.replace(
        budget='by_width', fallback='root', branching='even', divergence=divergence, stop={'answer': 'none'}
    )

    def speaks(request):
        return segment_of([1 + (request.seed + i) % 90 for i in range(request.max_tokens)])

    def inside(path, context):
        return max(context.low + 1, context.high - 2)

    counts = []
    for position in ('boundary', 'test_inside'):
        with mock.patch.dict(fork_positions._entries, {'test_inside': inside}):
            search = laws_search(config.replace(fork_position=position), width, seed)
            stats = grow(search, answer=speaks, order=random.Random(seed)).tree.stats
        counts.append((stats.forks, stats.engine_requests, stats.fallbacks, stats.decoded_tokens))
    assert set(counts) == {counts[0]}


@given(turn_configs, widths, seeds, st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_fork_starts_in_the_segment_that_has_just_ended(config, width, seed, with_turns):
    search = laws_search(config, width, seed)
    begins: dict[tuple[int, int], int] = {}
    ask = search.forks.position

    def position(path, forks):
        kept = ask(path, forks)
        if path.leaf.begins_turn:
            assert kept == path.leaf.length
        else:
            assert begins[path.id, path.leaf.length] <= kept <= path.leaf.length
        return kept

    def watch(request, segment):
        begins[request.path_id, request.prefix.length + len(segment.token_ids)] = request.prefix.length

    search.forks.position = position
    environment = reply if with_turns else lambda path: None
    grow(search, watch=watch, order=random.Random(seed), environment=environment)


def test_first_branches_are_as_many_as_the_first_token_has_choices():
    """Depth first, where it has none."""

    def first_branches(choices, width=8):
        config = TreeConfig(
            segment_length=4,
            max_depth=6,
            root_divergence=2,
            fork_position={'policy': 'first_token_entropy'},
            stop={'answer': 'none', 'repetition': 'none'},
        )
        search = make_search(config, width)

        def answer(request):
            entropies = [math.log(choices if request.prefix.parent is None else 9.0), 9.0, 9.0, 9.0]
            return Segment([7] * 4, [-1.0] * 4, None, entropies)

        tree = grow(search, answer=answer).tree
        assert tree.stats.forks == width - 1 and tree.stats.fallbacks == 0
        return len({path.leaf.lineage()[0].id for path in tree.trajectories})

    assert first_branches(choices=1.0) == 2
    assert first_branches(choices=3.2) == 3
    # Each first branch has one fork at the boundary that ends its first segment: two, four, six.
    assert first_branches(choices=6.0) == first_branches(choices=100.0) == 6


def test_a_position_of_ones_own_takes_three_lines_and_reads_options_and_entropies():
    @register_fork_position('test_surprise')
    def surprise(path, context):
        """Where the token's own surprise is furthest above the entropy; or too far, if asked."""
        gaps = [-p - h for p, h in zip(context.logprobs, context.entropies, strict=True)]
        return context.low + gaps.index(max(gaps)) + context.config.fork_position.options['beyond']

    def tree(beyond):
        position = {'policy': 'test_surprise', 'options': {'beyond': beyond}, 'top_k': 7}
        config = TreeConfig(segment_length=4, max_depth=3, fork_position=position)
        assert config.entropy_logprobs == {'fork_position.top_k': 7}
        return grow(make_search(config, 8)).tree.trajectories

    try:
        assert not any(path.is_placeholder for path in tree(0))
        (error,) = {path.error for path in tree(9)}
        assert error.startswith("fork position 'test_surprise' returned 1") and 'allowed are 0 to 4 tokens' in error
        with pytest.raises(ValueError, match="fork position 'boundary' asks no policy"):
            register_fork_position('boundary')
    finally:
        del fork_positions._entries['test_surprise']
    with pytest.raises(ValueError, match="Unknown fork position 'odd': allowed are first_token_entropy, max_entropy"):
        make_search(TreeConfig(fork_position='odd'), 2)


@pytest.mark.parametrize('pacing', ['eager', 'even'])
def test_the_expected_saving_knows_that_a_fork_inside_a_segment_shares_half_of_it(pacing):
    config = TreeConfig(
        segment_length=32,
        max_depth=6,
        pacing=pacing,
        fork_position='min_logprob_token',
        stop={'answer': 'none', 'repetition': 'none'},
    )

    def speaks(request):
        dice = random.Random(request.seed)
        return Segment([7] * request.max_tokens, [-dice.random() for _ in range(request.max_tokens)])

    trees = [grow(make_search(config, 16, seed=seed), answer=speaks).tree.stats for seed in range(30)]
    saved = 1 - sum(t.decoded_tokens for t in trees) / sum(t.trajectory_tokens for t in trees)
    assert expected_saving(config, 16) == pytest.approx(saved, abs=0.01)
    assert saved < expected_saving(config.replace(fork_position='boundary'), 16) - 0.05
