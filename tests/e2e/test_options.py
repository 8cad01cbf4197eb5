"""Every option of swift's GRPO that docs/compatibility.md lists, for at least one step of the real trainer on trees.

One rollout server serves them all. Options that need one process run in one, after each other, because most of a
trainer's time here is start-up: this file, run as a script, takes the place of the `swift` command in train.sh.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REWARD = '''
from swift.rewards import ORM, orms
from task import is_correct


class FlatOnce(ORM):
    """All alike in its first call, so that dynamic sampling must ask for more."""
    calls = 0

    def __call__(self, completions, **kwargs):
        FlatOnce.calls += 1
        return [0.0 if FlatOnce.calls == 1 else len(text) / 100 for text in completions]


orms['flat_once'] = FlatOnce
'''

SAY_ENGINE = """
import atexit

import torch.distributed

from treepo_swift.trainer.shared_prefix import head
from treepo_swift.trainer.trainer import TreeGRPOTrainer
move_model = TreeGRPOTrainer._move_model_to_vllm


def say_engine(self, *args, **kwargs):
    stage = getattr(self.model_wrapped, 'zero_optimization_stage', lambda: None)()
    print(f'trained by {type(self.model_wrapped).__name__}, stage {stage}', flush=True)
    move_model(self, *args, **kwargs)


TreeGRPOTrainer._move_model_to_vllm = say_engine
# Left alone, a rank now and then aborts in a destructor of DeepSpeed's process group after all is done.
atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
head.MAX_LOGITS = 10_000  # so that the head is computed in pieces, as with a real vocabulary
"""

ALWAYS_FAILS = """
from swift.rollout import multi_turns
from treepo_swift.server.scheduler import TreeRolloutScheduler


class Fails(TreeRolloutScheduler):
    def check_segment(self, path, text):
        raise KeyError('no such tool')


