"""No option is read by nobody: each field of `TreeConfig` changes what its owner does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.builders import EOS, grow, make_search, segment_of
from treepo_swift.advantage import estimate, normalise
from treepo_swift.config import TreeConfig
from treepo_swift.config.errors import models_of
from treepo_swift.config.sources import merged
from treepo_swift.core.search import SegmentRequest
from treepo_swift.core.tree import StopReason, response_ids

BASE: dict[str, Any] = {
    'segment_length': 16,
    'max_depth': 5,
    'stop': {'answer': {'needs_eos': False}, 'repetition': 'none'},
}
WIDTH = 12
TOP_KEYS = ('segment_length', 'max_depth', 'divergence', 'root_divergence', 'pacing')
ROOT = Path(__file__).parents[2]
BLOCK = {'policy': 'random_block', 'block': 5}
LOGPROB_BLOCK = {'policy': 'logprob_block', 'block': 5}

# Key of a section's choice: the section that brings it into play, and the value that must make a difference there.
TREE_KEYS: dict[str, tuple[Any, Any]] = {
    'segment_length': (16, 5),
    'max_depth': (5, 3),
    'divergence': (2, 3),
    'root_divergence': (2, (3, 6)),
    'pacing': ('eager', 'even'),
    'branching.policy': ('even', 'logprob'),
    'branching.score': ('logprob', 'sum'),
    'branching.favour': ({'policy': 'entropy', 'temperature': 0.1}, 'high'),
    'branching.temperature': ('logprob', 0.01),
    'branching.schedule': ({'policy': 'logprob', 'temperature': (50.0, 0.01)}, 'sinusoid'),
    'fork_position.policy': ('boundary', 'min_logprob_token'),
    'budget.policy': ({'policy': 'by_segment_tokens', 'tokens': 120}, 'by_trajectory_tokens'),
    'budget.tokens': ({'policy': 'by_trajectory_tokens', 'tokens': 200}, 90),
    'fallback.policy': ('random_segment', 'random_token'),
    'fallback.candidates': ({'policy': 'random_segment'}, 'any'),
    'fallback.window': ('random_token', 1),
    'fallback.cuts': ('random_token', 2),
    'fallback.block': (BLOCK, 3),
    'fallback.favour': (LOGPROB_BLOCK, 'high'),
    'fallback.fill': ('none', 'root'),
    'stop.answer.detector': ('boxed', 'tags'),
    'stop.answer.tags': ('tags', ('b', 'y')),
    'stop.answer.needs_eos': ('boxed', True),
    'stop.repetition': ({'rule': 'windows', 'length': 2, 'count': 2}, {'rule': 'loop', 'repeats': 3, 'characters': 2}),
    'stop.repetition.length': ({'rule': 'windows', 'length': 8, 'count': 2}, 2),
    'stop.repetition.count': ({'rule': 'windows', 'length': 2, 'count': 4}, 2),
    'stop.repetition.repeats': ({'rule': 'loop', 'repeats': 3, 'characters': 4}, 30),
    'stop.repetition.characters': ({'rule': 'loop', 'repeats': 3, 'characters': 4}, 60),
    'stop.order': ((), ('depth_limit', 'eos')),
}
ADVANTAGE_KEYS: dict[str, tuple[Any, Any]] = {
    'advantage.estimator': ('treepo', 'rloo'),
    'advantage.weighting': ('treepo', 'size'),
    'advantage.reject_flat_subgroups': ('treepo', True),
    'advantage.include_root': ('treepo', False),
    'advantage.count_chains': ('treepo', 'per_fork'),
    'advantage.normalisation': ('treepo', 'group'),
}
SCHEDULER, TRAINER = 'tests/integration/test_scheduler.py', 'tests/integration/test_trainer.py'
SHARED = 'tests/integration/test_shared_trainer.py'
COLOCATE = 'tests/integration/test_colocate.py'
ELSEWHERE = {
    'branching.top_k': f'{SCHEDULER}::test_a_config_that_this_server_can_not_follow_is_refused',
    'branching.options': 'tests/unit/test_policies.py::test_options_reach_a_policy_of_ones_own',
    'fork_position.top_k': f'{SCHEDULER}::test_entropies_are_asked_for_where_a_policy_reads_them',
    'fork_position.options': (
        'tests/unit/test_fork_position.py'
        '::test_a_position_of_ones_own_takes_three_lines_and_reads_options_and_entropies'
    ),
    'fallback.top_k': f'{SCHEDULER}::test_entropies_are_asked_for_where_a_policy_reads_them',
    'fallback.options': 'tests/unit/test_policies.py::test_options_reach_a_policy_of_ones_own',
    'advantage.options': 'tests/unit/test_estimators.py::test_options_reach_an_estimator_of_ones_own',
    'stop.repetition.near_characters': 'tests/unit/test_stopping.py::test_near_loops_are_found_where_asked',
    'stop.answer.after': f'{SCHEDULER}::test_an_answer_is_found_across_segments_and_cut_where_asked',
    'shared_prefix.enabled': f'{SHARED}::test_it_can_be_switched_off',
    'shared_prefix.skip_old_logprobs': f'{SHARED}::test_old_log_probs_are_left_out_only_where_asked',
    'shared_prefix.max_tokens': f'{SHARED}::test_what_does_not_fit_is_not_joined',
    'trace.rate': f'{SCHEDULER}::test_a_trace_goes_with_the_first_trajectory_where_it_is_asked_for',
    'seed': f'{SCHEDULER}::test_the_configs_seed_and_the_step_change_the_tree',
    'faults.max_retries': f'{SCHEDULER}::test_engine_errors_are_retried_and_then_grown_around',
    'faults.max_failure_fraction': f'{SCHEDULER}::test_an_engine_that_is_gone_is_one_clear_error',
    'faults.hook_timeout': f'{SCHEDULER}::test_bad_hooks_are_named',
    'faults.max_hung_hooks': 'tests/integration/test_hooks.py',
    'faults.stall_timeout': f'{COLOCATE}::test_a_rollout_that_stands_still_ends_and_says_where',
    'faults.reward_timeout': (
        'tests/integration/test_reward_deadline.py::test_a_reward_function_that_hangs_ends_the_training_by_its_name'
    ),
    'checks.require_trainer': f'{SCHEDULER}::test_the_plain_trainer_may_be_allowed',
    'checks.verify_weight_sync': f'{TRAINER}::test_the_weights_are_proven_unless_told_otherwise',
    'eval_trees': f'{TRAINER}::test_evaluation_asks_for_trees_only_where_told',
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
        search.forks._context = dataclasses.replace(search.forks._context, progress=0.9)
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
    settings = config.advantage.model_dump(exclude={'normalisation', 'options'})
    raw = estimate(paths, rewards, **settings)
    return normalise(raw, lengths, [path[0] for path in paths], how=config.advantage.normalisation)


def keys_of(model: type[BaseModel], prefix: str = '') -> set[str]:
    found: set[str] = set()
    for name in model.model_fields:
        members = models_of(model, name)
        found |= {key for member in members for key in keys_of(member, f'{prefix}{name}.')} or {f'{prefix}{name}'}
    return found


def test_every_key_is_covered():
    assert keys_of(TreeConfig) - {'stop.repetition.rule'} == {*TREE_KEYS, *ADVANTAGE_KEYS, *ELSEWHERE} - {
        'stop.repetition'
    }


def test_what_covers_a_key_elsewhere_exists():
    for place in ELSEWHERE.values():
        file, _, test = place.partition('::')
        assert f'def {test}' in (ROOT / file).read_text(), place


def with_value(config: TreeConfig, key: str, value: Any) -> TreeConfig:
    for name in reversed(key.split('.')):
        value = {name: value}
    return TreeConfig(**merged(config.to_note(), value))


@pytest.mark.parametrize('key', [*TREE_KEYS, *ADVANTAGE_KEYS])
def test_a_key_changes_what_happens(key):
    observe: Callable[[TreeConfig], Any] = trees if key in TREE_KEYS else advantages
    chosen, value = {**TREE_KEYS, **ADVANTAGE_KEYS}[key]
    section, _, name = key.rpartition('.')
    base = TreeConfig(**{**BASE, 'max_depth': 3 if key == 'fallback.candidates' else 5})
    at = key if name in (*TOP_KEYS, 'order', 'repetition') else section
    before = with_value(base, at, chosen)
    after = with_value(base if at == key else before, key, value)
    assert before != after and observe(before) == observe(before)
    assert observe(before) != observe(after)
