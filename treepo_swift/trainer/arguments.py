"""`TreeGRPOConfig`: swift's GRPO arguments, and what trees need to know of them before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift.rlhf_trainers import GRPOConfig, VLLMInferClient
from swift.rollout import multi_turns
from swift.utils import is_master

from treepo_swift.advantage import check_estimator
from treepo_swift.config import ConfigError, TreeConfig

from .compatibility import check_options
from .handshake import find_trees


@dataclass
class TreeGRPOConfig(GRPOConfig):
    """swift's GRPO arguments; asks the servers whether they grow trees, and refuses what contradicts them.

    All of that before a model loads.
    """

    def __post_init__(self) -> None:
        if self.deepspeed and self.use_cpu:
            raise ConfigError(
                '--use_cpu true with --deepspeed: accelerate would leave DeepSpeed out without a word. '
                'Leave --use_cpu out (and ACCELERATE_USE_CPU), and set DS_ACCELERATOR=cpu.'
            )
        super().__post_init__()
        config = TreeConfig.load_for(self.max_completion_length)
        check_estimator(config.advantage.estimator)
        scheduler = multi_turns.get(getattr(self, 'multi_turn_scheduler', None))
        if self.vllm_mode == 'colocate' and getattr(scheduler, 'grows_trees', False):
            raise ConfigError('--vllm_mode colocate: trees grow in `swift rollout` only, which is --vllm_mode server.')
        self.tree_engines: list[tuple[str, dict[str, Any]]] = []
        """(url, engine info) of every server if they grow trees; known on the main process only."""
        if self.use_vllm and self.vllm_mode == 'server' and is_master():
            self.tree_engines = find_trees(
                VLLMInferClient(
                    base_urls=self.vllm_server_base_url,
                    hosts=self.vllm_server_host,
                    server_ports=self.vllm_server_port,
                    connection_timeout=self.vllm_server_timeout,
                ),
                config,
            )
        if self.tree_engines:
            config.check_fits(self.max_completion_length, '--max_completion_length')
            for url, engine in self.tree_engines:
                config.check_fits(engine['max_model_len'], f'--vllm_max_model_len of {url}')
            check_options(self, config)
