"""Grow trees for the prompts of a file, offline on vLLM, and keep them for `treepo-swift view`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from treepo_swift.config import TreeConfig

EPILOG = r"""Everything after -- goes to the engine, as `swift rollout` takes it:
  treepo-swift sample Qwen/Qwen2.5-1.5B-Instruct --prompts prompts.jsonl --width 16 -- --vllm_max_model_len 8192
A line of the prompts is a JSON object with "messages", "prompt" or "query". With a "solution", or with --reward,
answers are judged. The tree's shape comes from TREEPO_CONFIG and TREEPO_* variables, as everywhere. A run that was
killed goes on where it stopped when the same command is given again."""

TAKES_ENGINE_OPTIONS = True
"""What comes after -- is `args.engine`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument('model', metavar='MODEL', help='as --model of `swift rollout` takes it')
    parser.add_argument('--prompts', type=Path, required=True, metavar='FILE', help='JSON lines')
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='trees as JSON lines (default: PROMPTS.trees.jsonl)'
    )
    parser.add_argument('--width', type=int, default=8, help='answers to a prompt (default 8)')
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` and `eval` have in common."""
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N prompts')
    parser.add_argument('--max-tokens', type=int, metavar='N', help='most tokens of an answer (default: D x S)')
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--seed', type=int, help='sample reproducibly (default: every run is another one)')
    parser.add_argument('--batch', type=int, default=32, metavar='N', help='prompts that grow at once (default 32)')
    parser.add_argument(
        '--reward', metavar='NAME', help="a reward function of swift (default: \\boxed{} is 'solution')"
    )
    parser.add_argument(
        '--external_plugins', type=Path, nargs='+', default=[], metavar='FILE', help='that register reward functions'
    )


def check_numbers(args: argparse.Namespace, **more: int) -> None:
    """Raise ``ValueError`` for counts that can not be, before a model loads."""
    counts = {'--limit': args.limit, '--max-tokens': args.max_tokens, '--batch': args.batch, **more}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f'{name} {value}: must be at least 1.')
    if args.temperature < 0:
        raise ValueError(f'--temperature {args.temperature}: must not be negative.')


def tree_config(args: argparse.Namespace, width: int, block_size: int) -> tuple[TreeConfig, int]:
    """The shell's config, fitted to --max-tokens where that is given, and the most tokens of an answer."""
    if args.max_tokens is None:
        config = TreeConfig.load()
        return config, config.max_response_tokens
    config = TreeConfig.load_for(args.max_tokens, width=width, block_size=block_size)
    config.check_fits(args.max_tokens, '--max-tokens')
    return config, args.max_tokens


def run(args: argparse.Namespace) -> int:
    try:
        return _sample(args)
    except (OSError, ValueError) as e:
        print(f'treepo-swift sample: {e}', file=sys.stderr)
        return 1


def _sample(args: argparse.Namespace) -> int:
    from treepo_swift.lab.sampling import growing
    from treepo_swift.lab.sampling.files import TreesFile
    from treepo_swift.lab.sampling.judging import load_judge
    from treepo_swift.lab.sampling.prompts import read_prompts

    check_numbers(args, **{'--width': args.width})
    rows = read_prompts(args.prompts, args.limit)
    judged = args.reward is not None or any('solution' in row.columns for row in rows)
    judge = load_judge(args.reward, args.external_plugins, rows) if judged else None
    # A wrong config is known before a model loads.
    tree_config(args, args.width, 1)
    output = args.output or args.prompts.with_name(f'{args.prompts.stem}.trees.jsonl')
    sampler = growing.open_sampler(args.model, args.engine)
    try:
        config, max_tokens = tree_config(args, args.width, sampler.block_size)
        sampling = growing.Sampling(config, args.width, max_tokens, args.temperature, args.seed)
        settings = {'model': args.model, 'reward': args.reward, **sampling.to_dict()}
        file = TreesFile(output, settings)
        growing.grow_missing(sampler, rows, [growing.Plan('sample', sampling, file)], judge, batch=args.batch)
    finally:
        sampler.close()
    trees = [tree.record for tree in file.trees]
    tokens = sum(t.loss_tokens for record in trees for t in record.trajectories)
    decoded = sum(record.stats['decoded_tokens'] for record in trees)
    rewards = [t.reward for record in trees for t in record.trajectories if t.reward is not None]
    said = f', mean reward {sum(rewards) / max(len(rewards), 1):.3f}' if judge else ', not judged: rewards are 0'
    print(f'{len(trees)} trees of {args.width}: {tokens:,} tokens of answers, {decoded:,} decoded{said}')
    print(f'{output}: look at them with  treepo-swift view {output} --open')
    return 0
