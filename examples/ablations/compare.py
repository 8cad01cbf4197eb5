"""Compare GRPO and TreePO at equal decoded tokens, on the quickstart's model and task, on a CPU.

    python compare.py --tokens 150000 --seeds 42 1 2

Every run has the same model, prompts, batch and learning rate and ends at the step that reaches `--tokens`. Checkpoints
are saved at `--points` marks on the way, and solve the held-out problems. Runs that are finished are used again, so
that a comparison that was stopped goes on where it was. Results: results.md, results.json and accuracy.png in --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / 'quickstart'
OUTPUT = HERE.parents[1] / 'output'
sys.path.insert(0, str(QUICKSTART))
from run import HELDOUT, START_TIMEOUT, accuracy, make_model, read_log, step

from treepo_swift.lab.services import Service, ServiceFailed, free_port, guarded, offline_environment

MAX_STEPS = 100_000
"""Never reached: tokens end a run. The learning rate is constant, so nothing else depends on it."""


@dataclass(frozen=True)
class Method:
    title: str
    tree: dict[str, str] | None
    """Keys of the tree config that differ from quickstart's tree.yaml; None: independent sampling, no tree."""


METHODS = {
    'grpo': Method('GRPO, independent sampling', None),
    'grpo_tree': Method('GRPO + tree sampling', {'ADVANTAGE__ESTIMATOR': 'grpo', 'ADVANTAGE__NORMALISATION': 'none'}),
    'treepo': Method('TreePO, fixed init divergence', {}),
    'treepo_more_init': Method('TreePO, more init divergence', {'ROOT_DIVERGENCE': '[2, 8]'}),
}


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    marks: tuple[int, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f'{self.method}, seed {self.seed}'

    @property
    def points_file(self) -> Path:
        """Written when the training has ended well: the marks that were passed, with tokens and step."""
        return self.folder / 'points.json'

    def points(self) -> list[dict[str, int]]:
        return json.loads(self.points_file.read_text())

    def checkpoint(self, point: dict[str, int]) -> Path:
        return self.folder / 'train' / f'checkpoint-{point["step"]}'

    def is_finished(self) -> bool:
        return self.points_file.is_file() and all(
            (self.checkpoint(point) / 'model.safetensors').is_file() for point in self.points()
        )


def main() -> int:
    parser = argparse.ArgumentParser(description='Compare GRPO and TreePO at equal decoded tokens.')
    parser.add_argument('--output', type=Path, default=OUTPUT / 'compare')
    parser.add_argument(
        '--quickstart',
        type=Path,
        default=OUTPUT / 'quickstart',
        help='folder of the base model and its data, made there unless they are',
    )
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[42, 1, 2])
    parser.add_argument('--tokens', type=int, default=150_000, help='decoded tokens of each run')
    parser.add_argument('--points', type=int, default=3, help='evaluations of each run, evenly spread over the tokens')
    parser.add_argument('--fresh', action='store_true', help='train these runs again even if they are there')
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.points < 1 or args.tokens < args.points:
        parser.error(f'--points {args.points} --tokens {args.tokens}: needs at least one point, and a token for each')
    return guarded(lambda: compare(args), f'The same command goes on. Logs: {args.output}')


