"""Rows to a trie and back: laws over all kinds of rows, without torch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.trainer.shared_prefix.packing import find_targets
from treepo_swift.trainer.shared_prefix.trie import build_trie

PROMPTS = ([5], [5, 6], [7, 300, 2], [70_000])


@st.composite
def batches(draw: st.DrawFn) -> list[list[int]]:
    """Rows of several prompts: forks at any place (the first token and the prompt's end too), rows that are prefixes
    of others, duplicates, placeholders of one token, and tokens that an environment says to several of them."""
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(('new', 'fork', 'duplicate', 'prefix', 'placeholder', 'environment')))
        if kind == 'new' or not rows:
            rows.append([*draw(st.sampled_from(PROMPTS)), *draw(st.lists(st.integers(0, 3), max_size=8))])
            continue
        row = draw(st.sampled_from(rows))
        cut = draw(st.integers(0, len(row)))
        rows.append(
            {
                'fork': row[:cut] + draw(st.lists(st.integers(0, 400), min_size=1, max_size=6)),
                'duplicate': list(row),
                'prefix': row[: max(cut, 1)],
                'placeholder': [draw(st.integers(0, 3))],
                'environment': [*row, 9, 9, 9],
            }[kind]
        )
    return rows


@given(batches())
def test_a_trie_holds_each_prefix_once(rows):
    trie = build_trie(rows)
    prefixes = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    assert len(trie.tokens) == len(prefixes) and trie.row_tokens == sum(map(len, rows))
    assert trie.ratio == pytest.approx(sum(map(len, rows)) / len(prefixes))
    for row, path in zip(rows, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == row
        assert trie.depths[path].tolist() == list(range(len(row)))
        assert (np.diff(path) > 0).all()  # a parent comes before its children


@given(batches())
def test_chains_hold_every_position_once_and_see_their_own_path_only(rows):
    trie = build_trie(rows)
    seen = [position for c in trie.chains for position in range(c.start, c.start + c.length)]
    assert seen == list(range(len(trie.tokens)))
    for chain in trie.chains:
        for offset in range(chain.length):
            visible = chain.path[: chain.depth + offset + 1]
            assert visible[-1] == chain.start + offset
            assert trie.tokens[visible].tolist() in [row[: len(visible)] for row in rows]


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows, dice):
    order = list(range(len(rows)))
    dice.shuffle(order)
    trie, shuffled = build_trie(rows), build_trie([rows[i] for i in order])
    assert trie.tokens.tolist() == shuffled.tokens.tolist()
    assert [trie.paths[i].tolist() for i in order] == [path.tolist() for path in shuffled.paths]


@given(batches(), st.data())
def test_targets_name_parent_and_token_of_what_was_asked(rows, data):
    trie = build_trie(rows)
    asked = [
        np.array(sorted(data.draw(st.sets(st.integers(1, len(row) - 1)))) if len(row) > 1 else [], np.int64)
        for row in rows
    ]
    targets = find_targets(trie, asked)
    wanted = [(row[:at], row[at]) for row, places in zip(rows, asked) for at in places.tolist()]
    assert len(targets.gather) == len(wanted)
    assert len(targets.edge_tokens) == len({(tuple(prefix), token) for prefix, token in wanted})
    assert len(targets.parents) == len({tuple(prefix) for prefix, _ in wanted})
    assert (np.diff(targets.edge_parents) >= 0).all() and (np.diff(targets.parents) > 0).all()
    index = 0
    for row, path, places in zip(rows, trie.paths, asked):
        for at in places.tolist():
            edge = targets.gather[index]
            assert targets.parents[targets.edge_parents[edge]] == path[at - 1]
            assert targets.edge_tokens[edge] == row[at]
            index += 1


def test_the_first_token_has_no_log_prob():
    with pytest.raises(ValueError, match='no log-prob'):
        find_targets(build_trie([[1, 2]]), [np.array([0])])


def test_no_rows_and_empty_rows():
    assert build_trie([]).ratio == 0 and len(build_trie([[], []]).tokens) == 0
    trie = build_trie([[], [3]])
    assert trie.tokens.tolist() == [3] and len(trie.paths[0]) == 0
    assert len(find_targets(trie, [np.empty(0, np.int64)] * 2).parents) == 0
