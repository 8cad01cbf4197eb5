"""What the external plugin file does: register scheduler and trainer with ms-swift. Idempotent and cheap."""
from __future__ import annotations

import argparse
import sys

from . import cpu, versions
from .config import TreeConfig

SCHEDULER_NAMES = ('treepo', 'tree_rollout_scheduler')
"""The second is the name of ms-swift's own example plugin, so that scripts written for it work."""
TRAINER_PATH = 'treepo_swift.trainer.TreeGRPOTrainer'
TRAINING_ARGS_PATH = 'treepo_swift.trainer.TreeGRPOConfig'


def register() -> None:
    """Make ``--multi_turn_scheduler treepo`` known and let ``--rlhf_type grpo`` use `TreeGRPOTrainer`.

    Raises:
        ConfigError: a setting is unknown, ill-typed or does not fit.
        UnsupportedVersion: ms-swift or vLLM is missing or was not tested with this release.
    """
    versions.check('ms-swift', 'vllm')
    _check_config(sys.argv[1:])
    cpu.apply()
    from swift.rollout import multi_turns
    from swift.trainers.trainer_factory import TrainerFactory

    from .scheduler import TreeRolloutScheduler
    for name in SCHEDULER_NAMES:
        multi_turns[name] = TreeRolloutScheduler
    # swift imports both by their paths when it needs them.
    TrainerFactory.TRAINER_MAPPING['grpo'] = TRAINER_PATH
    TrainerFactory.TRAINING_ARGS_MAPPING['grpo'] = TRAINING_ARGS_PATH


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
