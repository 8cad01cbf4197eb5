"""Ray (``megatron rlhf --use_ray``): trees are refused there, before a model loads where their scheduler is known.

docs/scale.md says what is missing in ms-swift, and the plan.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from swift.rollout import multi_turns
from swift.utils import get_logger

from treepo_swift.config import ConfigError

logger = get_logger()

TRAINER_PATH = 'treepo_swift.trainer.ray_trainer.TreelessGRPOTrainer'
NO_TREES = (
    "treepo: nothing grows trees in ms-swift's Ray pipeline, so this run is plain GRPO. For trees run `megatron rlhf` "
    'without --use_ray, with `swift rollout` beside it or in colocate mode.'
)


def grows_trees(name: Any) -> bool:
    """Whether a scheduler of this name, as far as it is registered, grows trees."""
    return isinstance(name, str) and bool(getattr(multi_turns.get(name), 'grows_trees', False))


def refuse(name: Any) -> None:
    """Raise `ConfigError` where `multi_turn_scheduler` is `name` and that grows trees."""
    if grows_trees(name):
        raise ConfigError(
            f'multi_turn_scheduler: {name} with --use_ray: trees can not grow there. ms-swift runs schedulers in the '
            'driver of its Ray pipeline, not beside the engines (RolloutReplica takes none), so every answer would '
            'be a plain one with a flat advantage. Run `megatron rlhf` without --use_ray: with `swift rollout` or in '
            'colocate mode trees grow there. docs/scale.md says what is missing.'
        )


def refuse_trees(argv: Sequence[str]) -> None:
    """In the driver of Ray's pipeline, when plugins load; its workers, which have no ``--config``, have no say.

    A tree scheduler of a user's plugin is registered after ours: the trainer refuses that one, when models have loaded.

    Raises:
        ConfigError: the pipeline's config names a scheduler that grows trees.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    config = parser.parse_known_args(argv)[0].config
    pipeline = sys.modules.get('swift.ray.megatron.pipeline')
    if config is None or pipeline is None:
        return
    _, groups, shared = pipeline.parse_ray_yaml(config)
    for settings in (shared, *groups.values()):
        refuse(settings.get('multi_turn_scheduler'))
    logger.warning(NO_TREES)
    # It has been looked up already: only what the entry says can still be changed.
    pipeline._TRAINER_REGISTRY['grpo']['trainer'] = TRAINER_PATH
