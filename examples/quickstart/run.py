"""Runs the quickstart: model, rollout server, training, result. Everything lands in one output folder.

    python run.py --steps 40 --seed 42
    python run.py --colocate            # one process, no server

What is there already is used again: the model, the data, and a finished training of the same seed and steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo_swift.lab.services import Service, free_port, guarded, offline_environment

HERE = Path(__file__).resolve().parent
START_TIMEOUT = 300
HELDOUT = 256
LOGS = ('rollout.log', 'train.log', 'train/logging.jsonl')


def main() -> int:
    parser = argparse.ArgumentParser(description='Train a small model with TreePO on a CPU.')
    parser.add_argument('--output', type=Path, default=HERE.parents[1] / 'output' / 'quickstart')
    parser.add_argument('--steps', type=int, default=40, help='GRPO steps')
    parser.add_argument('--seed', type=int, default=42, help='seed of the training')
    parser.add_argument('--colocate', action='store_true', help='vLLM runs in the training process; no server')
    parser.add_argument('--fresh', action='store_true', help='train again even if this training is there')
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f'--steps {args.steps}: must be at least 1')
    return guarded(lambda: quickstart(args), f'Logs are in {args.output}.')


def quickstart(args: argparse.Namespace) -> None:
    output: Path = args.output.resolve()
    run = output / f'seed-{args.seed}-steps-{args.steps}{"-colocate" if args.colocate else ""}'
    if args.fresh:
        shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()

    step('1/4', 'the model and its task')
    base, data = make_model(output)
    before = accuracy(base, output / 'base-heldout.json')
    print(f'      held-out accuracy before training: {before:.0%} ({HELDOUT} problems, sampled)')

    checkpoint = run / 'train' / f'checkpoint-{args.steps}'
    if (checkpoint / 'model.safetensors').is_file():
        step('2/4', f'rollout server: not needed, {checkpoint} is there (--fresh trains again)')
        step('3/4', 'training: done before')
    else:
        shutil.rmtree(run, ignore_errors=True)
        train(args, run, base, data)

    step('4/4', 'the result')
    after = accuracy(checkpoint, run / 'heldout.json')
    report(run, checkpoint, before, after, minutes=(time.monotonic() - started) / 60)


def make_model(output: Path) -> tuple[Path, Path]:
    """The base model and the training data, made unless they are there."""
    base, data = output / 'base', output / 'data'
    if (base / 'model.safetensors').is_file() and (data / 'train.jsonl').is_file():
        print(f'      using {base}')
        return base, data / 'train.jsonl'
    shutil.rmtree(base, ignore_errors=True)
    (output / 'base-heldout.json').unlink(missing_ok=True)
    for script, target in (('task.py', data), ('make_model.py', base)):
        subprocess.run([sys.executable, str(HERE / script), '--output', str(target)], check=True)
    return base, data / 'train.jsonl'


def train(args: argparse.Namespace, run: Path, base: Path, data: Path) -> None:
    env = {
        **offline_environment(base, data),
        'STEPS': str(args.steps),
        'SEED': str(args.seed),
        'OUTPUT': str(run / 'train'),
    }
    if args.colocate:
        step('2/4', 'rollout server: not needed, vLLM runs in the training process')
        run_training(args, run, {**env, 'COLOCATE': '1'}, [])
        return
    port = free_port()
    env.update(PORT=str(port), GROUP_PORT=str(free_port()))
    step('2/4', f'rollout server on port {port} (log: {run / "rollout.log"})')
    with Service('The rollout server', ['bash', str(HERE / 'rollout.sh')], log=run / 'rollout.log', env=env) as server:
        began = time.monotonic()
        server.wait_for_health(port, timeout=START_TIMEOUT)
        print(f'      ready after {time.monotonic() - began:.0f} s')
        run_training(args, run, env, [server.check])


def run_training(
    args: argparse.Namespace, run: Path, env: dict[str, str], checks: list[Callable[[], int | None]]
) -> None:
    """`checks` are those of what the training needs beside itself."""
    step('3/4', f'training, {args.steps} GRPO steps (log: {run / "train.log"})')
    with Service('The training', ['bash', str(HERE / 'train.sh')], log=run / 'train.log', env=env) as training:
        follow(run / 'train' / 'logging.jsonl', args.steps, [*checks, training.check])


def follow(log: Path, steps: int, checks: list[Callable[[], int | None]]) -> None:
    """Show the training's progress until it has ended; the last of `checks` is the training's own."""
    from tqdm import tqdm

    with tqdm(total=steps, desc='      ', unit='step') as bar:
        while True:
            ended = [check() for check in checks][-1] is not None
            rows = read_log(log)
            if len(rows) > bar.n:
                bar.set_postfix(reward=f'{rows[-1]["reward"]:.2f}', saved=f'{rows[-1]["tree/saved_fraction"]:.0%}')
                bar.update(len(rows) - bar.n)
            if ended:
                return
            time.sleep(0.5)


def read_log(path: Path, having: str = 'tree/decoded_tokens') -> list[dict[str, float]]:
    """The rows of swift's logging.jsonl that describe training steps, which have that key; numbers as numbers."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that is being written
        if having in row:
            rows.append({key: float(value) for key, value in row.items() if _is_number(value)})
    return rows


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def accuracy(model: Path, cache: Path) -> float:
    """Share of held-out problems that one sample at temperature 1 solves; computed once per model."""
    if cache.is_file():
        return json.loads(cache.read_text())['accuracy']
    import torch
    from make_model import sample
    from task import distinct_problems, is_correct
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    tasks = distinct_problems('heldout', HELDOUT, 0)
    answers = sample(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer, tasks)
    right = [
        is_correct(tokenizer.decode(ids, skip_special_tokens=True), task.solution)
        for ids, task in zip(answers, tasks, strict=True)
    ]
    cache.write_text(json.dumps({'accuracy': sum(right) / len(right), 'problems': len(right)}))
    return sum(right) / len(right)


