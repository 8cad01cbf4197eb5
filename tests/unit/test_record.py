"""Trees on their way to disk: the trace that travels, the record of a line, and texts token by token."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import EOS, grow, make_search, sample
from tests.flat import flat
from treepo_swift.core.tree import StopReason, Tree, response_ids
from treepo_swift.wire.pieces import PieceReader, write_texts
from treepo_swift.wire.record import Moment, Scored, TreeRecord, record_of
from treepo_swift.wire.report import TreeReport
from treepo_swift.wire.trace import TreeTrace, is_traced

MOMENT = Moment('2026-01-02T03:04:05Z', 3, 'train', 'treepo', 'whiten')


def read_bytes(ids):
    """A byte-level tokenizer: every token is a byte, and EOS has a name."""
    parts = bytes(ids).split(bytes([EOS]))
    return '<eos>'.join(part.decode(errors='replace') for part in parts)


def grown(width=8, seed=0, **keys) -> Tree:
    return grow(make_search(flat(segment_length=12, max_depth=4, **keys), width, seed=seed)).tree


def scores(tree: Tree, rewards=None) -> list[Scored]:
    rewards = rewards or [float(index % 2) for index in range(len(tree.trajectories))]
    return [
        Scored(TreeReport.of(tree, index), reward, {'right': reward}, reward - 0.5, None)
        for index, reward in enumerate(rewards)
    ]


def recorded(tree: Tree, rewards=None) -> TreeRecord:
    record = record_of(TreeTrace.of(tree), scores(tree, rewards), MOMENT)
    write_texts(record, PieceReader(read_bytes, [97]))
    return record


@pytest.mark.parametrize('branching', ['even', 'entropy'])
def test_a_trace_arrives_as_it_was_sent(branching):
    trace = TreeTrace.of(grown(branching=branching))
    assert TreeTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    assert all(node.entropies for node in trace.nodes if node.token_ids)


def test_a_trace_without_entropies_says_that_they_are_unknown():
    search = make_search(flat(segment_length=12, max_depth=4), 4)
    tree = grow(
        search,
        answer=lambda request: dataclasses.replace(
            sample(response_ids(request.prefix), request.max_tokens, request.path_id), entropies=None
        ),
    ).tree
    trace = TreeTrace.from_dict(TreeTrace.of(tree).to_dict())
    assert trace.nodes and all(node.entropies is None for node in trace.nodes)
    assert '"entropies"' not in recorded(tree).to_json()


def test_a_record_holds_each_node_once_and_every_trajectory_whole():
    tree = grown()
    record = recorded(tree)
    assert sum(len(node.tokens) for node in record.nodes) < tree.stats.trajectory_tokens
    for trajectory, nodes, text, path in zip(
        record.trajectories, record.paths(), record.texts(), tree.trajectories, strict=True
    ):
        tokens = [token for node in nodes for token in node.tokens]
        assert tokens == response_ids(path.leaf) and text == read_bytes(tokens)
        assert trajectory.stop == path.stop.value and trajectory.loss_tokens == len(tokens)
    for node in record.nodes:
        through = [t.reward for t, path in zip(record.trajectories, record.paths(), strict=True) if node in path]
        assert node.size == len(through) and node.value == pytest.approx(sum(through) / len(through), abs=1e-4)
        assert len(node.pieces) == len(node.tokens) == len(node.logprobs) and sum(node.pieces) == len(node.text)
    assert record.value == 0.5 and record.stats['decoded_tokens'] == tree.stats.decoded_tokens


def test_a_line_is_read_back_as_it_was_written():
    record = recorded(grown())
    line = record.to_json()
    assert '\n' not in line and json.loads(line)['version'] == 1
    assert TreeRecord.from_dict(json.loads(line)) == record
    assert TreeRecord.from_dict({**json.loads(line), 'added_later': 1}) == record
    with pytest.raises(ValueError, match='version 7 of a tree: this treepo_swift reads 1'):
        TreeRecord.from_dict({**json.loads(line), 'version': 7})


def test_where_a_fallback_branched_is_known():
    tree = grown(width=12, fallback='random_segment', divergence=1, root_divergence=2)
    record = recorded(tree)
    again = [t for t in record.trajectories if t.fallback_from is not None]
    assert again
    paths = record.segment_paths()
    for trajectory in again:
        path = paths[record.trajectories.index(trajectory)]
        shared = set(paths[trajectory.fallback_from]) if trajectory.fallback_from >= 0 else set()
        at = path.index(trajectory.fallback_at)
        assert set(path[:at]) <= shared and not set(path[at:]) & shared


def test_a_placeholder_has_no_reward_and_is_in_no_subgroup():
    search = make_search(flat(segment_length=12, max_depth=4, fallback='none'), 6)
    failures = iter([False] * 3 + [True] * 1000)
    tree = grow(
        search,
        answer=lambda request: (
            'the tool broke'
            if next(failures)
            else sample(response_ids(request.prefix), request.max_tokens, request.path_id)
        ),
    ).tree
    placeholders = [path for path in tree.trajectories if path.is_placeholder]
    record = recorded(tree, [1.0] * len(tree.trajectories))
    empty = [t for t in record.trajectories if t.is_placeholder]
    assert len(empty) == len(placeholders) > 0
    assert all(t.reward is None and t.rewards == {} and t.loss_tokens == 0 for t in empty)
    assert record.value == 1.0 and '"reward":null' in record.to_json()
    healthy = len(record.trajectories) - len(empty)
    assert sum(node.size for node in record.nodes if not node.parent) == healthy
    assert {t.error for t in empty if t.stop == StopReason.FAILED.value} <= {'the tool broke'}


def test_a_trace_of_another_tree_is_refused():
    tree = grown()
    with pytest.raises(ValueError, match='8 trajectories, and 7 were scored'):
        record_of(TreeTrace.of(tree), scores(tree)[:7], MOMENT)
    with pytest.raises(ValueError, match='in its trace has'):
        record_of(TreeTrace.of(tree), scores(tree)[::-1], MOMENT)


def test_what_a_hook_masked_is_told():
    tree = grown(width=1)
    one = scores(tree)[0]
    report = dataclasses.replace(one.report, tokens=[n - 1 for n in one.report.tokens])
    record = record_of(TreeTrace.of(tree), [dataclasses.replace(one, report=report)], MOMENT)
    assert [node.trained for node in record.nodes] == [len(node.tokens) - 1 for node in record.nodes]


def test_the_rate_chooses_by_id():
    ids = [f'tree-{i}' for i in range(2000)]
    assert all(is_traced(id, 1.0) for id in ids) and not any(is_traced(id, 0.0) for id in ids)
    few = {id for id in ids if is_traced(id, 0.1)}
    assert 140 < len(few) < 260 and few < {id for id in ids if is_traced(id, 0.3)}


@settings(deadline=None)
@given(st.text(max_size=40), st.data())
def test_characters_survive_however_they_are_cut_into_nodes(text, data):
    """Bytes are tokens, so most characters lie in several, and some in several nodes."""
    ids = [*text.replace('\0', '').encode()]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    reader = PieceReader(read_bytes, [97])
    joined, pending = '', []
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        decoded = reader.read(ids[begin:end], pending)
        assert sum(decoded.lengths) == len(decoded.text) and len(decoded.lengths) == end - begin
        joined, pending = joined + decoded.text, decoded.pending
    assert joined + reader.rest(pending) == read_bytes(ids)


def test_a_tokenizer_that_drops_the_first_space_keeps_it_here():
    words = {0: 'a', 1: ' b', 2: ' c'}
    reader = PieceReader(lambda ids: ''.join(words[i] for i in ids).removeprefix(' '), [0])
    assert reader.read([1, 2]).text == ' b c'


def test_half_a_character_at_the_end_of_a_path_is_shown_and_one_between_nodes_is_whole():
    record = recorded(grown(width=2, root_divergence=1))
    first, *others = record.nodes
    euro = list('€'.encode())
    chain = [first, next(node for node in others if node.parent == first.id)]
    record.nodes = chain
    chain[0].tokens, chain[1].tokens = [*b'ab', *euro[:2]], [euro[2], *euro[:1]]
    write_texts(record, PieceReader(read_bytes, [97]))
    assert (chain[0].text, chain[0].pieces) == ('ab', [1, 1, 0, 0])
    assert (chain[1].text, chain[1].pieces) == ('€\N{REPLACEMENT CHARACTER}', [1, 1])


def test_rubbish_without_end_is_not_kept_waiting():
    ids = [0xF0] * 50
    decoded = PieceReader(read_bytes, [97]).read(ids)
    assert len(decoded.pending) < 16 and decoded.text == '\N{REPLACEMENT CHARACTER}' * (50 - len(decoded.pending))
