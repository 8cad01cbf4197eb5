"""Grow trees for prompts of a file, a dataset or reasoning-gym, offline on vLLM, for `treepo-swift view`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from treepo_swift.config import TreeConfig

if TYPE_CHECKING:
    from treepo_swift.lab.sampling.sources import Source

EPILOG = r"""Everything after -- goes to the engine, as `swift rollout` takes it:
  treepo-swift sample Qwen/Qwen2.5-1.5B-Instruct --prompts prompts.jsonl --width 16 -- --vllm_max_model_len 8192
A line of a file is a JSON object with "messages", "prompt" or "query". With a "solution", or with --reward, answers
are judged; those to reasoning-gym's puzzles by its own scorers. The tree's shape comes from TREEPO_CONFIG and TREEPO_*
variables, as everywhere. A run that was killed goes on where it stopped when the same command is given again."""

SOURCES = 'a file of JSON lines, a dataset id or folder as swift takes it (ID:SUBSET#N), or reasoning-gym:TASK#N'
TAKES_ENGINE_OPTIONS = True
"""What comes after -- is `args.engine`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument('model', metavar='MODEL', help='as --model of `swift rollout` takes it')
    parser.add_argument('--prompts', required=True, metavar='SOURCE', help=SOURCES)
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='trees as JSON lines (default: PROMPTS.trees.jsonl)'
    )
    parser.add_argument('--width', type=int, default=8, help='answers to a prompt (default 8)')
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` and `eval` have in common."""
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N prompts')
    parser.add_argument(
        '--use_hf', type=_truth, metavar='true|false', help='datasets: from Hugging Face, not ModelScope (as in swift)'
    )
    parser.add_argument(
        '--columns', type=_names, metavar='JSON', help='datasets: other names for columns (as in swift)'
    )
    parser.add_argument('--data_seed', type=int, help='datasets: draw the N of #N; reasoning-gym: other puzzles')
    parser.add_argument('--max-tokens', type=int, metavar='N', help='most tokens of an answer (default: D x S)')
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--seed', type=int, help='sample reproducibly (default: every run is another one)')
    parser.add_argument('--batch', type=int, default=32, metavar='N', help='prompts that grow at once (default 32)')
    parser.add_argument(
        '--reward', metavar='NAME', help="a reward function of swift (default: \\boxed{} is 'solution')"
    )
    parser.add_argument(
        '--external_plugins', type=Path, nargs='+', default=[], metavar='FILE', help='that register rewards or datasets'
    )


def _truth(text: str) -> bool:
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text}: must be true or false')
    return text.lower() == 'true'


def _names(text: str) -> dict[str, str]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise argparse.ArgumentTypeError(f'{text}: must be JSON as in {{"answer": "solution"}}')
    return names


def source_of(args: argparse.Namespace, name: str) -> Source:
    """What --prompts or --data says, with the options that belong to it."""
    from treepo_swift.lab.sampling.sources import Source

    return Source(name, args.use_hf, args.columns, args.data_seed, args.external_plugins)


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
    from treepo_swift.lab.sampling import growing
    from treepo_swift.lab.sampling.files import TreesFile

    check_numbers(args, **{'--width': args.width})
    source = source_of(args, args.prompts)
    rows, judge = source.load(args.limit, args.reward)
    # A wrong config is known before a model loads.
    tree_config(args, args.width, 1)
    output = args.output or source.trees_path
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
