"""No option is read by nobody: each field of `TreeConfig` changes what its owner does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.builders import EOS, grow, make_search, segment_of
from treepo_swift.advantage import estimate, normalise
from treepo_swift.config import TreeConfig
from treepo_swift.core.search import SegmentRequest
from treepo_swift.core.tree import StopReason, response_ids

BASE = TreeConfig(segment_length=16, max_depth=5, fallback_block=5)
WIDTH = 12

# Field: the settings that bring it into play, and the value that must make a difference there.
TREE_FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    'segment_length': ({}, 5),
    'max_depth': ({}, 3),
    'divergence': ({}, 3),
    'root_divergence': ({}, (3, 6)),
    'branching': ({}, 'logprob'),
    'branch_score': ({'branching': 'logprob'}, 'sum'),
    'branch_favour': ({'branching': 'entropy', 'branch_temperature': 0.1}, 'high'),
    'branch_temperature': ({'branching': 'logprob'}, 0.01),
    'branch_schedule': ({'branching': 'logprob', 'branch_temperature': (50.0, 0.01)}, 'sinusoid'),
    'pacing': ({}, 'even'),
    'budget': ({'budget_tokens': 120, 'budget': 'by_segment_tokens'}, 'by_trajectory_tokens'),
    'budget_tokens': ({'budget': 'by_trajectory_tokens', 'budget_tokens': 200}, 90),
    'fallback': ({}, 'random_token'),
    'fallback_candidates': ({'max_depth': 3}, 'any'),
    'fallback_window': ({'fallback': 'random_token'}, 1),
    'fallback_block': ({'fallback': 'random_block'}, 3),
    'fallback_favour': ({'fallback': 'logprob_block'}, 'high'),
    'fallback_start': ({'divergence': 1}, 'early'),
    'fallback_fill': ({'fallback': 'none'}, 'root'),
    'answer': ({}, 'tags'),
    'answer_tags': ({'answer': 'tags'}, ('b', 'y')),
    'answer_needs_eos': ({}, True),
    'stop_at_repetition': ({'repetition_length': 2, 'repetition_count': 2}, False),
    'repetition_length': ({'repetition_length': 8, 'repetition_count': 2}, 2),
    'repetition_count': ({'repetition_length': 2, 'repetition_count': 4}, 2),
    'stop_order': ({'max_depth': 2}, ('depth_limit',)),
}
ADVANTAGE_FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    'estimator': ({}, 'rloo'),
    'weighting': ({}, 'size'),
    'reject_flat_subgroups': ({}, True),
    'include_root': ({}, False),
    'count_chains': ({}, 'per_fork'),
    'normalisation': ({}, 'group'),
    'whiten_shift_mean': ({'estimator': 'treepo'}, False),
}
ELSEWHERE = {
    'schedule': 'tests/unit/test_search.py::test_stream_and_lockstep_grow_the_same_tree',
    'tree_order': 'tests/integration/test_scheduler.py::test_the_longest_trees_start_first_where_asked',
    'entropy_top_k': 'tests/integration/test_scheduler.py::test_a_config_that_this_server_can_not_follow_is_refused',
    'after_answer': 'tests/integration/test_scheduler.py::test_an_answer_is_found_across_segments_and_cut_where_asked',
    'seed': 'tests/integration/test_scheduler.py::test_the_configs_seed_and_the_step_change_the_tree',
    'max_retries': 'tests/integration/test_scheduler.py',
    'max_failure_fraction': 'tests/integration/test_scheduler.py',
    'hook_timeout': 'tests/integration/test_scheduler.py',
    'require_trainer': 'tests/integration/test_scheduler.py',
    'verify_weight_sync': 'tests/integration/test_trainer.py',
    'eval_trees': 'tests/integration/test_trainer.py',
    'fork_at': 'tests/unit/test_search_turns.py::test_paths_fork_where_fork_at_says',
    'fork_state': 'tests/integration/test_turns.py::test_state_forks_with_its_path_and_is_released',
}


def speak(request: SegmentRequest):
    """Babble of letters that differ in probability, with a closing brace now and then, and EOS."""
    dice = random.Random(f'{request.seed}{response_ids(request.prefix)}')
    ids: list[int] = []
    while len(ids) < request.max_tokens:
        ids += list(dice.choice([b'a', b'b', b'y', b'\\boxed{1}', b'<answer>u</answer>', b'abab', b'q', b'z']))
        if dice.random() < 0.1:
            return segment_of([*ids[: request.max_tokens - 1], EOS], StopReason.EOS)
    return segment_of(ids[: request.max_tokens])


def trees(config: TreeConfig) -> list[list[tuple]]:
    grown = []
    for seed in range(12):
        search = make_search(config, WIDTH, seed=seed)
        search._context = dataclasses.replace(search._context, progress=0.9)
        grow(search, answer=speak)
        grown.append([(path.stop, response_ids(path.leaf)) for path in search.tree.trajectories])
    return grown


def advantages(config: TreeConfig) -> list[float]:
    paths = [
        ['u', 1, 2, 3, 4],
        ['u', 1, 2, 3, 5],
        ['u', 1, 2, 6, 7],
        ['u', 8, 9],
        ['u', 8, 10],
        ['u', 11],
        ['v', 1],
        ['v', 2],
    ]
    rewards, lengths = [1, 0, 1, 0, 0, 1, 0, 1], [10, 20, 30, 40, 5, 6, 7, 8]
    raw = estimate(
        paths,
        rewards,
        estimator=config.estimator,
        weighting=config.weighting,
        reject_flat_subgroups=config.reject_flat_subgroups,
        include_root=config.include_root,
        count_chains=config.count_chains,
    )
    return normalise(
        raw, lengths, [path[0] for path in paths], how=config.normalisation, shift_mean=config.whiten_shift_mean
    )


def test_every_field_is_covered():
    fields = {field.name for field in dataclasses.fields(TreeConfig)}
    assert fields == {*TREE_FIELDS, *ADVANTAGE_FIELDS, *ELSEWHERE}


@pytest.mark.parametrize('name', [*TREE_FIELDS, *ADVANTAGE_FIELDS])
def test_a_field_changes_what_happens(name):
    observe: Callable[[TreeConfig], Any] = trees if name in TREE_FIELDS else advantages
    settings, value = {**TREE_FIELDS, **ADVANTAGE_FIELDS}[name]
    before = dataclasses.replace(BASE, **settings)
    after = dataclasses.replace(before, **{name: value})
    assert before != after and observe(before) == observe(before)
    assert observe(before) != observe(after)
