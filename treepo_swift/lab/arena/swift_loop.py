"""One run by the real loop: `swift rollout` grows the trees, `swift rlhf` trains, both unmodified."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from treepo_swift.compat import cpu
from treepo_swift.lab.services import Service, free_port, offline_environment
from treepo_swift.plugin import FILE

from .export import export_model, export_problems
from .model import pretrained
from .runs import RUN_VARIABLE, Cell, Point
from .settings import Matrix

ARENA_PLUGIN = Path(__file__).with_name('swift_plugin.py')
MODEL_LENGTH = 160
"""A prompt and an answer: 26 + 112 tokens at most, and some to spare."""
LONGEST_RUN = 1800.0
"""Seconds."""
FEWEST_TOKENS = 12
"""Of an answer on the average, to know how many problems a run may take."""


def train_by_swift(matrix: Matrix, cell: Cell, folder: Path, *, cache: Path, threads: int) -> list[Point]:
    """The run's curve. Logs, the model and the problems stay in `folder`.

    Raises:
        ServiceFailed: the server or the training ended before the run did; the message shows the end of its log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    training, method = matrix.training_of(cell.method), matrix.methods[cell.method]
    model, data, curve = folder / 'model', folder / 'problems.jsonl', folder / 'curve.jsonl'
    export_model(pretrained(matrix.the_task, matrix.pretraining, cache), model)
    steps = training.tokens // (FEWEST_TOKENS * training.prompts) + 1
    export_problems(matrix.the_task, cell.seed, steps * training.prompts, data)
    config = folder / 'tree.json'
    config.write_text(json.dumps(matrix.config_of(cell.method).to_dict()))  # JSON is YAML
    port = free_port()
    run = {
        'task': matrix.task,
        'seed': cell.seed,
        'training': training.model_dump(),
        'curve': str(curve),
    }
    env = {
        **offline_environment(model, data),
        **cpu.environment(),
        'TREEPO_CONFIG': str(config),
        'OMP_NUM_THREADS': str(threads),
        RUN_VARIABLE: json.dumps(run),
    }
    server = _server_command(model, port, [] if method.independent else ['--multi_turn_scheduler', 'treepo'])
    trainer = _trainer_command(matrix, cell, folder / 'train', model=model, data=data, port=port, steps=steps)
    with (
        Service('The rollout server', server, log=folder / 'rollout.log', env=env) as serving,
        Service('The training', trainer, log=folder / 'train.log', env=env) as learning,
    ):
        deadline = time.monotonic() + LONGEST_RUN
        while learning.check() is None:
            serving.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f'a run was not over after {LONGEST_RUN:.0f} s: {folder / "train.log"}')
            time.sleep(0.5)
    return [Point(**json.loads(line)) for line in curve.read_text().splitlines()]


def _swift(command: str, model: Path, *plugins: Path) -> list[str]:
    """What both commands begin with."""
    return [
        *(str(Path(sys.executable).with_name('swift')), command, '--model', str(model), '--model_type', 'qwen2'),
        *('--template', 'dummy', '--torch_dtype', 'float32', '--external_plugins', str(FILE), *map(str, plugins)),
    ]


def _server_command(model: Path, port: int, scheduler: list[str]) -> list[str]:
    return [
        *(*_swift('rollout', model), *scheduler),
        *('--vllm_use_async_engine', 'true', '--vllm_enforce_eager', 'true'),
        *('--vllm_max_model_len', str(MODEL_LENGTH), '--vllm_engine_kwargs', '{"block_size": 32}'),
        *('--host', '127.0.0.1', '--port', str(port)),
    ]


def _trainer_command(
    matrix: Matrix, cell: Cell, output: Path, *, model: Path, data: Path, port: int, steps: int
) -> list[str]:
    """The fast loop's optimizer, rate and loss, in swift's words."""
    training = matrix.training_of(cell.method)
    return [
        *(*_swift('rlhf', model, ARENA_PLUGIN), '--rlhf_type', 'grpo', '--tuner_type', 'full', '--bf16', 'false'),
        *('--reward_funcs', 'treepo_arena', '--callbacks', 'treepo_arena'),
        *('--dataset', str(data), '--load_from_cache_file', 'false', '--split_dataset_ratio', '0'),
        *('--dataset_num_proc', '1', '--dataloader_num_workers', '0'),
        *('--dataset_shuffle', 'false', '--train_dataloader_shuffle', 'false'),
        *('--use_vllm', 'true', '--vllm_mode', 'server', '--vllm_server_host', '127.0.0.1'),
        *('--vllm_server_port', str(port), '--vllm_server_group_port', str(free_port())),
        *('--num_generations', str(training.width)),
        *('--per_device_train_batch_size', str(training.width * training.prompts)),
        *('--gradient_accumulation_steps', '1', '--max_steps', str(steps)),
        *('--max_length', '64', '--max_completion_length', str(matrix.the_task.max_answer), '--temperature', '1.0'),
        *('--seed', str(cell.seed), '--data_seed', str(cell.seed), '--learning_rate', str(cell.lr)),
        *('--lr_scheduler_type', 'constant', '--warmup_ratio', '0', '--weight_decay', '0'),
        *('--adam_beta1', '0.9', '--adam_beta2', '0.95', '--max_grad_norm', '1.0'),
        *('--beta', '0', '--loss_type', training.loss_type, '--epsilon', '0.2'),
        *('--gradient_checkpointing', 'false', '--logging_steps', '1', '--save_strategy', 'no'),
        *('--output_dir', str(output), '--add_version', 'false', '--report_to', 'none'),
    ]