def report(run: Path, checkpoint: Path, before: float, after: float, *, minutes: float) -> None:
    rows = read_log(run / 'train' / 'logging.jsonl')
    decoded = sum(row['tree/decoded_tokens'] for row in rows)
    independent = sum(row['tree/independent_tokens'] for row in rows)
    share = sum(row['tree/scheduler_cpu_share'] * row['tree/rollout_seconds'] for row in rows) / sum(
        row['tree/rollout_seconds'] for row in rows
    )
    table = [
        ('held-out accuracy', f'{before:.1%} -> {after:.1%}'),
        ('training reward', f'{rows[0]["reward"]:.2f} -> {rows[-1]["reward"]:.2f}'),
        ('tokens decoded', f'{decoded:,.0f}'),
        ('the same answers, sampled one by one', f'{independent:,.0f} ({1 - decoded / independent:.0%} saved)'),
        ("scheduler's own CPU time", f"{share:.1%} of the rollouts' wall time"),
        ('checkpoint', str(checkpoint)),
        ('logs', ', '.join(f'{run}/{log}' for log in LOGS if (run / log).exists())),
        ('curves', str(draw(run, rows, before, after))),
        ('its trees in a browser', f'{Path(sys.executable).parent}/treepo-swift view {run} --open'),
        ('time', f'{minutes:.1f} minutes'),
    ]
    width = max(len(name) for name, _ in table)
    print('\n' + '\n'.join(f'  {name:{width}}  {value}' for name, value in table))


def draw(run: Path, rows: list[dict[str, float]], before: float, after: float) -> Path:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    steps = range(1, len(rows) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.plot(steps, [row['reward'] for row in rows], label='training reward')
    left.plot([0, len(rows)], [before, after], 'o--', label='held-out accuracy')
    left.set(xlabel='GRPO step', ylim=(0, 1.02), title='What it learned')
    right.plot(steps, [row['tree/independent_tokens'] for row in rows], label='independent sampling')
    right.plot(steps, [row['tree/decoded_tokens'] for row in rows], label='tree')
    right.set(xlabel='GRPO step', ylabel='tokens a step', ylim=(0, None), title='What it decoded for the same answers')
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    path = run / 'curves.png'
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


def step(number: str, text: str) -> None:
    print(f'[{number}] {text}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
