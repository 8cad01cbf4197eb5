"""What the trainer's arguments do before a model loads: fit the config to the servers, and say what will grow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from tests.integration.test_trainer import listening
from treepo_swift.compat.capabilities import SwiftFeatures
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.trainer import arguments
from treepo_swift.trainer.arguments import TreeGRPOConfig


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arguments that meet servers of these KV blocks; and the configs that the servers were asked to follow."""
    monkeypatch.setattr(arguments, 'check_options', lambda args, config: None)
    monkeypatch.setattr(TreeGRPOConfig, 'world_size', 2)

    def run(*block_sizes: int, max_model_len: int = 4096, **changes: Any) -> tuple[Any, list[TreeConfig]]:
        asked: list[TreeConfig] = []
        monkeypatch.setattr(arguments, 'probe_servers', lambda client, *, config: asked.append(config))
        args = object.__new__(TreeGRPOConfig)
        args.__dict__.update(
            dict(max_completion_length=256, num_generations=16, async_generate=False),
            tree_engines=[
                (f'http://{i}', {'block_size': size, 'max_model_len': max_model_len})
                for i, size in enumerate(block_sizes)
            ],
            **changes,
        )
        args._meet_servers(SimpleNamespace())
        return args, asked

    return run


def test_the_config_fits_the_servers_blocks_and_they_are_asked_to_follow_it(meet, caplog):
    with listening(caplog):
        args, asked = meet(32, 128)
    config = args.tree_config
    assert (config.segment_length, config.max_depth, config.root_divergence) == (128, 2, 8)
    assert asked == [config]
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith('treepo: each prompt grows one tree of W=16 answers. First branches at the prompt: 8.')
    assert 'fewer tokens than 16 independent answers' in second
    assert "to fit --max_completion_length 256, --num_generations 16 and the engine's KV block of 128 tokens" in third


def test_a_given_tree_is_not_touched(meet, monkeypatch, caplog):
    monkeypatch.setenv('TREEPO_SEGMENT_LENGTH', '64')
    monkeypatch.setenv('TREEPO_MAX_DEPTH', '3')
    with listening(caplog):
        args, _ = meet(128)
    assert (args.tree_config.segment_length, args.tree_config.max_depth) == (64, 3)
    assert 'S, D: as you set them' in caplog.text and 'Paths end at 192 tokens' in caplog.text


def test_a_server_whose_context_is_too_short_is_named(meet):
    with pytest.raises(ConfigError, match='is over --vllm_max_model_len of http://0 = 64'):
        meet(32, 32, max_model_len=64)


@pytest.mark.parametrize(('has', 'warned'), [(True, False), (False, True)])
def test_asynchronous_rollouts_that_would_hang_are_warned_of(meet, monkeypatch, caplog, has, warned):
    monkeypatch.setattr(arguments, 'swift_features', lambda: SwiftFeatures(async_errors=has))
    with listening(caplog):
        meet(32, async_generate=True)
    assert ('which then wait for good. ms-swift 4.6.0' in caplog.text) == warned
