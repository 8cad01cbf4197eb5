"""Compare trees with independent sampling on a real engine, or time the scheduler and the estimators alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_swift.config import TreeConfig
from treepo_swift.lab.bench import estimators
from treepo_swift.lab.bench.table import table
from treepo_swift.lab.bench.workload import KINDS, Workload, made_up_messages, read_messages
from treepo_swift.lab.lengths import LengthDistribution

EPILOG = """Rows of the table that may need a word:
  of bound   the speed-up over what the saved tokens allow; above 1 where swift's own path costs more for a token
  prefilled  input tokens that were not in the prefix cache
  evicted    those of them that had been there
  tail       share of the time, at its end, with less than half of the most running sequences
  scheduler CPU  of the rollout's time, spent in the scheduler on the event loop
Everything after -- goes to the engine, as `swift rollout` takes it:
  treepo-swift bench --prompts 12 --width 16 -- --model Qwen/Qwen2.5-1.5B-Instruct --vllm_max_model_len 8192
--train with a model measures a whole step of it, rollout and policy pass, with and without trees:
  treepo-swift bench --train --prompts 8 --picture step.png -- --model Qwen/Qwen2.5-1.5B-Instruct
Without one it grows trees with the shape of the paper, by lengths that were recorded, for a random model:
  treepo-swift bench --train --size 0.5B --prompts 1 --width 16 --lengths examples/scale/lengths.json --json out.json
The tree's shape comes from TREEPO_CONFIG and TREEPO_* variables, as everywhere."""

if TYPE_CHECKING:
    from treepo_swift.lab.bench.train import TrainedRow

PROFILED_PROMPTS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--fake', action='store_true', help='the scheduler alone, on an engine that costs nothing')
    what.add_argument('--estimators', action='store_true', help='the advantage estimators alone')
    what.add_argument('--train', action='store_true', help='a policy pass over padded rows and over their trie')
    what.add_argument('--fit', metavar='FILE', help="measure the engine's speed for `treepo-swift simulate`")
    parser.add_argument('--prompts', type=int, default=12, help='prompts of a rollout (default 12)')
    parser.add_argument('--width', type=int, default=16, help='trajectories of a prompt (default 16)')
    parser.add_argument(
        '--modes',
        default='independent,lockstep,stream',
        help='of independent, lockstep, stream and, with --example, example (default: the first three)',
    )
    parser.add_argument(
        '--workload', choices=KINDS, default='fixed', help='how answers end: at the limit, by themselves, or --lengths'
    )
    parser.add_argument('--lengths', metavar='FILE', help='JSON list of answer lengths in tokens, for that workload')
    parser.add_argument('--data', metavar='FILE', help='prompts: JSON lines with "messages" (default: made-up ones)')
    parser.add_argument('--example', metavar='FILE', help="the plugin file of ms-swift's tree example")
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--repeats', type=int, default=5, help='measured runs of each mode (default 5)')
    train = parser.add_argument_group('--train')
    train.add_argument('--size', help='random Qwen2 of that size: quickstart (default), 0.5B, 1.5B or 7B')
    train.add_argument('--rows', metavar='FILE', help='recorded rows instead of grown trees')
    train.add_argument('--prompt-tokens', type=int, default=64, help='of each grown tree (default 64)')
    train.add_argument('--micro-batch', type=int, default=0, help='rows of a micro-batch (default: all of them)')
    train.add_argument('--padded-micro-batch', type=int, default=0, help='the same where logits of whole rows are made')
    train.add_argument('--ways', default='', help='of padded, padding_free (with flash-attn), packed, shared')
    train.add_argument('--checkpointing', action='store_true', help='gradient checkpointing')
    train.add_argument('--device', default='', help='cuda or cpu (default: cuda where there is one)')
    parser.add_argument('--keep-rows', metavar='FILE', help='write what the last trees hold, for --train --rows')
    parser.add_argument('--json', metavar='FILE', help='write all figures there')
    parser.add_argument('--picture', metavar='FILE', help='draw rollouts, or --train, as a PNG there (matplotlib)')
    parser.add_argument('engine', nargs='*', metavar='-- OPTIONS OF swift rollout', help='the engine, e.g. its --model')


def run(args: argparse.Namespace) -> int:
    if min(args.prompts, args.width, args.repeats) < 1:
        raise ValueError('--prompts, --width and --repeats must be at least 1')
    if args.picture:
        _check_picture(args)
    if args.fake:
        return _fake(args)
    if args.estimators:
        return _estimators(args)
    if args.fit:
        return _fit(args)
    if args.train:
        return _step(args) if args.engine else _train(args)
    return _engine(args)


