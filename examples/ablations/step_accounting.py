"""Where a whole GRPO step's time goes: plain GRPO, trees, and trees that are trained on as tries.

    python step_accounting.py --rounds 3 --steps 8

The quickstart's loop on the quickstart's model. Both rollout servers stay up; trainings of a few steps take turns, and
the first step of each does not count. The table has medians over all other steps, in seconds. Written to results.md
and results.json in --output; the rows that each training trained on are in its folder, for
`treepo-swift bench --train --rows FILE`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / 'quickstart'
OUTPUT = HERE.parents[1] / 'output'
PLUGIN = HERE.parents[1] / 'plugin' / 'treepo_plugin.py'
sys.path.insert(0, str(QUICKSTART))
from run import START_TIMEOUT, make_model, step
from tqdm import tqdm

from treepo_swift.lab.bench.result import hardware
from treepo_swift.lab.bench.table import table
from treepo_swift.lab.services import Service, free_port, guarded, offline_environment

OFF = {'TREEPO_SHARED_PREFIX__ENABLED': 'false', 'TREEPO_SHARED_PREFIX__SKIP_OLD_LOGPROBS': 'false'}
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    'plain GRPO': ('', OFF),
    'trees': ('treepo', OFF),
    'trees, old log-probs left out': ('treepo', {'TREEPO_SHARED_PREFIX__ENABLED': 'false'}),
    'trees and tries': ('treepo', {}),
}
"""The server's scheduler, and keys of the tree config. The last is what a user gets. Plain GRPO has the plugin too: on
a CPU it brings swift's weight sync to life."""
PARTS = (
    'rollout', 'weight sync', 'weight proof', 'rewards', 'old log-probs', 'policy forward', 'loss', 'backward',
    'optimizer', 'rest',
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Where a whole GRPO step's time goes, with trees and without.")
    parser.add_argument('--output', type=Path, default=OUTPUT / 'step-accounting')
    parser.add_argument('--quickstart', type=Path, default=OUTPUT / 'quickstart', help='folder of the model, or for it')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    parser.add_argument('--rounds', type=int, default=3, help='trainings of each way')
    parser.add_argument('--steps', type=int, default=8, help='steps of each training, of which the first is left out')
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 2:
        parser.error('--rounds must be at least 1 and --steps at least 2')
    return guarded(lambda: account(args), f'Logs are in {args.output}.')


def account(args: argparse.Namespace) -> None:
    output: Path = args.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    step('1/3', 'the model and its task')
    base, data = make_model(args.quickstart.resolve())
    step('2/3', f'{args.rounds} rounds of {len(args.ways)} trainings, {args.steps} steps each')
    env = offline_environment(base, data) | {'STEPS': str(args.steps), 'SAVE_STEPS': '1000000'}
    schedulers = dict.fromkeys(WAYS[way][0] for way in args.ways)
    ports = {scheduler: free_port() for scheduler in schedulers}
    servers = {
        scheduler: Service(
            f'The rollout server ({scheduler or "plain"})',
            ['bash', str(QUICKSTART / 'rollout.sh')],
            log=output / f'rollout-{scheduler or "plain"}.log',
            env={**env, 'PORT': str(ports[scheduler]), 'SCHEDULER': scheduler},
        )
        for scheduler in schedulers
    }
    steps: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    try:
        for scheduler, server in servers.items():
            server.__enter__()
            server.wait_for_health(ports[scheduler], timeout=START_TIMEOUT)
        for count in range(args.rounds):
            for way in args.ways:
                folder = output / f'{way.replace(" ", "-").replace(",", "")}-{count}'
                steps[way] += train(way, folder, env, ports, servers)
    finally:
        for server in servers.values():
            if hasattr(server, 'process'):
                server.__exit__(None, None, None)
    step('3/3', 'the result')
    report(steps, output)


def train(
    way: str, folder: Path, env: dict[str, str], ports: dict[str, int], servers: dict[str, Service]
) -> list[dict[str, float]]:
    """The parts of every step but the first."""
    print(f'      {way}', flush=True)
    scheduler, config = WAYS[way]
    plugins = [PLUGIN, QUICKSTART / 'reward.py', HERE / 'step_clock.py']
    folder.mkdir(parents=True)
    clock = folder / 'steps.jsonl'
    training = Service(
        f'The training ({way})',
        ['bash', str(QUICKSTART / 'train.sh'), '--external_plugins', *map(str, plugins), '--save_strategy', 'no'],
        log=folder / 'train.log',
        env={
            **env,
            **config,
            'PORT': str(ports[scheduler]),
            'GROUP_PORT': str(free_port()),
            'MASTER_PORT': str(free_port()),
            'OUTPUT': str(folder / 'train'),
            'STEP_CLOCK': str(clock),
            'STEP_ROWS': str(folder / 'rows'),
        },
    )
    with training, tqdm(total=int(env['STEPS']), desc='      ', unit='step') as bar:
        while training.check() is None:
            servers[scheduler].check()
            time.sleep(0.5)
            bar.update(len(clock.read_text().splitlines()) - bar.n if clock.is_file() else 0)
    return [json.loads(line) for line in clock.read_text().splitlines()][1:]


def report(steps: dict[str, list[dict[str, float]]], output: Path) -> None:
    medians = {way: parts_of(found) for way, found in steps.items()}
    first = next(iter(medians))
    rows = [
        {
            'seconds': way,
            **{part: f'{found[part]:.2f}' for part in (*PARTS, 'whole step')},
            f'of {first}': f'{found["whole step"] / medians[first]["whole step"]:.2f}',
        }
        for way, found in medians.items()
    ]
    counts = ', '.join(f'{way} {len(found)}' for way, found in steps.items())
    text = f'{hardware()}; medians of steps ({counts})\n\n{table(rows)}\n'
    (output / 'results.md').write_text(text)
    (output / 'results.json').write_text(json.dumps({'medians': medians, 'steps': steps}, indent=1) + '\n')
    print(f'\n{text}\n  {output}/results.md, results.json')


def parts_of(steps: list[dict[str, float]]) -> dict[str, Any]:
    found = {part: median(step.get(part, 0.0) for step in steps) for part in PARTS}
    found['whole step'] = median(sum(value for key, value in step.items() if key != 'step') for step in steps)
    return found


if __name__ == '__main__':
    sys.exit(main())