multi_turns['always_fails'] = Fails
"""

SMALL = (
    '--per_device_train_batch_size 32 --reward_funcs digit_sum soft_overlong --soft_cache_length 120 --save_strategy no'
)
"""4 prompts of 8. The second reward falls with length from 8 tokens on, so that hardly any two rewards are alike."""

TWO = '--max_steps 2'
MINI_BATCHES = '--gradient_accumulation_steps 2 --per_device_train_batch_size 16'
CASES: dict[str, tuple[str, str]] = {
    # name: (flags, `key=value` pairs of the tree config); one step unless the flags say more
    'grpo': (f'--loss_type grpo --beta 0.04 --epsilon_high 0.28 --log_completions true {TWO}', ''),
    'num_iterations': (f'--loss_type grpo --num_iterations 2 {TWO}', 'advantage.estimator=progress'),
    'bnpo': (f'--loss_type bnpo --overlong_filter true {MINI_BATCHES}', 'advantage.estimator=progress'),
    'dr_grpo': ('--loss_type dr_grpo --scale_rewards none', 'advantage.normalisation=none advantage.weighting=size'),
    'dapo': (
        '--loss_type dapo --scale_rewards batch --log_entropy true --top_entropy_quantile 0.5',
        'advantage.estimator=spo',
    ),
    'cispo': ('--loss_type cispo --epsilon_high 5', 'advantage.estimator=treerl advantage.normalisation=group'),
    'sapo': ('--loss_type sapo', 'advantage.estimator=progress'),
    'real': (f'--loss_type real {TWO}', 'advantage.normalisation=none'),
    'fipo': ('--loss_type fipo --delta 3', 'advantage.estimator=progress'),
    'kl_in_reward': (f'--kl_in_reward true --beta 0.04 {TWO}', 'advantage.normalisation=group'),
    'dynamic_sample': (f'--dynamic_sample true --reward_funcs flat_once {TWO}', ''),
    'async_generate': ('--async_generate true --max_steps 3', 'advantage.estimator=progress'),
    'async_evaluation': (f'--async_generate true {TWO} {{evaluation}}', ''),
    'evaluation': ('{evaluation}', ''),
    'eval_trees': ('{evaluation}', 'eval_trees=true advantage.estimator=progress'),
    'rollout_importance_sampling': (
        f'--rollout_importance_sampling_mode token_truncate {TWO}',
        'advantage.estimator=progress',
    ),
    'rollout_sequence_mask': ('--rollout_importance_sampling_mode sequence_mask', ''),
    'off_policy_sequence_mask': (
        f'--num_iterations 2 --off_policy_sequence_mask_delta 1 {TWO}',
        'advantage.estimator=progress',
    ),
    'gspo': ('--loss_type grpo --importance_sampling_level sequence', ''),
    'gspo_token': ('--loss_type grpo --importance_sampling_level sequence_token', 'advantage.estimator=spo'),
    'steps_per_generation': (
        f'--steps_per_generation 4 --per_device_train_batch_size 8 {TWO}',
        'advantage.estimator=progress',
    ),
    'teacher': ('--teacher_model {model} --teacher_model_type qwen2', 'advantage.estimator=progress'),
    'lora': (f'--tuner_type lora --beta 0.04 {TWO}', ''),
    'delete_long_prompts': ('--truncation_strategy delete --gradient_checkpointing true', ''),
    'row_by_row': (TWO, 'shared_prefix.enabled=false shared_prefix.skip_old_logprobs=false'),
}
EVALUATION = (
    '--val_dataset {model}/heldout.jsonl --eval_strategy steps --eval_steps 1 --per_device_eval_batch_size 16 '
    '--num_generations_eval 4'
)
SEGMENT_LEVEL = ('progress', 'spo', 'treerl')

REFUSED: dict[str, tuple[str, str, str]] = {
    'advantage_estimator': ('--advantage_estimator rloo', '', 'the estimator is set in the tree config'),
    'scale_rewards': ('--scale_rewards none', '', 'TREEPO_ADVANTAGE__NORMALISATION=none'),
    'sequence': ('--importance_sampling_level sequence', 'advantage.estimator=spo', 'Use sequence_token'),
    'eval_on_start': ('--async_generate true --eval_on_start true {evaluation}', '', 'trains on the evaluation'),
    'max_depth': ('', 'max_depth=5', '5 x 32 = 160 tokens is over --max_completion_length = 128'),
}


@pytest.fixture(scope='module')
def port(serve: Callable[..., int]) -> int:
    """One rollout server for all tests of this file."""
    return serve()


@pytest.fixture(scope='module')
def outcomes(port: int, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a single process that has run every case of CASES and REFUSED."""
    folder = tmp_path_factory.mktemp('options')
    script = folder / 'bin' / 'swift'
    script.parent.mkdir()
    script.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    script.chmod(0o755)
    write_cases(folder, environment['MODEL'], [*CASES, *(f'refused_{name}' for name in REFUSED)])
    path = f'{script.parent}{os.pathsep}{environment["PATH"]}'
    result = train(port, environment, folder, timeout=1500, CASES=str(folder), PATH=path)
    (folder / 'log').write_text(result.stdout + result.stderr)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return folder


def read_config(text: str) -> dict[str, str]:
    return dict(pair.split('=') for pair in text.split())


def write_cases(folder: Path, model: str, names: list[str]) -> None:
    (folder / 'reward.py').write_text(REWARD)
    cases = {**CASES, **{f'refused_{name}': (flags, config) for name, (flags, config, _) in REFUSED.items()}}
    (folder / 'cases.json').write_text(
        json.dumps(
            [
                {
                    'name': name,
                    'flags': f'{SMALL} {cases[name][0]}'.replace('{evaluation}', EVALUATION)
                    .replace('{model}', model)
                    .split(),
                    'config': read_config(cases[name][1]),
                }
                for name in names
            ]
        )
    )