def compare(args: argparse.Namespace) -> None:
    output: Path = args.output.resolve()
    marks = tuple(args.tokens * (i + 1) // args.points for i in range(args.points))
    # Method by method, so that the trees share one server.
    runs = [
        Run(method, seed, marks, output / method / f'seed-{seed}-tokens-{args.tokens}-points-{args.points}')
        for method in METHODS
        if method in args.methods
        for seed in args.seeds
    ]
    if args.fresh:
        for run in runs:
            shutil.rmtree(run.folder, ignore_errors=True)
    quickstart: Path = args.quickstart.resolve()
    step('1/4', 'the model and its task')
    base, data = make_model(quickstart)
    missing = [run for run in runs if not run.is_finished()]
    reused = '; the others are there (--fresh trains again)' if len(missing) < len(runs) else ''
    step('2/4', f'training: {len(missing)} of {len(runs)} runs of {args.tokens:,} decoded tokens{reused}')
    train_all(missing, output, base, data)
    step('3/4', f'held-out accuracy ({HELDOUT} problems, one sample each at temperature 1)')
    results = evaluate(runs, accuracy(base, quickstart / 'base-heldout.json'))
    step('4/4', 'the result')
    (output / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    text = table(results)
    (output / 'results.md').write_text(text)
    draw(results, output / 'accuracy.png')
    print(f'\n{text}\n  {output}/results.md, results.json, accuracy.png')


# Training.


def train_all(runs: list[Run], output: Path, base: Path, data: Path) -> None:
    """One server for all runs without trees, then one for all with trees; never both, and none that is not needed."""
    env = {key: value for key, value in offline_environment(base, data).items() if not key.startswith('TREEPO_')}
    done = 0
    for name, scheduler in (('plain', ''), ('tree', 'treepo')):
        batch = [run for run in runs if (METHODS[run.method].tree is None) == (name == 'plain')]
        if not batch:
            continue
        port = free_port()
        log = output / f'rollout-{name}.log'
        print(f'      {name} rollout server on port {port} (log: {log})', flush=True)
        env |= {'PORT': str(port), 'SCHEDULER': scheduler}
        command = ['bash', str(QUICKSTART / 'rollout.sh')]
        with Service(f'The {name} rollout server', command, log=log, env=dict(env)) as server:
            server.wait_for_health(port, timeout=START_TIMEOUT)
            for run in batch:
                done += 1
                train(run, server, env, f'{done}/{len(runs)} {run.name}')


def train(run: Run, server: Service, env: dict[str, str], label: str) -> None:
    shutil.rmtree(run.folder, ignore_errors=True)  # what a run that was stopped has left
    passed = run.folder / 'points.jsonl'
    tree = METHODS[run.method].tree or {}
    env = (
        env
        | {f'TREEPO_{key}': value for key, value in tree.items()}
        | {
            'GROUP_PORT': str(free_port()),
            'SEED': str(run.seed),
            'STEPS': str(MAX_STEPS),
            'OUTPUT': str(run.folder / 'train'),
            'TOKEN_MARKS': ','.join(map(str, run.marks)),
            'TOKEN_POINTS': str(passed),
        }
    )
    plugins = [HERE.parents[1] / 'plugin' / 'treepo_plugin.py', QUICKSTART / 'reward.py', HERE / 'token_budget.py']
    command = ['bash', str(QUICKSTART / 'train.sh'), '--callbacks', 'token_budget']
    command += ['--external_plugins', *map(str, plugins)]
    with Service(f'The training {run.name}', command, log=run.folder / 'train.log', env=env) as training:
        follow(run, label, server, training)
    points = [json.loads(line) for line in passed.read_text().splitlines()] if passed.is_file() else []
    if [point['mark'] for point in points] != list(run.marks):
        raise ServiceFailed(f'The training {run.name} ended before {run.marks[-1]:,} tokens. Its log: {training.log}')
    run.points_file.write_text(json.dumps(points))


def follow(run: Run, label: str, server: Service, training: Service) -> None:
    """Show decoded tokens until the training has ended."""
    from tqdm import tqdm

    with tqdm(total=run.marks[-1], desc=f'      {label}', unit='token', unit_scale=True) as bar:
        while True:
            server.check()
            ended = training.check() is not None
            rows = read_rows(run.folder / 'train' / 'logging.jsonl')
            if rows:
                bar.set_postfix(reward=f'{statistics.mean(row["reward"] for row in rows[-5:]):.2f}', step=len(rows))
                bar.update(round(sum(row['decoded'] for row in rows)) - bar.n)
            if ended:
                return
            time.sleep(1)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Reward and decoded tokens of each step in swift's log; 64 answers a step, as quickstart's train.sh says."""
    return [
        {'reward': row['reward'], 'decoded': row.get('tree/decoded_tokens', 64 * row['completions/mean_length'])}
        for row in read_log(path, having='completions/mean_length')
    ]


# Results.


def evaluate(runs: list[Run], base: float) -> dict[str, Any]:
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    results = []
    jobs = [(run, point) for run in runs for point in run.points()]
    for run, point in tqdm(jobs, desc='      checkpoints', unit='checkpoint'):
        share = accuracy(run.checkpoint(point), run.folder / f'heldout-{point["step"]}.json')
        results.append({'method': run.method, 'seed': run.seed, **point, 'accuracy': share})
    return {'base_accuracy': base, 'heldout_problems': HELDOUT, 'points': results}


def cell(values: Iterable[float]) -> str:
    values = [100 * value for value in values]
    spread = f' ± {statistics.stdev(values):.1f} ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def table(results: dict[str, Any]) -> str:
    points = results['points']
    marks = sorted({point['mark'] for point in points})
    seeds = sorted({point['seed'] for point in points})
    lines = [
        '| method | steps | ' + ' | '.join(f'{mark:,} tokens' for mark in marks) + ' |',
        '| --- ' * (len(marks) + 2) + '|',
    ]
    for method in dict.fromkeys(point['method'] for point in points):
        own = [point for point in points if point['method'] == method]
        steps = sorted({point['step'] for point in own if point['mark'] == marks[-1]})
        cells = [cell(point['accuracy'] for point in own if point['mark'] == mark) for mark in marks]
        span = f'{steps[0]} to {steps[-1]}' if len(steps) > 1 else str(steps[0])
        lines.append(f'| {METHODS[method].title} | {span} | ' + ' | '.join(cells) + ' |')
    spread = ': mean ± standard deviation (lowest to highest)' if len(seeds) > 1 else ''
    lines.append(
        f'\nHeld-out accuracy in % ({results["heldout_problems"]} problems, one sample each at temperature 1) over '
        f'seeds {", ".join(map(str, seeds))}{spread}. Before training: {results["base_accuracy"]:.1%}.\n'
    )
    return '\n'.join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Mean line and band from the lowest to the highest seed, against the mean decoded tokens of each mark."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    base = results['base_accuracy']
    for method in dict.fromkeys(point['method'] for point in results['points']):
        own = [point for point in results['points'] if point['method'] == method]
        groups = [[point for point in own if point['mark'] == mark] for mark in sorted({p['mark'] for p in own})]
        tokens = [0.0] + [statistics.mean(point['tokens'] for point in group) / 1000 for group in groups]
        shares = [[base]] + [[point['accuracy'] for point in group] for group in groups]
        (line,) = axes.plot(tokens, [statistics.mean(share) for share in shares], 'o-', label=METHODS[method].title)
        axes.fill_between(tokens, list(map(min, shares)), list(map(max, shares)), color=line.get_color(), alpha=0.12)
    axes.set(xlabel='decoded tokens (thousands)', ylabel='held-out accuracy')
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    sys.exit(main())
