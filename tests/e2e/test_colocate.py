"""Trees on the engine in the trainer's process, by the real CLI and real vLLM: the same as a server's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('vllm')

from tests.e2e import test_options
from tests.e2e.conftest import QUICKSTART, ROOT, free_port, servers_at

HERE = Path(__file__).parent
GYM = ROOT / 'examples' / 'gym'
BATCH = 40
"""5 prompts of 8: over two ranks the middle one is cut in halves."""

CASES = {
    # name: (flags, `key=value` pairs of the tree config)
    'turns': (
        '--use_gym_env true --gym_env number_game --multi_turn_scheduler treepo_gym --max_turns 3 '
        '--dataset {games} --max_completion_length 48 --log_rollout_offpolicy_metrics true',
        'fork_at=turn segment_length=48 max_depth=1 stop.answer=none',
    ),
    'sleep_1_lora': ('--sleep_level 1 --tuner_type lora --offload_optimizer true', 'max_depth=4'),
    'vllm_lora': ('--tuner_type lora --vllm_enable_lora true', 'max_depth=4'),
    'sleep_2_dynamic_sample': (
        '--sleep_level 2 --offload_model true --dynamic_sample true --reward_funcs flat_once',
        'max_depth=4',
    ),
}


def with_plugins(folder: Path, *plugins: Path) -> Path:
    """The quickstart's train.sh with more external plugins."""
    text = (QUICKSTART / 'train.sh').read_text().replace('$here', str(QUICKSTART))
    reward = f'"{QUICKSTART}/reward.py"'
    script = folder / 'train.sh'
    script.write_text(text.replace(reward, ' '.join([reward, *(f'"{plugin}"' for plugin in plugins)])))
    return script


def batches(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_trees_in_every_mode(serve, serve_briefly, train, model, tmp_path):
    """Tokens, nodes and advantages of two steps, with the weights moved in between."""
    port = serve()
    script = with_plugins(tmp_path, HERE / 'record.py')
    evaluation = f'--val_dataset {model}/heldout.jsonl --eval_strategy steps --eval_steps 1 --num_generations_eval 1'
    modes = {
        'server': (['--per_device_train_batch_size', str(BATCH)], {}),
        # 5 prompts on 2 servers: swift's client would cut the middle one in halves.
        'two_servers': (
            ['--per_device_train_batch_size', str(BATCH), *servers_at([port, serve_briefly()])],
            {},
        ),
        'colocate': (
            ['--per_device_train_batch_size', str(BATCH), *evaluation.split(), '--per_device_eval_batch_size', '8'],
            {'COLOCATE': '1'},
        ),
        'two_ranks': (
            f'--per_device_train_batch_size {BATCH // 2} --use_cpu true --ddp_backend gloo'.split(),
            {'COLOCATE': '1', 'NPROC_PER_NODE': '2', 'ACCELERATE_USE_CPU': '1'},
        ),
    }
    for mode, (flags, env) in modes.items():
        result = train(
            port,
            *flags,
            script=script,
            steps=2,
            REWARD_FUNCS='length',
            RECORD=str(tmp_path / mode),
            OUTPUT=str(tmp_path / f'train-{mode}'),
            **env,
        )
        said = result.stdout + result.stderr
        assert result.returncode == 0, said[-5000:]
        assert 'weight sync is proven' in said, said[-5000:]
    server = batches(tmp_path / 'server')
    assert [len(batch) for batch in server] == [BATCH, BATCH] and len({r['tree'] for r in server[0]}) == 5
    for mode in ('two_servers', 'colocate', 'two_ranks'):
        for step, (there, here) in enumerate(zip(server, batches(tmp_path / mode), strict=True)):
            for expected, row in zip(there, here, strict=True):
                for key in ('prompt', 'ids', 'mask', 'nodes'):
                    assert row[key] == expected[key], (mode, step, key)
                assert row['advantage'] == pytest.approx(expected['advantage'], abs=1e-6)
                assert row['logprobs'][0] == pytest.approx(expected['logprobs'][0], abs=1e-3)
    rows = test_options.read_rows(tmp_path / 'train-colocate')
    assert [row['eval_tree/failures'] for row in rows if 'eval_reward' in row] == [0, 0]


@pytest.fixture(scope='module')
def outcomes(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a single process that has run every case of CASES, each with an engine of its own."""
    folder = tmp_path_factory.mktemp('colocate')
    games = folder / 'games'
    subprocess.run([sys.executable, str(GYM / 'number_game_task.py'), '--output', str(games)], check=True)
    swift = folder / 'bin' / 'swift'
    swift.parent.mkdir()
    swift.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{Path(test_options.__file__).resolve()}" "$@"\n')
    swift.chmod(0o755)
    (folder / 'reward.py').write_text(test_options.REWARD)
    cases = [
        {
            'name': name,
            'flags': flags.replace('{games}', f'{games}/train.jsonl').split(),
            'config': test_options.read_config(config),
        }
        for name, (flags, config) in CASES.items()
    ]
    (folder / 'cases.json').write_text(json.dumps(cases))
    script = with_plugins(
        folder, folder / 'reward.py', HERE / 'record.py', HERE / 'fake_sleep.py', GYM / 'number_game.py'
    )
    flags = '--max_completion_length 128 --check_model false --per_device_train_batch_size 32 --save_strategy no'
    result = subprocess.run(
        ['bash', str(script), *flags.split()],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **environment,
            'PATH': f'{swift.parent}{os.pathsep}{environment["PATH"]}',
            'MASTER_PORT': str(free_port()),
            'CASES': str(folder),
            'COLOCATE': '1',
            'REWARD_FUNCS': 'length',
            'RECORD': str(folder / 'record'),
            'STEPS': '2',
            'OUTPUT': str(folder / 'train'),
        },
    )
    (folder / 'log').write_text(result.stdout + result.stderr)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return folder


@pytest.fixture
def rows(outcomes: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The steps of the case that the test is named after, checked."""
    name = request.node.name.removeprefix('test_')
    outcome = json.loads((outcomes / f'{name}.json').read_text())
    assert outcome['error'] is None, outcome['error'] + '\n' + (outcomes / 'log').read_text()[-5000:]
    return test_options.check_training(outcomes / name, steps=2)


def test_turns(rows):
    for row in rows:
        assert 1 < row['num_turns'] <= 3 and row['tree/turns'] > 4
        # The trainer's log-prob of every trained token is the one that vLLM sampled it with.
        assert abs(row['rollout_correction/log_ppl_abs_diff']) < 1e-4


def test_sleep_1_lora(rows, outcomes):
    log = (outcomes / 'log').read_text()
    assert log.count('worker sleeps at level 1') == 3  # before the first step, and after each


def test_vllm_lora(rows):
    """The adapter is the engine's own, and the trainer's is not changed by that: the weights are compared."""
    assert all(row['tree/sync_gap'] < 1e-4 for row in rows)


def test_sleep_2_dynamic_sample(rows, outcomes):
    assert [row['tree/rounds'] for row in rows] == [2, 1]
    log = (outcomes / 'log').read_text()
    assert "worker wakes ['weights']" in log and "worker wakes ['kv_cache']" in log
    assert log.count('worker sleeps at level 2') == 4
