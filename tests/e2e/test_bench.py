"""`treepo-swift bench` on a real engine, and what `simulate` makes of its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import run_whole

ENGINE = [
    '--model_type',
    'qwen2',
    '--template',
    'chatml',
    '--torch_dtype',
    'float32',
    '--vllm_enforce_eager',
    'true',
    '--vllm_max_model_len',
    '256',
    '--vllm_engine_kwargs',
    '{"block_size": 32}',
]


@pytest.fixture
def command(environment: dict[str, str], model: Path):
    def run(*args: str, engine: bool = True, **env: str) -> subprocess.CompletedProcess:
        return run_whole(
            [
                sys.executable,
                '-m',
                'treepo_swift.cli.main',
                *args,
                *(['--', '--model', str(model), *ENGINE] if engine else []),
            ],
            timeout=300,
            env={**environment, 'VLLM_CPU_KVCACHE_SPACE': '1', **env},
        )

    return run


def test_a_bench_counts_what_it_says_and_feeds_the_simulator(command, tmp_path):
    found = tmp_path / 'bench.json'
    done = command(
        'bench',
        '--prompts',
        '2',
        '--width',
        '4',
        '--repeats',
        '2',
        '--json',
        str(found),
        TREEPO_SEGMENT_LENGTH='32',
        TREEPO_MAX_DEPTH='4',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text())
    modes = result['modes']
    assert set(modes) == {'independent', 'lockstep', 'stream'} and set(result['lengths']) == {128}
    # Levels of 2, 4, 4 and 4 segments.
    tokens = {'independent': 4 * 128, 'lockstep': 14 * 32}
    for mode, expected in tokens.items():
        assert modes[mode]['decoded_tokens_per_trajectory'] == expected / 4
    # What streams have sampled past a segment when they stop is counted; these stop at their limit.
    assert modes['stream']['decoded_tokens_per_trajectory'] == tokens['lockstep'] / 4
    assert modes['lockstep']['requests_per_trajectory'] == 14 / 4
    assert modes['stream']['requests_per_trajectory'] == modes['independent']['requests_per_trajectory'] == 1
    assert modes['stream']['prefilled_tokens_per_trajectory'] < modes['lockstep']['prefilled_tokens_per_trajectory']
    assert all(mode['prefix_hit_rate'] > 0 and len(mode['seconds']['all']) == 2 for mode in modes.values())
    assert 0 < modes['stream']['scheduler_cpu_share'] < 0.5
    assert modes['stream']['evicted_tokens_per_trajectory'] == modes['lockstep']['evicted_tokens_per_trajectory'] == 0

    engine = tmp_path / 'engine.json'
    engine.write_text(
        json.dumps(
            {
                'step_seconds': 0.005,
                'step_seconds_per_sequence': 1e-4,
                'step_seconds_per_context_token': 0.0,
                'prefill_seconds_per_token': 1e-5,
            }
        )
    )
    done = command('simulate', '--engine', str(engine), '--validate', str(found), engine=False)
    assert done.returncode == 0, done.stderr
    assert all(mode in done.stdout for mode in modes) and '%' in done.stdout


def test_answers_end_where_the_workload_says(command, tmp_path):
    lengths, found = tmp_path / 'lengths.json', tmp_path / 'bench.json'
    lengths.write_text(json.dumps([20, 50]))
    done = command(
        'bench',
        '--workload',
        'lengths',
        '--lengths',
        str(lengths),
        '--prompts',
        '2',
        '--width',
        '4',
        '--repeats',
        '1',
        '--json',
        str(found),
        TREEPO_SEGMENT_LENGTH='32',
        TREEPO_MAX_DEPTH='4',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(found.read_text())['lengths']) <= {20, 50}


def test_a_whole_step_is_measured_by_one_command(command, tmp_path):
    """Rollouts in a process of their own, then the pass over the very rows that they grew."""
    found = tmp_path / 'step.json'
    asked = ('--train', '--prompts', '2', '--width', '4', '--repeats', '1', '--json', str(found))
    done = command('bench', *asked, TREEPO_SEGMENT_LENGTH='32', TREEPO_MAX_DEPTH='4')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith('| times as fast')
    result = json.loads(found.read_text())
    rollouts, training = result['rollouts'], result['training']
    assert set(rollouts['modes']) == {'independent', 'stream'}
    # Two trees of four answers with 128 tokens; levels of 2, 4, 4 and 4 segments, and each prompt once.
    prompts = rollouts['settings']['prompt_tokens']
    assert training['row_tokens'] == 8 * (prompts + 128) and training['rows'] == 8
    assert training['trie_tokens'] <= 2 * (prompts + 14 * 32)
    assert training['modes']['shared']['gap'] < 1e-3
    assert all(seconds > 0 for parts in result['steps'].values() for seconds in parts.values())


@pytest.mark.parametrize(
    'args, message',
    [
        (['--modes', 'independent,tree'], 'unknown tree; allowed are independent, lockstep, stream, example'),
        (['--modes', 'example'], '--example FILE belongs to --modes'),
        (['--workload', 'lengths'], '--lengths FILE belongs to --workload lengths'),
        (['--width', '0'], 'must be at least 1'),
        (['--data', os.devnull], 'has 0 prompts, --prompts asks for 12'),
    ],
)
def test_what_can_not_work_is_refused_before_an_engine_starts(command, args, message):
    done = command('bench', *args)
    assert done.returncode == 1 and message in done.stderr
