"""Count what trees over turns save, in the shape of the table that ms-swift publishes for its example plugin.

    python count_calls.py --depths 4 5 6 --steps 10

For each depth (turns of a conversation) the same training runs on conversations sampled one by one, and on trees with
forks at turns. What is there already is used again. Results: results.md and results.json in --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / 'quickstart'
sys.path[:0] = [str(QUICKSTART), str(HERE.parent)]
from run import START_TIMEOUT, read_log, step
from run_recipe import make_model

from treepo_swift.lab.services import Service, free_port, guarded, offline_environment

BATCH, WIDTH = 8, 8
"""Prompts a step and conversations a prompt: what train.sh says."""


@dataclass(frozen=True)
class Method:
    name: str
    scheduler: str
    tree: dict[str, str]
    published: dict[int, str]
    """Saving of calls that ms-swift's page gives, by depth."""


PUBLISHED = {2: {5: '42 %', 6: '36 %'}, 3: {4: '38 %', 5: '31 %', 6: '25 %'}}
"""By divergence and depth, for Qwen2.5-0.5B and NuminaMath-TIR on two GPUs; 42 % is what the page's own counts give."""


def _tree(divergence: int, pacing: str, title: str) -> Method:
    tree = {'TREEPO_DIVERGENCE': str(divergence), 'TREEPO_PACING': pacing}
    return Method(title, 'one_step_tree', tree, PUBLISHED[divergence])


METHODS = (
    Method('independent', 'one_step', {}, {}),
    _tree(2, 'eager', 'tree, d = 2'),
    _tree(3, 'eager', 'tree, d = 3'),
    _tree(2, 'even', 'tree, d = 2, even pacing'),
    _tree(3, 'even', 'tree, d = 3, even pacing'),
)


@dataclass(frozen=True)
class Result:
    depth: int
    method: str
    steps: int
    calls: int
    """Inference requests: a turn of a conversation is one, and one that several conversations share is one too."""
    turns: float
    """Turns of a conversation, mean."""
    decoded_tokens: int
    reward: float
    seconds: float
    """Of the training, from its first step to its end."""


def main() -> int:
    parser = argparse.ArgumentParser(description='Count the inference calls that trees over turns save.')
    parser.add_argument('--output', type=Path, default=HERE.parents[1] / 'output' / 'saved_calls')
    parser.add_argument('--depths', nargs='+', type=int, default=[4, 5, 6], help='most turns of a conversation')
    parser.add_argument('--steps', type=int, default=10, help='GRPO steps of each training')
    parser.add_argument('--fresh', action='store_true', help='train again even if a training is there')
    args = parser.parse_args()
    if args.steps < 1 or min(args.depths) < 2:
        parser.error(f'--steps {args.steps} --depths {args.depths}: needs a step, and two turns')
    return guarded(lambda: compare(args), f'The same command goes on. Logs: {args.output}')


def compare(args: argparse.Namespace) -> None:
    output: Path = args.output.resolve()
    step('1/3', 'the model and its task')
    base, data = make_model(HERE / 'one_step_a_turn.py', output)
    step('2/3', f'{len(args.depths) * len(METHODS)} trainings of {args.steps} steps')
    results = []
    for depth in args.depths:
        for scheduler in dict.fromkeys(method.scheduler for method in METHODS):
            methods = [method for method in METHODS if method.scheduler == scheduler]
            results += serve_and_train(output / f'depth-{depth}', depth, methods, args, offline_environment(base, data))
    step('3/3', 'the result')
    (output / 'results.json').write_text(json.dumps([asdict(result) for result in results], indent=1) + '\n')
    (output / 'results.md').write_text(table(results))
    print(f'\n{table(results)}\n  {output}/results.md, results.json')


def serve_and_train(
    folder: Path, depth: int, methods: list[Method], args: argparse.Namespace, env: dict[str, str]
) -> list[Result]:
    """Train the methods that share a scheduler one after the other, on one server."""
    runs = [
        (method, folder / method.name.replace(', ', '-').replace(' ', '') / f'steps-{args.steps}') for method in methods
    ]
    if args.fresh:
        for _, run in runs:
            shutil.rmtree(run, ignore_errors=True)
    missing = [(method, run) for method, run in runs if not (run / 'result.json').is_file()]
    if missing:
        port = free_port()
        env = {key: value for key, value in env.items() if not key.startswith('TREEPO_')}
        env |= {'PORT': str(port), 'MAX_TURNS': str(depth), 'SCHEDULER': methods[0].scheduler}
        log = folder / f'rollout-{methods[0].scheduler}.log'
        with Service('The rollout server', ['bash', str(HERE / 'rollout.sh')], log=log, env=env) as server:
            server.wait_for_health(port, timeout=START_TIMEOUT)
            for method, run in missing:
                train(method, depth, run, server, env | method.tree, args.steps)
    return [Result(**json.loads((run / 'result.json').read_text())) for _, run in runs]


def train(method: Method, depth: int, run: Path, server: Service, env: dict[str, str], steps: int) -> None:
    from tqdm import tqdm

    shutil.rmtree(run, ignore_errors=True)  # what a training that was stopped has left
    env = env | {'GROUP_PORT': str(free_port()), 'STEPS': str(steps), 'OUTPUT': str(run / 'train')}
    log = run / 'train' / 'logging.jsonl'
    command = ['bash', str(HERE / 'train.sh'), '--save_strategy', 'no']
    with Service('The training', command, log=run / 'train.log', env=env) as training:
        with tqdm(total=steps, desc=f'      depth {depth}, {method.name}', unit='step') as bar:
            ended = False
            while not ended:
                server.check()
                ended = training.check() is not None
                bar.update(len(read_log(log, having='num_turns')) - bar.n)
                time.sleep(0.5)
    (run / 'result.json').write_text(json.dumps(asdict(measure(method, depth, log))))


def measure(method: Method, depth: int, log: Path) -> Result:
    rows, conversations = read_log(log, having='num_turns'), BATCH * WIDTH
    end = read_log(log, having='train_runtime')[-1]
    return Result(
        depth=depth,
        method=method.name,
        steps=len(rows),
        calls=round(sum(row.get('tree/engine_requests', conversations * row['num_turns']) for row in rows)),
        turns=sum(row['num_turns'] for row in rows) / len(rows),
        decoded_tokens=round(
            sum(row.get('tree/decoded_tokens', conversations * row['completions/mean_length']) for row in rows)
        ),
        reward=sum(row['reward'] for row in rows) / len(rows),
        seconds=end['train_runtime'],
    )


def table(results: list[Result]) -> str:
    lines = [
        '| depth | | inference calls | saved | published | turns | decoded tokens | saved | train iterations/s | gain '
        '|',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    published: dict[str, dict[int, str]] = {method.name: method.published for method in METHODS}
    for result in results:
        base = next(r for r in results if (r.depth, r.method) == (result.depth, METHODS[0].name))
        cells: list[Any] = [result.depth, result.method, f'{result.calls:,}']
        cells += [_saved(result.calls, base.calls), published[result.method].get(result.depth, '')]
        cells += [f'{result.turns:.2f}', f'{result.decoded_tokens:,}']
        cells += [_saved(result.decoded_tokens, base.decoded_tokens), f'{result.steps / result.seconds:.3f}']
        cells += [f'{base.seconds / result.seconds - 1:+.0%}'.replace('%', ' %')]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n'


def _saved(value: float, base: float) -> str:
    return f'{1 - value / base:.0%}'.replace('%', ' %')


if __name__ == '__main__':
    sys.exit(main())
