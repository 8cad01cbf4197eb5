"""ms-swift's Ray pipeline grows no trees: asked for them, it is refused, with swift's own pipeline source (no Ray)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from tests.integration.megatron_ranks import Ranks

TREES_ELSEWHERE = 'without --use_ray: with `swift rollout` or in colocate mode trees grow there'


@pytest.fixture(scope='module')
def ranks(loaded: Any) -> Ranks:
    return Ranks(loaded)


def drive(world: int, folder: str, config: str, own: bool = False) -> Any:
    """The driver's process up to where plugins load, and the trainer's first steps."""
    import swift.ray.megatron.pipeline as pipeline
    from swift.rollout import multi_turns

    from treepo_swift.plugin import register
    from treepo_swift.server.scheduler import TreeRolloutScheduler

    path = Path(folder) / 'ray.yaml'
    path.write_text(f'rlhf_type: grpo\nmodel: none\n{config}')
    driver = pipeline.MegatronRayPipeline(str(path))
    sys.argv = ['rlhf.py', '--config', str(path)]
    said: list[str] = []
    import treepo_swift.trainer.ray as ours

    ours.logger.warning = said.append
    register()
    if own:
        multi_turns['own'] = type('Own', (TreeRolloutScheduler,), {})
    driver._get_weight_sync_mode, driver._resolve_sleep_level = (lambda: 'nccl'), (lambda: 0)
    trainer = driver._create_trainer()
    scheduler = driver.shared_cfg.get('multi_turn_scheduler')
    trainer.args = SimpleNamespace(multi_turn_scheduler=scheduler, max_turns=2, gym_env=None)
    trainer.template = SimpleNamespace(tokenizer=None)
    trainer._prepare_multi_turn()
    return type(trainer).__name__, said, trainer._multi_turn_scheduler


@pytest.mark.parametrize(
    'config', ['multi_turn_scheduler: treepo\n', 'train: {gpus: 1, multi_turn_scheduler: treepo_gym}\n']
)
def test_a_tree_scheduler_is_refused_before_anything_starts(ranks, config):
    (error,) = ranks.run(drive, config)
    assert type(error).__name__ == 'ConfigError' and TREES_ELSEWHERE in str(error), getattr(error, 'told', error)
    assert 'register' in error.told and '_create_trainer' not in error.told


def test_a_tree_scheduler_of_a_users_plugin_is_refused_by_the_trainer(ranks):
    (error,) = ranks.run(drive, 'multi_turn_scheduler: own\n', True)
    assert type(error).__name__ == 'ConfigError' and 'multi_turn_scheduler: own' in str(error)
    assert '_prepare_multi_turn' in error.told


def test_without_one_the_pipeline_is_swifts_own_and_says_so(ranks):
    ((name, said, scheduler),) = ranks.all(drive, 'train: {gpus: 1}\n')
    assert name == 'TreelessGRPOTrainer' and scheduler is None
    assert len(said) == 1 and 'this run is plain GRPO' in said[0]


def work(world: int, folder: str) -> Any:
    import importlib

    import swift.ray.megatron

    assert swift.ray.megatron
    from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer

    from treepo_swift.plugin import register

    sys.argv = ['default_worker.py', '--config-list=none']
    register()
    return importlib.import_module('swift.megatron.trainers').MegatronGRPOTrainer is MegatronGRPOTrainer


def test_a_worker_keeps_swifts_trainer(ranks):
    assert ranks.all(work) == [True]
