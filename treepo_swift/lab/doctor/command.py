"""The command that somebody is about to start: ``treepo-swift doctor -- swift rollout ...``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treepo_swift.config import KV_BLOCK, TreeConfig

from . import machine
from .finding import Finding, fail, ok, warn

LOOPBACK = {'127.0.0.1', 'localhost', '::1'}
GROUP_PORT = 51216
"""Where the weights come in, if --vllm_server_group_port says nothing else."""


def check_command(command: Sequence[str]) -> Iterator[Finding]:
    """Findings about ``swift rollout ...`` or ``swift rlhf ...``: flags as the installed ms-swift reads them."""
    from swift.arguments import RLHFArguments, RolloutArguments
    from transformers import HfArgumentParser

    kinds = {'rollout': RolloutArguments, 'rlhf': RLHFArguments}
    if len(command) < 2 or command[0] != 'swift' or command[1] not in kinds:
        yield fail(
            'command', ' '.join(command[:3]), 'give it as you would start it: -- swift rollout ... or swift rlhf ...'
        )
        return
    args, unknown = HfArgumentParser([kinds[command[1]]]).parse_known_args(list(command[2:]))
    if unknown:
        yield fail('flags', f'ms-swift does not know {" ".join(unknown)}', 'leave it out, or mind its spelling')
    else:
        yield ok('flags', f'ms-swift knows all flags of swift {command[1]}')
    yield from _plugins(args)
    yield from _rollout(args) if command[1] == 'rollout' else _training(args)
    yield from _tree(args)


def _plugins(args: Any) -> Iterator[Finding]:
    files = [Path(file).expanduser() for file in args.external_plugins]
    for file in files:
        if not file.is_file():
            yield fail('plugins', f'{file} is no file', '`treepo-swift plugin` prints the path of ours')
        elif file.stem in ('treepo_swift', 'plugin'):
            yield fail('plugins', f"{file.name} hides a package: swift puts its folder into Python's path", 'rename it')
    texts = {file: file.read_text(errors='replace') for file in files if file.is_file()}
    if not any('treepo_swift' in text for text in texts.values()):
        yield fail('plugins', 'none of --external_plugins loads treepo_swift', 'add "$(treepo-swift plugin)"')
    others = [file for file, text in texts.items() if "multi_turns['tree_rollout_scheduler']" in text]
    if others:
        yield fail(
            'schedulers',
            f'{others[0]} registers a scheduler under the name tree_rollout_scheduler, which ours has too; '
            'the file that is loaded last wins',
            'leave that file out, or give its scheduler another name',
        )


def _rollout(args: Any) -> Iterator[Finding]:
    if not args.multi_turn_scheduler:
        yield fail(
            'scheduler', 'no --multi_turn_scheduler: this server grows no trees', '--multi_turn_scheduler treepo'
        )
    if not args.vllm_use_async_engine:
        yield fail(
            'engine',
            'trees grow on the asynchronous engine, and this server would have the other one',
            '--vllm_use_async_engine true',
        )
    if args.host not in LOOPBACK:
        yield warn(
            'network',
            f'--host {args.host}: whoever reaches this port can replace the weights, and what comes in at port '
            f'{GROUP_PORT} is unpickled',
            '--host 127.0.0.1 on one machine; else a network that nobody else reaches (docs/gpu.md)',
        )
    yield machine.port(args.port, 'the server')


def _training(args: Any) -> Iterator[Finding]:
    if args.rlhf_type != 'grpo':
        yield fail('algorithm', f'--rlhf_type {args.rlhf_type}: trees are for GRPO', '--rlhf_type grpo')
    if not args.use_vllm:
        yield fail('engine', 'trees grow on vLLM only', '--use_vllm true --vllm_mode server (or colocate)')
    elif args.vllm_mode == 'server' and args.multi_turn_scheduler:
        yield warn(
            'schedulers',
            f'--multi_turn_scheduler {args.multi_turn_scheduler} does nothing here in server mode: '
            '`swift rollout` has the scheduler',
            'give it to `swift rollout`, and leave it out here',
        )
    elif args.vllm_mode == 'colocate' and not args.multi_turn_scheduler:
        yield fail('scheduler', 'no --multi_turn_scheduler: this run grows no trees', '--multi_turn_scheduler treepo')
    if args.vllm_mode == 'server':
        for port in args.vllm_server_group_port or [GROUP_PORT]:
            yield machine.port(port, 'weights, if the server runs on this machine')
    yield machine.disk(Path(args.output_dir or 'output'))


def _tree(args: Any) -> Iterator[Finding]:
    config = TreeConfig.load()
    limits = {
        '--max_completion_length': getattr(args, 'max_completion_length', None),
        '--vllm_max_model_len': args.vllm_max_model_len,
        f'the context of {args.model}': _context(args.model),
    }
    if config != TreeConfig():
        for name, limit in limits.items():
            if limit is not None:
                config.check_fits(limit, name)
    block = _block_size(args)
    if config.is_given('segment_length') and config.segment_length % block:
        yield warn(
            'tree config',
            f'segment_length {config.segment_length} is no multiple of the KV block of {block} tokens: every fork '
            'computes a part of a block again',
            f'segment_length: {max(round(config.segment_length / block), 1) * block}',
        )
    else:
        yield longest_path(config)


def longest_path(config: TreeConfig) -> Finding:
    return ok('tree config', f'{config.max_response_tokens} tokens at most on a path')


def _context(model: str | None) -> int | None:
    """Tokens that a local model takes; None where it is not local, and so not known yet."""
    file = Path(model or '') / 'config.json'
    if not model or not file.is_file():
        return None
    values = json.loads(file.read_text())
    limit = values.get('max_position_embeddings') or (values.get('text_config') or {}).get('max_position_embeddings')
    return int(limit) if limit else None


def _block_size(args: Any) -> int:
    from treepo_swift.compat.cpu import is_cpu_only

    asked = getattr(args, 'vllm_engine_kwargs', None)
    if isinstance(asked, str):
        asked = json.loads(asked)
    default = 128 if is_cpu_only() else KV_BLOCK
    return int((asked or {}).get('block_size') or default)
