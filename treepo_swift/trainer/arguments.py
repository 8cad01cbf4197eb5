"""`TreeArguments`: what trees need to know of a run before a model loads, and swift's own arguments with that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swift.rlhf_trainers import GRPOConfig, VLLMInferClient
from swift.rollout import multi_turns
from swift.utils import get_logger, is_master

from treepo_swift.advantage import check_estimator
from treepo_swift.compat.capabilities import TRAINER_NEEDS, require, swift_features
from treepo_swift.config import KV_BLOCK, ConfigError, TreeConfig

from .compatibility import check_options, megatron_reasons
from .growth import describe_growth
from .rollout import check_scheduler
from .servers import find_trees, probe_servers

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOConfig as _Arguments
else:
    _Arguments = object

logger = get_logger()


class TreeArguments(_Arguments):
    """Asks the servers whether they grow trees, fits the tree config to the run, and refuses what contradicts it.

    It reads swift's arguments from itself, under the names that `GRPOConfig` has for them.
    """

    tree_config: TreeConfig
    """Fitted to this run. The main process alone knows the servers' KV blocks; the trainer gives it to all ranks."""
    tree_scheduler: str | None
    """Name of the scheduler that grows trees on the engine in this process (colocate mode)."""
    tree_engines: list[tuple[str, dict[str, Any]]]
    """(url, engine info) of every server if they grow trees; known on the main process only."""

    def _prepare_trees(self) -> None:
        """All that needs no server."""
        self._fit_config(self._block_size_here())
        check_estimator(self.tree_config.advantage.estimator)
        self.tree_engines = []
        self.tree_scheduler = self._take_tree_scheduler()
        if self.tree_scheduler is not None:
            self._check_colocate()

    def _fit_config(self, block_size: int) -> None:
        self.tree_config = TreeConfig.load_for(
            self.max_completion_length, width=self.num_generations, block_size=block_size
        )

    def _meet_servers(self, client: VLLMInferClient) -> None:
        """Fit the config to the servers' engines, refuse what can not be, and say what will grow."""
        self._agree_with_servers(client)
        self._say_what_grows(self._block_size_there())

    def _agree_with_servers(self, client: VLLMInferClient) -> None:
        self._fit_config(self._block_size_there())
        config = self.tree_config
        config.check_fits(self.max_completion_length, '--max_completion_length')
        for url, engine in self.tree_engines:
            config.check_fits(engine['max_model_len'], f'--vllm_max_model_len of {url}')
        probe_servers(client, config=config)
        self._check_options()
        if self.async_generate and self.world_size > 1 and not swift_features().async_errors:
            logger.warning(
                'treepo: --async_generate on several ranks: this ms-swift does not hand a rollout that fails to the '
                'other ranks, which then wait for good. ms-swift 4.6.0 and newer do.'
            )

    def _check_options(self) -> None:
        check_options(self, self.tree_config)

    def _say_what_grows(self, block_size: int) -> None:
        if is_master():
            for line in describe_growth(
                self.tree_config,
                width=self.num_generations,
                max_response=self.max_completion_length,
                block_size=block_size,
            ):
                logger.info(f'treepo: {line}')
        warn_of_short_paths(self.tree_config, self.max_completion_length)

    def _take_tree_scheduler(self) -> str | None:
        """``--multi_turn_scheduler`` where it grows trees in colocate mode. swift must not see it: it would build the
        scheduler without an engine, and take turns by itself."""
        name: str | None = getattr(self, 'multi_turn_scheduler', None)
        if not getattr(multi_turns.get(name), 'grows_trees', False) or self.vllm_mode == 'server':
            return None
        if not self.use_vllm:
            raise ConfigError(
                f'--multi_turn_scheduler {name} without vLLM: trees grow on vLLM only. Set --use_vllm true and '
                '--vllm_mode colocate (in this process) or server (`swift rollout`).'
            )
        self.multi_turn_scheduler = None
        return name

    def _block_size_here(self) -> int:
        """Tokens of a KV block, as far as it is known before the engine is: what --vllm_engine_kwargs asks for."""
        asked = getattr(self, 'vllm_engine_kwargs', None)
        return int(asked.get('block_size') or KV_BLOCK) if isinstance(asked, dict) else KV_BLOCK

    def _block_size_there(self) -> int:
        """The largest of the servers' engines."""
        return max(int(engine['block_size']) for _, engine in self.tree_engines)

    def _check_colocate(self) -> None:
        """Raise what trees in this process can not do, and let requests carry what hooks may read."""
        config = self.tree_config
        config.check_fits(self.max_completion_length, '--max_completion_length')
        if self.vllm_max_model_len is not None:
            config.check_fits(self.vllm_max_model_len, '--vllm_max_model_len')
        check_scheduler(self.tree_scheduler, config, use_gym_env=self.use_gym_env)
        self._check_options()
        self._say_what_grows(self._block_size_here())
        if multi_turns[self.tree_scheduler].has_turns():
            self.vllm_server_pass_dataset = True


@dataclass
class TreeGRPOConfig(TreeArguments, GRPOConfig):
    """swift's GRPO arguments, with all of that before a model loads."""

    def __post_init__(self) -> None:
        if self.deepspeed and self.use_cpu:
            raise ConfigError(
                '--use_cpu true with --deepspeed: accelerate would leave DeepSpeed out without a word. '
                'Leave --use_cpu out (and ACCELERATE_USE_CPU), and set DS_ACCELERATOR=cpu.'
            )
        require(TRAINER_NEEDS)
        if self.dataloader_num_workers == 0:
            # As ms-swift 4.6.0 does by itself. 4.5.3 keeps its default, True, and torch's loader then raises.
            self.dataloader_persistent_workers = False
        super().__post_init__()
        self._prepare_trees()
        if self.use_vllm and self.vllm_mode == 'server' and is_master():
            client = VLLMInferClient(
                base_urls=self.vllm_server_base_url,
                hosts=self.vllm_server_host,
                server_ports=self.vllm_server_port,
                connection_timeout=self.vllm_server_timeout,
            )
            self.tree_engines = find_trees(client)
            if self.tree_engines:
                self._meet_servers(client)


class MegatronTreeArguments(TreeArguments):
    """A copy of swift's Megatron arguments, under the names of its other trainer's, which `TreeArguments` reads."""

    def __init__(self, args: Any, ranks: int) -> None:
        self.__dict__.update(vars(args))
        self.world_size = ranks
        self.per_device_train_batch_size = args.micro_batch_size
        self.structured_outputs_regex = getattr(args, 'structured_outputs_regex', None)
        # Megatron-SWIFT has none of these.
        self.use_liger_kernel = self.eval_on_start = False
        self.advantage_reweight = None

    def _check_options(self) -> None:
        check_options(self, self.tree_config, megatron_reasons(self, self.world_size))

    def meet(self, client: Any) -> tuple[list[tuple[str, dict[str, Any]]], TreeConfig]:
        """On the main process: the servers' engines if they grow trees, and the config fitted to them."""
        self.tree_engines = find_trees(client)
        if self.tree_engines:
            self._agree_with_servers(client)
        return self.tree_engines, self.tree_config


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
