"""Every shell script that calls ms-swift: no flag is stale, trees fit their runs, batches are whole prompts."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from tests.integration.recipes import Command, commands, parse
from treepo_swift.config import TreeConfig
from treepo_swift.trainer.compatibility import check_options

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / 'examples'
RECIPES = EXAMPLES / 'recipes'
SCRIPTS = [path for path in sorted(EXAMPLES.rglob('*.sh')) if path.stem in ('rollout', 'train')]
NEEDED = {
    'MODEL': 'model',
    'DATASET': 'data.jsonl',
    'HOST': '10.0.0.1',
}
NODES = {'ROLLOUT_NODES': '10.0.0.1 10.0.0.2', 'NNODES': '2', 'NODE_RANK': '0'}
"""What scripts ask their users for; `NODES` where several take part."""
STUBS = """
import importlib.abc, importlib.machinery, sys
from unittest.mock import MagicMock

class Stub(MagicMock):
    __path__ = []
    __spec__ = importlib.machinery.ModuleSpec('stub', None)
    __version__ = '0.16.0'

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in ('megatron', 'mcore_bridge', 'transformer_engine'):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Stub(name=spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
"""
"""Megatron-SWIFT's argument classes import libraries that want a GPU."""


def label(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def called(script: Path, folder: Path) -> list[Command]:
    return commands(script, folder, **NEEDED, **(NODES if 'several' in script.parent.name else {}))


def read(command: Command) -> Any:
    from swift.arguments import RLHFArguments, RolloutArguments

    if command.program == 'swift':
        return parse({'rollout': RolloutArguments, 'rlhf': RLHFArguments}[command.verb], command.flags)
    return SimpleNamespace(**_read_megatron(tuple(command.flags)))


@functools.cache
def _read_megatron(flags: tuple[str, ...]) -> dict[str, Any]:
    code = (
        f'{STUBS}\nimport json, sys\nfrom tests.integration.recipes import parse\n'
        'from swift.megatron.arguments import MegatronRLHFArguments\n'
        'known = vars(parse(MegatronRLHFArguments, sys.argv[1:]))\n'
        'print(json.dumps({k: v for k, v in known.items() if isinstance(v, (str, int, float, list, type(None)))}))\n'
    )
    result = subprocess.run([sys.executable, '-c', code, *flags], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize('script', SCRIPTS, ids=label)
def test_swift_knows_every_flag(script, tmp_path):
    for command in called(script, tmp_path):
        args = read(command)
        assert args.external_plugins


def test_a_stale_flag_is_noticed(tmp_path):
    script = tmp_path / 'train.sh'
    script.write_text('swift rlhf --rlhf_type grpo --num_generations 8 --num_answers 8\n')
    (command,) = called(script, tmp_path)
    with pytest.raises(AssertionError, match=r"does not know \['--num_answers', '8'\]"):
        read(command)
    script.write_text('swift rlhf --rlhf_type grpo --vllm_mode nowhere\n')
    (command,) = called(script, tmp_path)
    with pytest.raises(SystemExit):
        read(command)


@pytest.mark.parametrize('folder', sorted(p for p in RECIPES.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_a_recipe_fits_itself(folder, tmp_path, monkeypatch):
    (train,) = called(folder / 'train.sh', tmp_path)
    servers = called(folder / 'rollout.sh', tmp_path) if (folder / 'rollout.sh').exists() else []
    monkeypatch.setenv('TREEPO_CONFIG', train.env['TREEPO_CONFIG'])
    config, args = TreeConfig.load(), read(train)
    config.check_fits(args.max_completion_length, '--max_completion_length')
    assert config.max_response_tokens == args.max_completion_length  # answers may be as long as the run allows
    # Batches are whole prompts, and a rank's share of GPUs is what the script says.
    ranks = int(train.env.get('NPROC_PER_NODE', 1)) * int(train.env.get('NNODES', 1))
    gpus = train.env.get('CUDA_VISIBLE_DEVICES')
    assert gpus is None or len(gpus.split(',')) == int(train.env.get('NPROC_PER_NODE', 1))
    if train.program == 'swift':
        batch = ranks * args.per_device_train_batch_size * args.gradient_accumulation_steps
    else:
        batch = args.global_batch_size
    assert batch % args.num_generations == 0 and args.beta == 0
    assert args.vllm_mode == ('server' if servers else 'colocate')
    context = args.vllm_max_model_len
    for command in servers:
        server = read(command)
        context = server.vllm_max_model_len
        assert server.model == args.model and command.env['TREEPO_CONFIG'] == train.env['TREEPO_CONFIG']
        assert server.multi_turn_scheduler == 'treepo' and server.vllm_use_async_engine
        engines = server.vllm_data_parallel_size * server.vllm_tensor_parallel_size
        assert engines == len(command.env['CUDA_VISIBLE_DEVICES'].split(','))
        if gpus and 'several' not in folder.name:
            assert not set(gpus.split(',')) & set(command.env['CUDA_VISIBLE_DEVICES'].split(','))
    config.check_fits(context, '--vllm_max_model_len')
    assert context >= args.max_completion_length + 512  # room for a prompt
    nodes = 2 if 'several' in folder.name else 1
    if servers:
        assert len(args.vllm_server_port) == len(servers) * nodes
    else:
        assert args.multi_turn_scheduler == 'treepo'
    # Nothing that trees refuse. `check_options` reads what the trainer's arguments have made of the flags.
    if train.program == 'swift':
        scheduler = None if servers else args.multi_turn_scheduler
        args.__dict__.update(tree_scheduler=scheduler, world_size=ranks, scale_rewards=args.scale_rewards or 'group')
        check_options(args, config)


def test_the_readme_lists_every_recipe_with_its_batch(tmp_path):
    text = (RECIPES / 'README.md').read_text()
    for folder in (p for p in RECIPES.iterdir() if p.is_dir()):
        (row,) = [line for line in text.splitlines() if line.startswith(f'| [{folder.name}]')]
        (train,) = called(folder / 'train.sh', tmp_path)
        args = read(train)
        ranks = int(train.env.get('NPROC_PER_NODE', 1)) * int(train.env.get('NNODES', 1))
        if train.program == 'swift':
            each = args.steps_per_generation or args.gradient_accumulation_steps
            answers = ranks * args.per_device_train_batch_size * each
        else:
            answers = args.global_batch_size * args.steps_per_generation
        assert f'| {answers // args.num_generations} x {args.num_generations}' in row, (folder.name, answers)
        assert f'| {args.max_completion_length:,} |' in row


def test_rules_of_ones_own_grow_and_value_a_tree(tmp_path):
    """In a process of its own, which registers them."""
    code = (
        'import runpy\n'
        "runpy.run_path('examples/own_rules/own_rules.py')\n"
        'from swift.rollout import multi_turns\n'
        'from tests.integration.test_scheduler import requests, rollout\n'
        'from treepo_swift.advantage.batch import tree_advantages\n'
        'from treepo_swift.config import TreeConfig\n'
        'from treepo_swift.wire.report import TreeReport\n'
        'assert "treepo" in multi_turns\n'
        'config = TreeConfig.load()\n'
        "outputs = rollout(requests(*['sum'] * 8, config=config), max_tokens=256)\n"
        "reports = [TreeReport.from_dict(o.rollout_infos['tree']) for o in outputs]\n"
        'rewards = [float(i) for i in range(8)]\n'
        'values = tree_advantages(reports, rewards, [r.loss_tokens for r in reports], config)\n'
        'assert [v.mean for v in values] == [-1.0] * 4 + [1.0] * 4, values\n'
        'assert len({tuple(r.nodes[:1]) for r in reports}) < 8\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, 'TREEPO_CONFIG': str(EXAMPLES / 'own_rules' / 'tree.yaml')},
    )
    assert result.returncode == 0, result.stderr[-3000:]
