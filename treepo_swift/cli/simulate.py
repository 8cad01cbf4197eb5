"""Predict throughput, KV footprint and tail latency at any scale, from the speed of one measured engine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from treepo_swift.config import CONFIG_ENV, TreeConfig
from treepo_swift.lab.bench.table import table
from treepo_swift.lab.lengths import LengthDistribution
from treepo_swift.lab.simulation import SCHEDULES, EngineModel, Result, Setup, read_bench, simulate

CONFIG_SWEEPS = {
    'depth': 'max_depth',
    'segment': 'segment_length',
    'divergence': 'divergence',
    'root_divergence': 'root_divergence',
}
"""Sweeps over numbers of the tree config, by its fields."""

EPILOG = """Columns of the sweeps:
  tokens/s   decoded tokens; decoded: how many of them for 100 tokens of the trajectories
  batch      sequences of an engine, mean over time
  prefilled  tokens of prompts and prefixes that no cache had; preempted: requests; peak KV: tokens of an engine
  p50        when half of the trees were done, in seconds; tail: time with less than half of the most sequences
  loop       CPU time of the busiest server's event loop over its engines' time; above 100% it sets the pace"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument('--engine', required=True, metavar='FILE', help='engine model, by `treepo-swift bench --fit`')
    parser.add_argument('--config', metavar='FILE', help='tree config as YAML (default: the defaults)')
    sweeps = parser.add_argument_group('sweeps', 'values separated by commas; every combination is a row')
    sweeps.add_argument(
        '--schedule', default='stream,independent', help=f'of {", ".join(SCHEDULES)} (default %(default)s)'
    )
    sweeps.add_argument('--prompts', default='64', help='of a batch (default %(default)s)')
    sweeps.add_argument('--width', default='16', help='W, trajectories of a prompt (default %(default)s)')
    sweeps.add_argument('--depth', help="D, most segments of a path (default, as for the next four: the config's)")
    sweeps.add_argument('--segment', help='S, most tokens of a segment')
    sweeps.add_argument('--divergence', help='d, branches at a boundary')
    sweeps.add_argument('--root-divergence', help='branches at the root')
    sweeps.add_argument('--pacing', help='eager or even; other pacings are for --config')
    sweeps.add_argument('--data-parallel', default='1', help='engines of a server (default %(default)s)')
    sweeps.add_argument('--servers', default='1', help='(default %(default)s)')
    parser.add_argument('--lengths', metavar='FILE', help='JSON list of response lengths (default: D x S)')
    parser.add_argument('--prompt-tokens', type=int, default=512, help='of every prompt (default %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    order = parser.add_mutually_exclusive_group()
    order.add_argument('--priority', action='store_true', help='engines take requests of the oldest tree first')
    order.add_argument(
        '--arrival',
        dest='priority',
        action='store_false',
        help="engines take requests in the order in which they come (default, as it is vLLM's)",
    )
    parser.add_argument(
        '--no-admission', dest='admission', action='store_false', help='trees do not wait for room in the KV cache'
    )
    parser.add_argument(
        '--validate', nargs='+', metavar='FILE', help='predict these results of the bench instead of the sweeps'
    )
    parser.add_argument('--json', metavar='FILE', help='write all figures there')


def run(args: argparse.Namespace) -> int:
    """A table with a row for every combination of the sweeps, or for every mode of every bench result."""
    model = EngineModel.from_json(args.engine)
    rows = _validate(model, args) if args.validate else _sweep(model, args)
    if args.json:
        Path(args.json).write_text(json.dumps({'engine': asdict(model), 'rows': rows}, indent=1) + '\n')
        print(f'written to {args.json}')
    return 0


def _sweep(model: EngineModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    setups = _setups(args)
    settings = [_settings(setup) for setup in setups]
    results = _simulate(model, setups)
    shown = [{key: _show(value) for key, value in row.items()} for row in settings]
    values = {key: {row[key] for row in shown} - {''} for key in shown[0]}
    varied = [key for key in values if len(values[key]) > 1 or key == 'schedule']
    fixed = [f'{key} {value}' for key in values if key not in varied for value in values[key]]
    rows = [{key: row[key] for key in varied} | _figures(result) for row, result in zip(shown, results)]
    print(f'{model.hardware or args.engine}; {", ".join(fixed)}')
    print(table(rows, transpose=False))
    return [{'settings': row, 'result': asdict(result)} for row, result in zip(settings, results)]


def _validate(model: EngineModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    measured = [
        measurement
        for path in args.validate
        for measurement in read_bench(path, priority=args.priority, admission=args.admission, seed=args.seed)
    ]
    if not measured:
        raise ValueError(
            f'no run in {", ".join(args.validate)} is of a mode that can be simulated: {", ".join(SCHEDULES)}.'
        )
    results = _simulate(model, [measurement.setup for measurement in measured])
    errors = [result.seconds / m.seconds - 1 for m, result in zip(measured, results)]
    rows = [
        {
            'file': m.file,
            'hardware': m.hardware,
            'mode': m.setup.schedule,
            'measured s': f'{m.seconds:.2f}',
            'predicted s': f'{result.seconds:.2f}',
            'error': f'{error:+.1%}',
        }
        for m, result, error in zip(measured, results, errors)
    ]
    print(f'Predictions for {model.hardware or args.engine}')
    print(table(rows))
    print(f'mean absolute error {sum(map(abs, errors)) / len(errors):.1%}')
    return [
        {
            'file': m.file,
            'settings': _settings(m.setup),
            'measured_seconds': m.seconds,
            'error': error,
            'result': asdict(result),
        }
        for m, result, error in zip(measured, results, errors)
    ]


def _simulate(model: EngineModel, setups: list[Setup]) -> list[Result]:
    bar = tqdm(setups, 'simulated', delay=2, leave=False, dynamic_ncols=True, disable=len(setups) == 1)
    return [simulate(model, setup) for setup in bar]


def _setups(args: argparse.Namespace) -> list[Setup]:
    """Every combination. What only trees know makes no further rows of independent sampling."""
    lengths = LengthDistribution.from_json(args.lengths) if args.lengths else None
    setups: dict[tuple[Any, ...], Setup] = {}
    for prompts, width, servers, data_parallel, config, schedule in product(
        *(_integers(args, name) for name in ('prompts', 'width', 'servers', 'data_parallel')),
        _configs(args),
        args.schedule.split(','),
    ):
        setup = Setup(
            config,
            schedule,
            prompts=prompts,
            width=width,
            prompt_tokens=args.prompt_tokens,
            lengths=lengths or LengthDistribution.fixed(config.max_response_tokens),
            servers=servers,
            data_parallel=data_parallel,
            priority=args.priority,
            admission=args.admission,
            seed=args.seed,
        )
        setups.setdefault(tuple(_settings(setup).values()), setup)
    return list(setups.values())


def _configs(args: argparse.Namespace) -> list[TreeConfig]:
    config = TreeConfig.load({CONFIG_ENV: args.config}) if args.config else TreeConfig()
    sweeps: dict[str, list[Any]] = {
        field: _integers(args, name) for name, field in CONFIG_SWEEPS.items() if getattr(args, name)
    }
    if args.pacing:
        sweeps['pacing'] = args.pacing.split(',')
    return [config.replace(**dict(zip(sweeps, values))) for values in product(*sweeps.values())]


def _integers(args: argparse.Namespace, name: str) -> list[int]:
    text = getattr(args, name)
    try:
        return [int(part) for part in text.split(',')]
    except ValueError:
        raise ValueError(f'--{name.replace("_", "-")} {text}: must be integers, separated by commas.') from None


def _settings(setup: Setup) -> dict[str, Any]:
    """What tells one row from another; None for what independent sampling does not know."""
    config, tree = setup.config, setup.schedule != 'independent'
    return {
        'schedule': setup.schedule,
        'prompts': setup.prompts,
        'W': setup.width,
        'D': config.max_depth,
        'S': config.segment_length,
        'd': config.divergence if tree else None,
        'root d': config.root_divergence if tree else None,
        'pacing': config.pacing if tree else None,
        'servers': setup.servers,
        'DP': setup.data_parallel,
        'prompt tokens': setup.prompt_tokens,
        'mean length': setup.lengths.mean,
        'order': 'priority' if setup.priority else 'arrival',
        'admission': setup.admission if tree else None,
        'seed': setup.seed,
    }


def _show(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.0f}' if isinstance(value, float) else str(value)


def _figures(result: Result) -> dict[str, str]:
    return {
        'seconds': f'{result.seconds:.1f}',
        'traj/s': f'{result.trajectories_per_second:.2f}',
        'tokens/s': f'{result.decoded_tokens_per_second:.0f}',
        'decoded': f'{result.decoded_tokens / result.trajectory_tokens:.0%}',
        'batch': f'{result.mean_running:.1f}',
        'prefilled': str(result.prefill_tokens),
        'preempted': str(result.preemptions),
        'peak KV': str(result.peak_kv_tokens),
        'p50 s': f'{result.latency_p50:.1f}',
        'p95 s': f'{result.latency_p95:.1f}',
        'p99 s': f'{result.latency_p99:.1f}',
        'tail s': f'{result.tail_seconds:.1f}',
        'loop': f'{result.event_loop_utilisation:.0%}',
    }