def train(
    port: int, environment: dict[str, str], folder: Path, *args: str, timeout: float = 400, **env: str
) -> subprocess.CompletedProcess[str]:
    """The quickstart's train.sh for one step on short responses, with the test's reward function."""
    from tests.e2e.conftest import QUICKSTART, free_port, run_whole

    text = (QUICKSTART / 'train.sh').read_text().replace('$here', str(QUICKSTART))
    script = folder / 'train.sh'
    script.write_text(text.replace(f'"{QUICKSTART}/reward.py"', f'"{QUICKSTART}/reward.py" "{folder}/reward.py"'))
    return run_whole(
        ['bash', str(script), '--max_completion_length', '128', '--check_model', 'false', *args],
        timeout=timeout,
        env={
            **environment,
            'PORT': str(port),
            'GROUP_PORT': str(free_port()),
            'MASTER_PORT': str(free_port()),
            'STEPS': '1',
            'OUTPUT': str(folder / 'train'),
            'TREEPO_MAX_DEPTH': '4',
            **env,
        },
    )


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of logging.jsonl, numbers as numbers."""
    rows = []
    for line in (directory / 'logging.jsonl').read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            try:
                row[key] = float(value)
            except (TypeError, ValueError):
                pass
        rows.append(row)
    return rows


def check_training(directory: Path, *, steps: int, trees: int = 4) -> list[dict[str, Any]]:
    """Every step trained on trees, with a finite loss that moved the weights; returns the steps' rows."""
    rows = [row for row in read_rows(directory) if 'loss' in row]
    assert len(rows) == steps
    for row in rows:
        assert math.isfinite(row['loss']) and math.isfinite(row['grad_norm']) and row['grad_norm'] > 0
    grown = [row for row in rows if 'tree/trees' in row]
    assert grown
    for row in grown:
        assert row['tree/trees'] == trees * row['tree/rounds'] and row['tree/failures'] == 0
        assert 0 < row['tree/decoded_tokens'] < row['tree/independent_tokens']
        assert row['tree/flat_trees'] < 1
    assert all(row['tree/sync_gap'] < 2e-3 for row in rows if 'tree/sync_gap' in row)
    check_trees_on_disk(directory, trees)
    return rows


def check_trees_on_disk(directory: Path, trees: int) -> None:
    """train.sh has --log_completions true: whatever the options, each batch is kept with what it trained on."""
    from treepo_swift.view import load

    batches: dict[tuple[int, str], list[Any]] = {}
    for record in load(directory):
        batches.setdefault((record.step, record.mode), []).append(record)
    assert (1, 'train') in batches
    for (_, mode), records in batches.items():
        assert len(records) == trees or mode == 'eval'
        for record in records:
            assert record.prompt.startswith('<|im_start|>') and all(record.texts())
            for node in record.nodes:
                assert len(node.tokens) == len(node.pieces)
                assert len(node.logprobs or []) == (len(node.tokens) if node.kind == 'segment' else 0)
        advantages = [t.advantage for record in records for t in record.trajectories]
        assert mode == 'eval' or len(set(advantages)) > 1