def _fake(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench import fake

    config = _workload(args).config
    # Imports and warm-up are not what is asked for.
    fake.rollout(config, 1, args.width, packed=True)
    scheduler = fake.measure(config, prompts=args.prompts, width=args.width)
    profile = fake.profile(config, prompts=min(args.prompts, PROFILED_PROMPTS), width=args.width)
    payload = fake.payload(config, width=args.width)
    _write(args.json, {'scheduler': scheduler, 'profile': profile, 'payload': payload})
    print('\n\n'.join(map(table, ([scheduler], profile, payload))))
    return 0


def _estimators(args: argparse.Namespace) -> int:
    trajectories, depth = args.prompts * args.width, TreeConfig.load().max_depth
    rows = estimators.measure(trajectories=trajectories, depth=depth, width=args.width, repeats=args.repeats)
    print(f'{trajectories:,} trajectories, {depth} nodes each, trees of width {args.width}')
    print(table(rows))
    return 0


def _train(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench import train

    size = args.size or 'quickstart'
    if size not in train.SIZES:
        raise ValueError(f'--size {args.size}: must be one of {", ".join(train.SIZES)}.')
    if args.rows:
        rows = train.read_rows(args.rows)
    else:
        config = TreeConfig.load()
        limit = LengthDistribution.fixed(config.max_response_tokens)
        rows = train.grow_rows(
            config,
            prompts=args.prompts,
            width=args.width,
            prompt_tokens=args.prompt_tokens,
            lengths=LengthDistribution.from_json(args.lengths) if args.lengths else limit,
            vocabulary=train.SIZES[size]['vocab_size'],
        )
    found = _policy_pass(args, size, rows, args.micro_batch, args.ways.split(',') if args.ways else ())
    _write(args.json, found)
    _draw(args.picture, found)
    print(
        f'{found["hardware"]}, {found["dtype"]}, {found["attention"]}, random Qwen2 of size {size}, '
        f'{found["rows"]} rows, medians of {args.repeats} interleaved runs, '
        f'{"variable-length" if found["varlen"] else "padded"} attention over tries\n'
        f'{found["row_tokens"]:,} row tokens, {found["padded_tokens"]:,} padded, {found["trie_tokens"]:,} in tries '
        f'(ratio {found["row_tokens"] / found["trie_tokens"]:.2f})'
    )
    print(
        table(
            [
                {
                    'way': way,
                    'micro-batches': found['micro_batches'][way],
                    **{f'{key} s': f'{figures[key]:.3f}' for key in ('no_grad', 'forward', 'backward')},
                    'policy pass': f'{figures["speed_up"]:.2f} x',
                    'no-grad pass': f'{figures["no_grad_speed_up"]:.2f} x',
                    'peak MiB': f'{figures["peak_mib"]:.0f}',
                    'largest gap': f'{figures["gap"]:.1e}',
                    'mean gap': f'{figures["mean_gap"]:.1e}',
                }
                for way, figures in found['modes'].items()
            ]
        )
    )
    if found['too_large']:
        print(f'Not enough memory for {", ".join(found["too_large"])}: give a smaller --micro-batch.')
    return 0


def _policy_pass(
    args: argparse.Namespace, model: str, rows: Sequence[TrainedRow], micro_batch: int, ways: Sequence[str]
) -> dict[str, Any]:
    import torch

    from treepo_swift.lab.bench import train

    bench = train.TrainBench(
        model,
        rows,
        device=args.device or ('cuda' if torch.cuda.is_available() else 'cpu'),
        micro_batch=micro_batch,
        padded_micro_batch=args.padded_micro_batch,
        checkpointing=args.checkpointing,
        ways=ways,
    )
    return train.measure(bench, args.repeats)


def _step(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench import step

    if args.size or args.rows or args.ways or args.keep_rows:
        raise ValueError('--size, --rows, --ways and --keep-rows do nothing where a model stands behind --.')
    model = step.model_in(args.engine)
    names = ('prompts', 'width', 'workload', 'lengths', 'data', 'temperature', 'repeats')
    given = [(f'--{name}', str(getattr(args, name))) for name in names if getattr(args, name) is not None]
    # A config or a file that can't be used is known before an engine starts.
    _workload(args)
    rollouts, rows = step.run_rollouts([part for pair in given for part in pair], args.engine)
    training = _policy_pass(args, model, rows, args.micro_batch or args.width, ('padded', 'shared'))
    if missing := {'padded', 'shared'} - set(training['modes']):
        raise ValueError(f'Not enough memory for the {" and ".join(missing)} pass: give a smaller --micro-batch.')
    found = step.whole_step(rollouts, training)
    _write(args.json, found)
    _draw(args.picture, found)
    print(
        f'\n{found["hardware"]}, {training["dtype"]}, {model}, {args.prompts} prompts x {args.width}, '
        f'{args.workload} ends, medians of {args.repeats} interleaved runs\n{training["row_tokens"]:,} row tokens, '
        f'{training["trie_tokens"]:,} in tries; the largest gap between log-probs is '
        f'{training["modes"]["shared"]["gap"]:.1e}'
    )
    print(table(step.step_rows(found)))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench import engine as real
    from treepo_swift.lab.bench.fit import fit

    model, error = fit(real.open_engine(args.engine))
    model.to_json(args.fit)
    print(
        f'{model}\nIts step times are {error:.1%} off at the points that it was fitted to, in the mean. '
        f'Written to {args.fit}'
    )
    return 0


def _workload(args: argparse.Namespace) -> Workload:
    if (args.workload == 'lengths') != (args.lengths is not None):
        raise ValueError('--lengths FILE belongs to --workload lengths, and it to --lengths.')
    config = TreeConfig.load()
    if args.workload != 'natural':
        # Text that nobody meant to end must not look like an end.
        config = config.replace(stop={'answer': 'none', 'repetition': 'none'})
    return Workload(
        kind=args.workload,
        messages=read_messages(args.data, args.prompts) if args.data else made_up_messages(args.prompts),
        width=args.width,
        config=config,
        lengths=LengthDistribution.from_json(args.lengths) if args.lengths else None,
    )


def _engine(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench import engine as real

    modes = args.modes.split(',')
    if unknown := [mode for mode in modes if mode not in real.MODES]:
        raise ValueError(f'--modes {args.modes}: unknown {", ".join(unknown)}; allowed are {", ".join(real.MODES)}.')
    if ('example' in modes) != (args.example is not None):
        raise ValueError('--example FILE belongs to --modes ...,example, and it to --example.')
    if args.keep_rows and not {'stream', 'lockstep'} & set(modes):
        raise ValueError('--keep-rows keeps trees: --modes must have stream or lockstep.')
    workload = _workload(args)
    bench = real.Bench(real.open_engine(args.engine), workload, temperature=args.temperature, example=args.example)
    found = real.measure(bench, modes, args.repeats, keep_rows=args.keep_rows)
    _write(args.json, found)
    _draw(args.picture, found)
    print(
        f'\n{found["hardware"]}, {args.prompts} prompts x {args.width}, at most {workload.max_tokens} tokens, '
        f'{args.workload} ends, medians of {args.repeats} interleaved runs'
    )
    print(table([_row(mode, summary) for mode, summary in found['modes'].items()]))
    return 0


def _row(mode: str, summary: dict[str, Any]) -> dict[str, Any]:
    seconds = summary['seconds']
    row = {
        'mode': mode,
        'seconds': f'{seconds["median"]:.2f} ({seconds["min"]:.2f} to {seconds["max"]:.2f})',
        'trajectories/s': f'{summary["trajectories_per_second"]:.2f}',
        'speed-up': f'{summary["speed_up"]:.2f}' if 'speed_up' in summary else '',
        'of bound': f'{summary["speed_up_of_bound"]:.2f}' if 'speed_up' in summary else '',
        'decoded tokens/s': f'{summary["decoded_tokens_per_second"]:.0f}',
    }
    for name in ('trajectory_tokens', 'decoded_tokens', 'prefilled_tokens', 'evicted_tokens', 'requests'):
        row[f'{name.replace("_", " ")}/trajectory'] = f'{summary[f"{name}_per_trajectory"]:.1f}'
    row['prefix hits'] = f'{summary["prefix_hit_rate"]:.0%}'
    row['preemptions'] = f'{summary["preemptions"]:.0f}'
    row['scheduler CPU'] = f'{summary["scheduler_cpu_share"]:.1%}' if summary['scheduler_cpu_share'] else ''
    row['tail'] = f'{summary["tail_share"]:.0%}'
    row['peak KV'] = f'{summary["peak_kv_usage"]:.0%}'
    row['peak RSS MiB'] = f'{summary["peak_rss_mib"]:.0f}'
    return row


def _write(path: str | None, found: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + '\n')
        print(f'written to {path}')


def _check_picture(args: argparse.Namespace) -> None:
    """Before anything is measured."""
    from treepo_swift.lab.bench.picture import can_draw

    if args.fake or args.estimators or args.fit:
        raise ValueError('--picture draws rollouts on an engine, and --train: leave it out here.')
    if not can_draw():
        raise ValueError('--picture needs matplotlib: pip install matplotlib, or leave it out.')


def _draw(path: str | None, found: dict[str, Any]) -> None:
    if path:
        from treepo_swift.lab.bench.picture import draw

        draw(found, Path(path))
        print(f'drawn to {path}')
