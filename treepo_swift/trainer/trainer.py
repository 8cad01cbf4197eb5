"""`TreeGRPOTrainer`: swift's GRPO trainer with advantages that know the tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from swift.infer_engine.protocol import RequestConfig
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers.rollout_mixin import DataCache
from swift.utils import get_logger

from treepo_swift.compat.capabilities import swift_features
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.wire.report import TreeReport

from .colocate import ColocateMixin
from .ranks import Ranks
from .reward_watch import watched_rewards
from .rewards import spread_over_tokens
from .shared_prefix.mixin import SharedPrefixMixin
from .trees import check_loss_tokens, check_rollout_logprobs

logger = get_logger()

MIXED_PRECISION = {'fp16': 'float16', 'bf16': 'bfloat16', 'fp8': 'bfloat16'}
"""accelerate's names for the types that a forward pass computes in, where they are not the parameters'."""


class TreeGRPOTrainer(SharedPrefixMixin, ColocateMixin, GRPOTrainer):
    """Trains GRPO on trees: asks the servers for them, or the engine in its process, and the registry for advantages.

    Samples that come without a tree (another scheduler, evaluation) are handled as swift does. With
    trees the tree config's `normalisation` replaces ``--scale_rewards``. An estimator that gives one advantage per
    trajectory leaves it to swift to spread it over tokens (`_postprocess_batch`); for one per segment we do.
    What is the same in Megatron is in `TreesMixin` and `ProofMixin`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tree_config: TreeConfig = kwargs['args'].tree_config
        super().__init__(*args, **kwargs)

    def _ranks(self) -> Ranks:
        return Ranks(self.accelerator.process_index, self.accelerator.num_processes)

    def _is_training(self) -> bool:
        return bool(self.model.training)

    def _evaluates(self) -> bool:
        # With --async_generate swift asks for the first evaluation rollout before it sets the model to eval.
        return not self.model.training or bool(self.control.should_evaluate)

    # Set-up.

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        here = self.args.tree_scheduler is not None
        self.grows_trees = here or bool(self._broadcast(lambda: self.args.tree_engines))
        if self.grows_trees and self.template.sequence_parallel_size > 1:
            raise ConfigError('--sequence_parallel_size > 1 is not supported with trees in this version.')
        self._set_up_trees(self.args)

    def _computing_types(self) -> list[str]:
        """The parameters' type, and autocast's where there is one."""
        autocast = MIXED_PRECISION.get(self.accelerator.mixed_precision)
        return [str(next(self.model.parameters()).dtype), *([autocast] if autocast else [])]

    # Requests.

    def _server_rollout(self, samples: list[Any], request_config: RequestConfig, is_global_inputs: bool) -> list[Any]:
        """swift's, but for ``--async_generate`` over several ranks.

        There it runs in a thread, and for a multi-turn server it counts outputs by a collective, which would mix
        with those of the main thread. A tree server gives one output per request, so there is nothing to count.
        """
        if not (is_global_inputs and self.grows_trees):
            return super()._server_rollout(samples, request_config, is_global_inputs)
        requests = self.samples2requests(samples)
        if not self.accelerator.is_main_process:
            return []
        return self._engine_infer(requests, request_config)

    def _prefetch(self, dataloader: Any) -> None:
        """swift's, for the first rollout of ``--async_generate``: what goes wrong there reaches every rank.

        Only the main process talks to the servers. It would raise alone, and the others would wait for it; swift hands
        a failure of the later rollouts to all ranks where they next wait for one, so this goes the same way.
        """
        try:
            super()._prefetch(dataloader)
        except Exception as e:
            if not swift_features().async_errors:
                raise  # `TreeGRPOConfig` has warned
            self._queue.put(DataCache(error=e))

    # Weight sync.

    @torch.no_grad()
    def _score(self, token_ids: list[int]) -> list[float]:
        """The trainer's own log-probs of ``token_ids[1:]``. ZeRO-3 gathers parameters as in any forward pass."""
        was_training = self.model.training
        self.model.eval()
        try:
            ids = torch.tensor([token_ids], device=self.accelerator.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            self.model.train(was_training)
        logprobs = logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()

    # Rewards and advantages.

    def _compute_rewards_per_func(self, samples: list[Any]) -> torch.Tensor:
        """Rewards of one rollout over all ranks [N, functions], checked; remembers the rollout for the metrics."""
        if not self.grows_trees:
            return super()._compute_rewards_per_func(samples)
        self._fill_gym_rewards(samples)
        limit = self.tree_config.faults.reward_timeout
        with watched_rewards(self, logger.warning, self._gather_lists, limit):
            rewards = super()._compute_rewards_per_func(samples)
        return self._settle_rewards(samples, rewards)

    def _compute_advantages(
        self, samples: list[Any], rewards_per_func: torch.Tensor, batch_encoded_inputs: list[dict[str, Any]]
    ) -> torch.Tensor:
        """Advantages of all samples over all ranks [N]; of segment-level ones, each trajectory's mean."""
        plain = super()._compute_advantages(samples, rewards_per_func, batch_encoded_inputs)  # logs reward metrics
        reports = self._gather_reports(samples)
        if reports is None:
            return plain
        self._log_trees()
        rewards = self._weigh(rewards_per_func)
        batches = [encoded['grpo_batch'] for encoded in batch_encoded_inputs]
        if self.kl_in_reward and self.beta != 0.0:
            kl = [((b.old_per_token_logps - b.ref_per_token_logps) * b.completion_mask).sum(-1) for b in batches]
            rewards = rewards - self.beta * gather(torch.cat(kl))
        self._check_alignment(reports, batches)
        kept = gather_object([n for b in batches for n in self._loss_mask(b).sum(-1).tolist()])
        advantages = self._estimate(samples, reports, rewards, kept, rewards_per_func)
        return torch.tensor(advantages, dtype=plain.dtype, device=plain.device)

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        self._refuse_teachers([encoded['grpo_batch'] for encoded in batch_encoded_inputs])
        advantages, self._segment_advantages = self._segment_advantages, None
        if advantages is not None:
            chunks = self.split_by_mini_batches(advantages)
            for chunk, encoded in zip(chunks, batch_encoded_inputs, strict=True):
                spread_over_tokens(chunk, encoded['grpo_batch'])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        failures = self._take_evaluation_failures()
        if failures.answers:
            self._metrics['eval']['tree/failures'].append(float(len(failures.errors)))
        return output

    def _loss_mask(self, batch: Any) -> torch.Tensor:
        if self.overlong_filter:
            return batch.completion_mask & ~batch.truncated_mask.unsqueeze(-1)
        return batch.completion_mask

    def _check_alignment(self, reports: Sequence[TreeReport], batches: Sequence[Any]) -> None:
        """What sampled and what is trained on fit; raises on all ranks or on none."""
        check_loss_tokens(reports, gather_object([n for b in batches for n in b.completion_mask.sum(-1).tolist()]))
        missing = gather_object([b.rollout_per_token_logps is None for b in batches])
        check_rollout_logprobs(self.rollout_importance_sampling_mode, missing)
