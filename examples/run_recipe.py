"""Runs a recipe: its model, its rollout server, its training, and what came of it, in one output folder.

    python run_recipe.py --recipe gym --task number_game_task.py --steps 20

What is there already is used again: the model, the data, and a finished training of the same seed and steps.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / 'quickstart'))
from run import START_TIMEOUT, follow, read_log, step

from treepo_swift.lab.services import Service, free_port, guarded, offline_environment

COLUMNS = {
    'reward': 'reward',
    'turns': 'num_turns',
    'decoded tokens': 'tree/decoded_tokens',
    'one by one': 'tree/independent_tokens',
    'requests': 'tree/engine_requests',
    'failures': 'tree/failures',
}


def main() -> int:
    parser = argparse.ArgumentParser(description='Train a small model by the scripts of a recipe, on a CPU.')
    parser.add_argument('--recipe', type=Path, required=True, help='folder with rollout.sh and train.sh')
    parser.add_argument('--task', required=True, help='its module for make_model.py, which also writes the data')
    parser.add_argument('--output', type=Path, help='default: output/<recipe>')
    parser.add_argument('--steps', type=int, default=20, help='GRPO steps')
    parser.add_argument('--seed', type=int, default=42, help='seed of the training')
    args = parser.parse_args()
    args.recipe = args.recipe.resolve()
    args.output = (args.output or HERE.parent / 'output' / args.recipe.name).resolve()
    if args.steps < 1 or not (args.recipe / args.task).is_file():
        parser.error(f'--steps {args.steps} must be at least 1, and {args.recipe / args.task} a file')
    return guarded(lambda: run(args), f'Logs are in {args.output}.')


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    step('1/4', 'the model and its task')
    base, data = make_model(args.recipe / args.task, args.output)
    folder = args.output / f'seed-{args.seed}-steps-{args.steps}'
    log = folder / 'train' / 'logging.jsonl'
    if len(read_log(log)) < args.steps:
        shutil.rmtree(folder, ignore_errors=True)
        train(args, folder, base, data)
    step('4/4', 'the result')
    print(f'\n{table(log)}\n\n  {(time.monotonic() - started) / 60:.1f} minutes; logs in {folder}')


def make_model(task: Path, output: Path) -> tuple[Path, Path]:
    """The base model and the training data, made unless they are there."""
    base, data = output / 'base', output / 'data'
    if not (base / 'model.safetensors').is_file():
        shutil.rmtree(base, ignore_errors=True)
        make = str(HERE / 'quickstart' / 'make_model.py')
        subprocess.run([sys.executable, make, '--task', str(task), '--output', str(base)], check=True)
    if not (data / 'train.jsonl').is_file():
        subprocess.run([sys.executable, str(task), '--output', str(data)], check=True)
    return base, data / 'train.jsonl'


def train(args: argparse.Namespace, folder: Path, base: Path, data: Path) -> None:
    port = free_port()
    env = offline_environment(base, data) | {
        'PORT': str(port),
        'GROUP_PORT': str(free_port()),
        'STEPS': str(args.steps),
        'SEED': str(args.seed),
        'OUTPUT': str(folder / 'train'),
    }
    step('2/4', f'rollout server on port {port} (log: {folder / "rollout.log"})')
    rollout, training = (['bash', str(args.recipe / script)] for script in ('rollout.sh', 'train.sh'))
    with Service('The rollout server', rollout, log=folder / 'rollout.log', env=env) as server:
        server.wait_for_health(port, timeout=START_TIMEOUT)
        step('3/4', f'training, {args.steps} GRPO steps (log: {folder / "train.log"})')
        with Service('The training', training, log=folder / 'train.log', env=env) as trainer:
            follow(folder / 'train' / 'logging.jsonl', args.steps, [server.check, trainer.check])


def table(log: Path) -> str:
    """The first, the middle and the last steps side by side, each the mean of up to three."""
    rows = read_log(log)
    middle = len(rows) // 2
    parts = {'first': rows[:3], 'middle': rows[max(middle - 1, 0) : middle + 2], 'last': rows[-3:]}
    lines = [f'  {"steps":8}' + ''.join(f'{name:>16}' for name in COLUMNS)]
    for name, part in parts.items():
        means = [sum(row[key] for row in part) / len(part) for key in COLUMNS.values()]
        lines.append(f'  {name:8}' + ''.join(f'{mean:16,.2f}' for mean in means))
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
