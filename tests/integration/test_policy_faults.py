"""A branching or cut policy that raises fails its own tree, and is named."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('swift')

from tests.builders import segment_of
from tests.integration.fake_engine import FakeEngine
from tests.integration.test_scheduler import requests, rollout, scheduler, tree_of
from treepo_swift.config import TreeConfig
from treepo_swift.core.policies.branching import branching_policies
from treepo_swift.core.policies.fallback import cut_policies
from treepo_swift.core.policies.fork_position import fork_positions
from treepo_swift.core.tree import StopReason
from treepo_swift.server.failures import RolloutError
from treepo_swift.server.scheduler import TreeRolloutScheduler


def odd_prompt(paths: list[Any]) -> bool:
    """Trees of prompts that end with x are those that the policies fail on: their paths repeat the letter."""
    return chr(paths[0].leaf.lineage()[0].token_ids[0]) == 'x'


def raises_at_a_boundary(paths, total, context):
    if odd_prompt(paths) and paths[0].leaf.depth == 2:
        raise ZeroDivisionError('no entropy')
    return [total // len(paths) + (index < total % len(paths)) for index in range(len(paths))]


def gives_rubbish(paths, total, context):
    return 'two each' if odd_prompt(paths) else raises_at_a_boundary(paths, total, context)


def cut_raises(path, context):
    if odd_prompt([path]):
        raise IndexError('no such token')
    return context.low


def cut_is_outside(path, context):
    return context.high + 1 if odd_prompt([path]) else context.low


CASES = {
    'branching raises': (
        branching_policies,
        raises_at_a_boundary,
        'branching',
        "branching policy 'fault_test' raised ZeroDivisionError: no entropy",
    ),
    'branching returns rubbish': (
        branching_policies,
        gives_rubbish,
        'branching',
        "branching policy 'fault_test' returned 'two each'",
    ),
    'cut raises': (cut_policies, cut_raises, 'fallback', "fallback 'fault_test' raised IndexError: no such token"),
    'position is outside': (
        fork_positions,
        cut_is_outside,
        'fork_position',
        "fork position 'fault_test' returned 5, allowed are 0 to 4 tokens",
    ),
    'cut is outside': (cut_policies, cut_is_outside, 'fallback', "fallback 'fault_test' returned"),
}


def speak(context: list[int], max_tokens: int, seed: int):
    """The prompt's last letter over and over; for fallback to be needed, the answer ends in its second segment."""
    first = len(context) == 1
    stop = None if first else StopReason.EOS
    return segment_of([context[0]] * max_tokens, stop if seed % 2 else None)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('by_segment', [False, True])
def test_a_policy_that_fails_ends_its_own_tree(case, by_segment, monkeypatch):
    registry, policy, section, complaint = CASES[case]
    monkeypatch.setitem(registry._entries, 'fault_test', policy)
    config = TreeConfig(
        segment_length=4,
        max_depth=3,
        stop={'answer': 'none', 'repetition': 'none'},
        fallback={'policy': 'fault_test', 'candidates': 'any'} if section == 'fallback' else 'random_segment',
        branching='fault_test' if section == 'branching' else 'even',
        fork_position='fault_test' if section == 'fork_position' else 'boundary',
        divergence=1 if section == 'fallback' else 2,
        root_divergence=2,
    )
    engine = FakeEngine(speak=speak)
    target = scheduler(engine)
    target.by_segment = by_segment
    outputs = rollout(requests(*['x'] * 8, *['a'] * 8, *['b'] * 8, config=config), target, seed=1)
    errors = [tree_of(o).get('error') for o in outputs]
    assert all(error is None for error in errors[8:])
    failed = [error for error in errors[:8] if error]
    assert failed and all(complaint in error for error in failed)
    assert engine.running == 0

    strict = config.replace(faults={'max_failure_fraction': 0.0})
    with pytest.raises(RolloutError) as caught:
        rollout(requests(*['x'] * 8, *['a'] * 8, config=strict), scheduler(engine), seed=1)
    assert complaint in str(caught.value)


def test_a_search_that_can_not_start_fails_its_tree(monkeypatch):
    """The prompt has no room: said before the first request, and no other tree hears of it."""
    outputs = rollout(requests('x' * 100, 'x' * 100, 'a', 'a'), scheduler(FakeEngine(max_model_len=100)))
    assert ['error' in tree_of(o) for o in outputs] == [True, True, False, False]


@pytest.mark.parametrize('kind', [False, True], ids=['sync', 'async'])
def test_a_check_that_raises_fails_its_path_only(kind):
    def check(path: Any) -> None:
        if path.id == 2:
            raise KeyError('board')

    class Sync(TreeRolloutScheduler):
        def check_segment(self, path, text):
            check(path)

    class Async(TreeRolloutScheduler):
        async def check_segment(self, path, text):
            check(path)

    outputs = rollout(requests(*['a'] * 4), scheduler(cls=Async if kind else Sync))
    assert all('error' not in tree_of(o) for o in outputs)
    assert tree_of(outputs[0])['stats']['failures'] == 1
