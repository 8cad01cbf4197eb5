"""What the external plugin file does: register scheduler and trainer with ms-swift. Idempotent and cheap."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from treepo_swift.compat import capabilities, cpu, versions
from treepo_swift.config import TreeConfig

FILE = Path(__file__).parent / 'plugin_file' / 'treepo_plugin.py'
"""For --external_plugins. In a folder of its own: swift puts a plugin's folder into Python's path."""
SCHEDULERS = {
    'treepo': 'treepo_swift.server.scheduler.TreeRolloutScheduler',
    'treepo_gym': 'treepo_swift.server.gym.TreeGymScheduler',
    'tree_rollout_scheduler': 'treepo_swift.server.recheck.RecheckScheduler',
}
"""The last has the name of ms-swift's own example plugin, and does what that does."""
WARNED = '_TREEPO_VERSIONS_WARNING'
"""Environment variable with the warning that was given. It is none of the `TREEPO_` ones, which are settings."""
TRAINER_PATH = 'treepo_swift.trainer.trainer.TreeGRPOTrainer'
TRAINING_ARGS_PATH = 'treepo_swift.trainer.arguments.TreeGRPOConfig'
MEGATRON_TRAINER_PATH = 'treepo_swift.trainer.megatron.TreeMegatronGRPOTrainer'


def register() -> None:
    """Make the `SCHEDULERS` known and let ``--rlhf_type grpo`` use `TreeGRPOTrainer`, or Megatron's.

    Raises:
        ConfigError: a setting is unknown, ill-typed or does not fit; or trees are asked for in Ray's pipeline.
        UnsupportedVersion: ms-swift or vLLM is missing, or lacks what trees can't do without.
    """
    versions.check('ms-swift', 'vllm')
    _check_config(sys.argv[1:])
    cpu.apply()
    capabilities.require(capabilities.SERVER_NEEDS)
    _warn_of_versions()
    from swift.rollout import multi_turns
    from swift.trainers.trainer_factory import TrainerFactory

    for name, path in SCHEDULERS.items():
        module, _, scheduler = path.rpartition('.')
        multi_turns[name] = getattr(importlib.import_module(module), scheduler)
    # swift imports both by their paths when it needs them.
    TrainerFactory.TRAINER_MAPPING['grpo'] = TRAINER_PATH
    TrainerFactory.TRAINING_ARGS_MAPPING['grpo'] = TRAINING_ARGS_PATH
    importlib.import_module('treepo_swift.server.ordered_pipe').order_answers()
    importlib.import_module('treepo_swift.server.api_key').guard_server()
    _register_megatron()


def _register_megatron() -> None:
    """Only where swift has loaded it: no other command imports Megatron, or Ray, because of the plugin."""
    if 'swift.ray.megatron' in sys.modules:  # its driver, or one of its workers
        importlib.import_module('treepo_swift.trainer.ray').refuse_trees(sys.argv[1:])
    elif 'swift.megatron' in sys.modules:
        capabilities.require(capabilities.MEGATRON_NEEDS)
        # `megatron rlhf` takes the trainer from there by its name when the arguments, which load plugins, are ready.
        trainers: Any = importlib.import_module('swift.megatron.trainers')
        module, _, trainer = MEGATRON_TRAINER_PATH.rpartition('.')
        trainers.MegatronGRPOTrainer = getattr(importlib.import_module(module), trainer)


def _warn_of_versions() -> None:
    """Once for a command: the processes that this one starts register too, and inherit its environment."""
    said = [versions.untested(), capabilities.slow_streaming()]
    message = ' '.join(sentence for sentence in said if sentence)
    if not message or os.environ.get(WARNED) == message:
        return
    os.environ[WARNED] = message
    from swift.utils import get_logger

    get_logger().warning(f'treepo: {message}')


def _check_config(argv: list[str]) -> None:
    """Refuse a bad config here, where no model has been loaded yet.

    swift does not show plugins its arguments, so the model length is read from the command line. A server without
    a config of its own takes the trainer's, which is checked when the two first talk.
    """
    config = TreeConfig.load()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--vllm_max_model_len', type=int)
    limit = parser.parse_known_args(argv)[0].vllm_max_model_len
    if limit is not None and config != TreeConfig():
        config.check_fits(limit, '--vllm_max_model_len')
