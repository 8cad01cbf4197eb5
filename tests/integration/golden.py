"""Writes and reads `golden.json`: 50 seeded trees, as they were before the package got its rooms. Since then only the
order of a tree's trajectories has changed: depth-first."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name('golden.json')
BATCHES = 25
"""Of two prompts each."""


def flat_config(seed: int) -> dict[str, Any]:
    """A config in the flat keys of that time, drawn from everything that a user could write."""
    dice = random.Random(seed)
    budget = dice.choice(['by_width', 'by_width', 'by_width', 'by_segment_tokens', 'by_trajectory_tokens'])
    length = dice.choice([8, 16, 20])
    return {
        'schedule': dice.choice(['stream', 'lockstep']),
        'segment_length': length,
        'max_depth': dice.randint(2, 6),
        'divergence': dice.choice([1, 2, 3, [1, 3]]),
        'root_divergence': dice.choice([1, 2, 4, [2, 6]]),
        'branching': dice.choice(['even', 'logprob', 'entropy']),
        'branch_score': dice.choice(['sum', 'mean', 'last_segment']),
        'branch_favour': dice.choice(['low', 'high']),
        'branch_temperature': dice.choice([0.1, 1.0, [5.0, 1.0]]),
        'branch_schedule': dice.choice(['linear', 'cosine', 'sinusoid']),
        'pacing': dice.choice(['eager', 'even', {2: 3, 4: 8}]),
        'budget': budget,
        'budget_tokens': 0 if budget == 'by_width' else length * dice.randint(4, 30),
        'fallback': dice.choice(
            ['random_segment', 'random_token', 'random_block', 'min_logprob_token', 'logprob_block', 'root', 'none']
        ),
        'fallback_candidates': dice.choice(['answer_or_eos', 'finished', 'best_reason_first', 'any']),
        'fallback_window': dice.choice([0, 1, 2]),
        'fallback_block': dice.choice([5, 16]),
        'fallback_favour': dice.choice(['low', 'high']),
        'fallback_fill': dice.choice(['placeholder', 'root']),
        'answer': dice.choice(['boxed', 'boxed', 'none']),
        'answer_needs_eos': dice.choice([False, False, True]),
        'after_answer': dice.choice(['keep', 'cut']),
        'stop_at_repetition': dice.choice([True, False]),
        'repetition_length': 3,
        'repetition_count': 4,
        'stop_order': dice.choice([[], ['repetition'], ['depth_limit', 'eos']]),
        'seed': seed,
    }


def summary(output: Any) -> dict[str, Any]:
    """What is compared of one output."""
    tokens = [output.response_token_ids, output.response_loss_mask, output.rollout_logprobs]
    report = dict(output.rollout_infos['tree'])
    report.pop('batch', None)
    stats = report.get('stats')
    if stats:
        # How far other paths were ahead is a matter of time; what a path's end made of it is not.
        report['stats'] = {key: value for key, value in stats.items() if key != 'decoded_tokens'}
    return {
        'id': output.response.id,
        'finish_reason': output.response.choices[0].finish_reason,
        'messages': hashlib.blake2b(json.dumps(output.messages).encode(), digest_size=8).hexdigest(),
        'tokens': hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).hexdigest(),
        'num_turns': output.rollout_infos['num_turns'],
        'report': json.loads(json.dumps(report)),
    }


def grow(batch: Callable[[int, dict[str, Any]], list[Any]]) -> list[list[dict[str, Any]]]:
    """The outputs of all batches; `batch` grows one of a seed and a flat config."""
    return [[summary(output) for output in batch(seed, flat_config(seed))] for seed in range(BATCHES)]
