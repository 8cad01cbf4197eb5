"""The methods of ms-swift that we override, replace or call although they are private, and what they were when read.

    python -m tests.integration.swift_methods      # writes those of the installed ms-swift into swift_methods.json

A release of ms-swift may change any of them without a word. For each version that is supported the table has their
signatures and a hash of their source; `reviewed` says of each change between two versions why ours still holds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.integration.megatron_stub import installed

TABLE = Path(__file__).with_suffix('.json')
OURS = (
    'treepo_swift.trainer.trainer:TreeGRPOTrainer',
    'treepo_swift.trainer.arguments:TreeGRPOConfig',
    'treepo_swift.server.scheduler:TreeRolloutScheduler',
    'treepo_swift.server.gym:TreeGymScheduler',
    'treepo_swift.server.recheck:RecheckScheduler',
)
"""Classes over swift's: what they override is found by looking."""
MEGATRON = 'treepo_swift.trainer.megatron:TreeMegatronGRPOTrainer'
OURS_STUBBED = (MEGATRON, 'treepo_swift.trainer.ray_trainer:TreelessGRPOTrainer')
"""Likewise, over parts of swift that load only where `megatron_stub` is installed."""
ENGINE = 'swift.infer_engine.vllm_engine:VllmEngine'
USED = (
    # Replaced on an instance or a class.
    'swift.rlhf_trainers.vllm_client:VLLMInferClient.infer',
    'swift.template.base:Template._add_dynamic_eos',
    'swift.arguments.deploy_args:RolloutArguments._check_device_count',
    'swift.rewards.orm:MathAccuracy.__call__',
    'swift.pipelines.infer.rollout:SwiftRolloutDeploy._start_data_parallel_workers',
    'swift.pipelines.infer.rollout:SwiftRolloutDeploy._register_rl_rollout_app',
    # Whose answers `OrderedPipe` orders: it looks up `recv` before anybody else can send.
    'swift.pipelines.infer.rollout:SwiftRolloutDeploy.process_weights_after_loading',
    'swift.pipelines.infer.rollout:SwiftRolloutDeploy.infer',
    # Called, though private.
    'swift.infer_engine.grpo_vllm_engine:GRPOVllmEngine._get_grpo_lora_request_async',
    f'{ENGINE}._prepare_generation_config',
    f'{ENGINE}._add_request',
    f'{ENGINE}._add_adapter',
    'swift.infer_engine.infer_engine:InferEngine._get_stop_token_ids',
    f'{ENGINE}._add_stop_words',
    'swift.rollout.multi_turn:RolloutScheduler.get_response_token_data',
)
_MEGATRON = 'swift.megatron.trainers'
USED_STUBBED = (
    # Called, though private.
    f'{_MEGATRON}.rollout_mixin:MegatronRolloutMixin._get_rollout_group',
    f'{_MEGATRON}.rlhf_mixin:MegatronRLHFTrainer.compute_per_token_logps',
    # Where our trainers are looked up, and where the order of a batch is made.
    'swift.megatron.pipelines.train.rlhf:MegatronRLHF.prepare_trainer',
    'swift.ray.megatron.pipeline:MegatronRayPipeline._create_trainer',
    f'{_MEGATRON}.grpo_trainer:MegatronGRPOTrainer.get_local_rollout_batch',
    f'{_MEGATRON}.grpo_trainer:MegatronGRPOTrainer._server_rollout',
    f'{_MEGATRON}.rollout_mixin:MegatronRolloutMixin._generate_completions',
)
Methods = dict[str, dict[str, str]]


def overridden(ours: str) -> Iterator[str]:
    """``module:Class.method`` of swift for each method, dunders apart, that a class of ours defines anew."""
    module, _, name = ours.partition(':')
    lineage = getattr(importlib.import_module(module), name).__mro__
    for position, cls in enumerate(lineage):
        if not cls.__module__.startswith('treepo_swift.'):
            continue
        for method, value in vars(cls).items():
            if method.startswith('__') or not (callable(value) or isinstance(value, (property, staticmethod))):
                continue
            owner = next((base for base in lineage[position + 1 :] if method in vars(base)), None)
            if owner is not None and owner.__module__.startswith('swift.'):
                yield f'{owner.__module__}:{owner.__name__}.{method}'


def read_installed() -> Methods:
    """Signature and hash of each of these methods, as they are in the installed ms-swift."""
    with installed():
        paths = sorted({*USED, *USED_STUBBED, *(path for ours in OURS + OURS_STUBBED for path in overridden(ours))})
        return {path: read_method(path) for path in paths}


def read_method(path: str) -> dict[str, str]:
    module, _, names = path.partition(':')
    owner, _, method = names.partition('.')
    cls: Any = getattr(importlib.import_module(module), owner)
    # By the class's source: a decorated or a patched method would show another function's.
    return describe(textwrap.dedent(inspect.getsource(cls)), method)


def describe(source: str, method: str) -> dict[str, str]:
    """Of `method` in the source of a class."""
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    (node,) = (n for n in body.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == method)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = [line.strip() for line in source.splitlines()[first - 1 : node.end_lineno]]
    text = '\n'.join(line for line in lines if line and not line.startswith('#'))
    return {'signature': f'({ast.unparse(node.args)})', 'source': hashlib.sha256(text.encode()).hexdigest()[:16]}


def differences(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What is not the same, by path."""
    found = {}
    for path in sorted({*old, *new}):
        if path not in new:
            found[path] = 'is not overridden or used any more'
        elif path not in old:
            found[path] = 'was never recorded'
        elif old[path]['signature'] != new[path]['signature']:
            found[path] = f'signature was {old[path]["signature"]}, is {new[path]["signature"]}'
        elif old[path]['source'] != new[path]['source']:
            found[path] = 'same signature, another body'
    return found


def load_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


if __name__ == '__main__':
    from treepo_swift.compat.versions import installed_version

    table = load_table() if TABLE.is_file() else {'methods': {}, 'reviewed': {}}
    table['methods'][installed_version('ms-swift')] = read_installed()
    table['methods'] = dict(sorted(table['methods'].items()))
    TABLE.write_text(json.dumps(table, indent=1) + '\n')
