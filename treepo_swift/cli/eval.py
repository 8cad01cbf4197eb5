"""Compare trees with independent sampling at test time: pass@k and majority vote against tokens and wall time."""

from __future__ import annotations

import argparse
from pathlib import Path

from .sample import SOURCES, add_sampling_arguments, check_numbers, source_of, tree_config

EPILOG = r"""Everything after -- goes to the engine, as `swift rollout` takes it:
  treepo-swift eval Qwen/Qwen2.5-1.5B-Instruct --data heldout.jsonl --width 4 8 16 -- --vllm_max_model_len 8192
  treepo-swift eval Qwen/Qwen2.5-1.5B-Instruct --data reasoning-gym:leg_counting#100
A line of a file is a JSON object with "messages", "prompt" or "query", and with a "solution" that the last \boxed{}
of an answer is compared with; --reward judges otherwise, and reasoning-gym by its own scorers. Each setting has a file
of its own in --output, so a run that was killed goes on where it stopped when the same command is given again.
docs/sampling.md says what is counted."""

TAKES_ENGINE_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument('model', metavar='MODEL', help='as --model of `swift rollout` takes it')
    parser.add_argument('--data', required=True, metavar='SOURCE', help=SOURCES)
    parser.add_argument(
        '--output', type=Path, default=Path('output/eval'), metavar='DIR', help='(default: output/eval)'
    )
    parser.add_argument('--width', type=int, nargs='+', default=[16], metavar='W', help='answers a prompt (default 16)')
    parser.add_argument(
        '--divergence', type=int, nargs='*', default=[2, 4], metavar='D', help='of the trees (default 2 4)'
    )
    parser.add_argument(
        '--pacing', nargs='+', default=['eager', 'even'], metavar='P', help='of the trees (default: eager even)'
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from treepo_swift.lab.bench.picture import can_draw
    from treepo_swift.lab.bench.result import hardware
    from treepo_swift.lab.bench.table import table
    from treepo_swift.lab.sampling import evaluation, growing
    from treepo_swift.lab.sampling.files import TreesFile
    from treepo_swift.lab.sampling.judging import load_judge
    from treepo_swift.lab.sampling.plot import plot

    check_numbers(args, **{'--width': min(args.width), '--divergence': min(args.divergence, default=1)})
    if unknown := [pacing for pacing in args.pacing if pacing not in evaluation.PACINGS]:
        raise ValueError(f'--pacing {" ".join(unknown)}: allowed are {" and ".join(evaluation.PACINGS)}.')
    rows, judge = source_of(args, args.data).load(args.limit, args.reward)
    judge = judge or load_judge(args.reward, rows)
    settings = evaluation.settings_of(args.divergence, args.pacing, args.width)
    # A wrong config is known before a model loads.
    tree_config(args, max(args.width), 1)
    sampler = growing.open_sampler(args.model, args.engine)
    try:
        config, max_tokens = tree_config(args, max(args.width), sampler.block_size)
        plans = []
        for setting in settings:
            sampling = setting.sampling(config, max_tokens=max_tokens, temperature=args.temperature, seed=args.seed)
            asked = {'model': args.model, 'reward': args.reward, 'batch': args.batch, **sampling.to_dict()}
            file = TreesFile(args.output / f'{setting.name}.jsonl', asked)
            plans.append(growing.Plan(setting.name, sampling, file))
        growing.grow_missing(sampler, rows, plans, judge, batch=args.batch, warm_up=True)
    finally:
        sampler.close()
    keys = {row.key for row in rows}
    curves = []
    for setting, plan in zip(settings, plans, strict=True):
        trees = [tree for tree in plan.file.trees if tree.prompt in keys]
        curves.append(evaluation.curve(setting, trees, seed=args.seed or 0))
    head = {
        'hardware': hardware(),
        'model': args.model,
        'data': args.data,
        'prompts': len(rows),
        'batch': args.batch,
        'max_tokens': max_tokens,
        'temperature': args.temperature,
        'seed': args.seed,
        'config': config.to_dict(),
    }
    written = evaluation.write_results(args.output, head, curves)
    if can_draw():
        written.append(args.output / 'results.png')
        plot(curves, written[-1])
    else:
        print('No plot: matplotlib is not installed (`pip install matplotlib`, then give the same command again).')
    if failed := sum(found.failed for found in curves):
        print(f'{failed} answers failed and are in no estimate; the log above says why.')
    print(f'written: {", ".join(map(str, written))}')
    print(f'{head["hardware"]}, {len(rows)} prompts, {args.batch} at once, at most {max_tokens} tokens an answer')
    print(table(evaluation.summary_rows(curves)))
    return 0
