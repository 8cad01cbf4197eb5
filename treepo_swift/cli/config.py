"""Check the tree config of this shell (TREEPO_CONFIG, TREEPO_* variables) and print it resolved."""

from __future__ import annotations

import argparse
import json

from treepo_swift.config import KV_BLOCK, ConfigError, TreeConfig, reference, schema
from treepo_swift.trainer.growth import describe_growth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--reference', action='store_true', help='print the documentation of every key instead')
    what.add_argument('--schema', action='store_true', help='print the JSON Schema instead, for editors')
    run = parser.add_argument_group('fitted to a run', 'print what a training with these options would get')
    run.add_argument('--max-completion-length', type=int, metavar='TOKENS', help='of `swift rlhf`')
    run.add_argument('--num-generations', type=int, metavar='W', default=8, help='of `swift rlhf` (its default: 8)')
    run.add_argument(
        '--block-size', type=int, metavar='TOKENS', default=KV_BLOCK, help=f"of vLLM's KV cache (default: {KV_BLOCK})"
    )


def run(args: argparse.Namespace) -> int:
    if args.reference:
        print(reference(), end='')
        return 0
    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    print(_resolved(args), end='')
    return 0


def _resolved(args: argparse.Namespace) -> str:
    if args.max_completion_length is None:
        return TreeConfig.load().to_yaml()
    options = {
        '--max-completion-length': args.max_completion_length,
        '--num-generations': args.num_generations,
        '--block-size': args.block_size,
    }
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f'{name} {value}: must be at least 1.')
    config = TreeConfig.load_for(args.max_completion_length, width=args.num_generations, block_size=args.block_size)
    config.check_fits(args.max_completion_length, '--max-completion-length')
    lines = describe_growth(
        config, width=args.num_generations, max_response=args.max_completion_length, block_size=args.block_size
    )
    return ''.join(f'# {line}\n' for line in lines) + config.to_yaml()