@pytest.fixture
def case(outcomes: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The outcome of the case that the test is parametrised with, its training checked."""
    name = getattr(request, 'param', None) or request.node.name.removeprefix('test_')
    outcome = json.loads((outcomes / f'{name}.json').read_text())
    assert outcome['error'] is None, outcome['error'] + '\n' + (outcomes / 'log').read_text()[-5000:]
    estimator = read_config(CASES[name][1]).get('advantage.estimator', 'treepo')
    # A segment-level estimator gives some trajectory's tokens different advantages; others none. A teacher always does.
    different = max(outcome['values_per_row'])
    assert different > 1 if estimator in SEGMENT_LEVEL else different == 1
    flags = CASES[name][0].split()
    steps = int(flags[flags.index('--max_steps') + 1]) if '--max_steps' in flags else 1
    return {**outcome, 'directory': outcomes / name, 'rows': check_training(outcomes / name, steps=steps)}


SPECIAL = (
    'dynamic_sample',
    'async_evaluation',
    'evaluation',
    'eval_trees',
    'rollout_importance_sampling',
    'kl_in_reward',
    'grpo',
    'row_by_row',
)


@pytest.mark.parametrize('case', [name for name in CASES if name not in SPECIAL], indirect=True)
def test_trains(case):
    assert case['rows']


def test_grpo(case):
    assert all(row['kl'] >= 0 for row in case['rows'])
    table = [json.loads(line) for line in (case['directory'] / 'completions.jsonl').read_text().splitlines()]
    logged = [
        value
        for row in table
        for value in (row['advantages'] if isinstance(row['advantages'], list) else [row['advantages']])
    ]
    assert any(abs(value) > 0.1 for value in logged)


def test_kl_in_reward(case):
    assert all(math.isfinite(row['kl']) for row in case['rows']) and abs(case['rows'][-1]['kl']) > 0


def test_dynamic_sample(case):
    """The first rollout was all alike, so its trees were replaced; those count in what the step took."""
    assert [row['tree/rounds'] for row in case['rows']] == [2, 1]
    assert case['rows'][0]['tree/flat_trees'] >= 0.5 and case['rows'][0]['reward_std'] > 0


@pytest.mark.parametrize('case', ['evaluation', 'async_evaluation'], indirect=True)
def test_evaluation_samples_independently(case):
    evaluated = [row for row in read_rows(case['directory']) if 'eval_reward' in row]
    assert evaluated and all(row['eval_tree/failures'] == 0 for row in evaluated)
    assert {key for row in evaluated for key in row if key.startswith('eval_tree/')} == {'eval_tree/failures'}


def test_eval_trees(case):
    evaluated = [row for row in read_rows(case['directory']) if 'eval_reward' in row]
    assert evaluated and all(row['eval_tree/trees'] == 4 for row in evaluated)


def test_rollout_importance_sampling(case):
    """Log-probs of the rollout are those of exactly the trained tokens: both sides agree to rounding."""
    for row in case['rows']:
        assert row['rollout_correction/is_weight_mean'] == pytest.approx(1, abs=1e-3)
        assert row['rollout_correction/k3_kl'] < 1e-5


def test_row_by_row(case):
    """Told to share no prefixes. That they are shared where nothing is said is seen in test_loop.py."""
    assert all(row['tree/train_token_ratio'] <= 1.2 and row['tree/logprob_seconds'] > 0 for row in case['rows'])


@pytest.mark.parametrize('name', REFUSED)
def test_refused_before_a_model_loads(outcomes, name):
    outcome = json.loads((outcomes / f'refused_{name}.json').read_text())
    assert outcome['error'].startswith('ConfigError') and REFUSED[name][2] in outcome['error']
    assert not outcome['model_loaded']


@pytest.mark.parametrize(
    'flags, engine',
    [
        ('--use_cpu true --ddp_backend gloo', 'DistributedDataParallel, stage None'),
        ('--deepspeed zero2 --fp16 false', 'DeepSpeedEngine, stage 2'),
        ('--deepspeed zero3 --fp16 false', 'DeepSpeedEngine, stage 3'),
    ],
    ids=['gloo', 'zero2', 'zero3'],
)
def test_two_processes(port, environment, tmp_path, flags, engine):
    """Half of every batch on each rank, 3 prompts a step: the middle one's trajectories sit on both."""
    if 'deepspeed' in flags and importlib.util.find_spec('deepspeed') is None:
        pytest.skip('deepspeed is not installed')
    (tmp_path / 'reward.py').write_text(REWARD + SAY_ENGINE)
    result = train(
        port,
        environment,
        tmp_path,
        *f'{SMALL} --per_device_train_batch_size 12 {flags}'.split(),
        NPROC_PER_NODE='2',
        DS_ACCELERATOR='cpu',
        STEPS='2',
        TREEPO_ADVANTAGE__ESTIMATOR='progress',
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert f'trained by {engine}' in result.stdout
    rows = check_training(tmp_path / 'train', steps=2, trees=3)
    assert all('tree/sync_gap' in row for row in rows)
    said = result.stdout + result.stderr
    assert 'log-probs are computed over the trie' in said and 'shares no prefixes' not in said
    assert all(row['tree/train_token_ratio'] > 1.2 for row in rows)


def test_a_server_that_always_fails_ends_async_generate_on_all_ranks(environment, tmp_path):
    from tests.e2e.conftest import QUICKSTART, ROOT, Service, free_port

    (tmp_path / 'fails.py').write_text(ALWAYS_FAILS)
    (tmp_path / 'reward.py').write_text(REWARD)
    plugins = ['--external_plugins', str(ROOT / 'plugin' / 'treepo_plugin.py'), str(tmp_path / 'fails.py')]
    port = free_port()
    with Service(
        'The rollout server',
        ['bash', str(QUICKSTART / 'rollout.sh'), *plugins],
        log=tmp_path / 'rollout.log',
        env={**environment, 'PORT': str(port), 'SCHEDULER': 'always_fails'},
    ) as service:
        service.wait_for_health(port, timeout=400)
        result = train(
            port,
            environment,
            tmp_path,
            *f'{SMALL} --per_device_train_batch_size 16 --async_generate true'.split(),
            *'--use_cpu true --ddp_backend gloo'.split(),
            NPROC_PER_NODE='2',
            STEPS='3',
        )
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert 'Fails.check_segment' in said and 'no such tool' in said
    # The other rank knows why it ended.
    assert 'Async rollout failed on rank 0: ServerError: The rollout server http://127.0.0.1' in said


def run_all(argv: list[str], folder: Path) -> None:
    """Train every case in this process with train.sh's arguments `argv`; leave an outcome for each in `folder`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from swift.pipelines import rlhf_main
    from swift.pipelines.train.rlhf import SwiftRLHF

    load_model = SwiftRLHF._prepare_model_tokenizer
    from treepo_swift.lab.services import free_port

    for case in json.loads((folder / 'cases.json').read_text()):
        outcome: dict[str, Any] = {'error': None, 'model_loaded': False}
        environ = {f'TREEPO_{key.upper().replace(".", "__")}': value for key, value in case['config'].items()}
        before = {key: os.environ.get(key) for key in environ}
        os.environ.update(environ)
        try:
            outcome['values_per_row'] = watch_advantages()
            SwiftRLHF._prepare_model_tokenizer = lambda self, outcome=outcome: (
                outcome.update(model_loaded=True),
                load_model(self),
            )
            # A port of its own for each: the last case's store may still listen on its port.
            flags = [*argv, *case['flags'], '--output_dir', str(folder / case['name'])]
            flags += ['--vllm_server_group_port', str(free_port())]
            rlhf_main(flags)
        except BaseException as e:
            traceback.print_exc()
            outcome['error'] = f'{type(e).__name__}: {e}'
        finally:
            for key, value in before.items():
                del os.environ[key]
                os.environ.update({key: value} if value is not None else {})
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        (folder / f'{case["name"]}.json').write_text(json.dumps(outcome))


def watch_advantages() -> list[int]:
    """A list that grows by one number per trained batch: most different advantages among one trajectory's tokens."""
    from treepo_swift.trainer.trainer import TreeGRPOTrainer

    seen: list[int] = []
    original = getattr(TreeGRPOTrainer, '_original_compute_loss', TreeGRPOTrainer._compute_loss)

    def compute_loss(self: Any, model: Any, model_inputs: Any, batch: Any, origin_data: Any = None) -> Any:
        rows = zip(batch.advantages, batch.completion_mask)
        seen.append(max(len(values[mask].unique()) for values, mask in rows))
        return original(self, model, model_inputs, batch, origin_data)

    TreeGRPOTrainer._original_compute_loss, TreeGRPOTrainer._compute_loss = original, compute_loss
    return seen


if __name__ == '__main__':
    run_all(sys.argv[2:], Path(os.environ['CASES']))  # argv[1] is `rlhf`
    sys.exit()
