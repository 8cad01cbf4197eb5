"""`TreeGRPOConfig`: swift's GRPO arguments, and what trees need to know of them before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift.rlhf_trainers import GRPOConfig, VLLMInferClient
from swift.rollout import multi_turns
from swift.utils import get_logger, is_master

from treepo_swift.advantage import check_estimator
from treepo_swift.config import ConfigError, TreeConfig

from .compatibility import check_options
from .rollout import find_trees

logger = get_logger()


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
            warn_of_short_paths(config, self.max_completion_length)


def warn_of_short_paths(config: TreeConfig, max_completion_length: int) -> None:
    """Say once what it means that paths can not become as long as ``--max_completion_length`` allows."""
    longest = config.max_response_tokens
    if longest < max_completion_length:
        logger.warning_once(
            f'treepo: max_depth x segment_length = {config.max_depth} x {config.segment_length} = {longest} tokens, '
            f'which is less than --max_completion_length {max_completion_length}. Paths end at {longest} tokens, with '
            'the finish reason `length`, and so do the answers of an evaluation. Raise max_depth or segment_length '
            'for longer ones, or lower --max_completion_length to say the same in both places.'
        )
