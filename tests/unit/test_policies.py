from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.policies.branching import branching_policies, even, next_width
from treepo_swift.policies.fallback import random_segment
from treepo_swift.tree import Path, StopReason, Tree


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 10), st.integers(1, 64), st.integers(1, 4))
def test_next_width_never_drops_a_live_path_and_stays_in_the_budget(live, extra, ended, width, divergence):
    finished = max(0, width - live - extra)
    total = next_width(live=live, finished=finished, ended=ended, width=width, divergence=divergence)
    assert total >= live
    assert total <= max(live, width - finished)
    assert total <= max(live, divergence * (live + ended))


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 100))
def test_even_gives_everyone_one_and_differs_by_one_at_most(live, extra, seed):
    paths = [Path(Tree('t', []).root) for _ in range(live)]
    shares = even(paths, live + extra, random.Random(seed))
    assert sum(shares) == live + extra and min(shares) >= 1 and max(shares) - min(shares) <= 1
    assert shares == even(paths, live + extra, random.Random(seed))


def grown(reasons: list[StopReason], depth: int = 3) -> Tree:
    tree = Tree('t', [])
    for reason in reasons:
        node = tree.root
        for _ in range(depth):
            node = tree.add_node(node, [1], [0.0])
        tree.trajectories.append(Path(node, stop=reason))
    return tree


@given(
    st.lists(st.sampled_from(list(StopReason)), max_size=8), st.integers(1, 10), st.integers(1, 3), st.integers(0, 50))
def test_fallback_law(reasons, needed, divergence, seed):
    tree = grown(reasons)
    starts = random_segment(tree.trajectories, tree.root, needed=needed, divergence=divergence, rng=random.Random(seed))
    candidates = {i for i, r in enumerate(reasons) if r in (StopReason.ANSWER, StopReason.EOS)}
    assert 1 <= len(starts) <= needed
    if not candidates:
        assert starts == [(tree.root, -1)] * min(needed, divergence)
        return
    assert len(starts) == min(needed, divergence * len(candidates))
    for node, index in starts:
        assert index in candidates
        assert node in [tree.root, *tree.trajectories[index].leaf.lineage()[:-1]]


def test_cuts_are_uniform_over_boundaries():
    tree = grown([StopReason.EOS], depth=4)
    rng = random.Random(0)
    depths = [
        random_segment(tree.trajectories, tree.root, needed=1, divergence=1, rng=rng)[0][0].depth for _ in range(4000)
    ]
    assert set(depths) == {0, 1, 2, 3}
    assert all(abs(depths.count(d) - 1000) < 150 for d in range(4))


def test_unknown_policies_are_named():
    with pytest.raises(ValueError, match="Unknown branching policy 'odd': allowed are even"):
        branching_policies['odd']
