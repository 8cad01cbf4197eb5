"""`TreeMegatronGRPOTrainer`: trees for Megatron-SWIFT (``megatron rlhf --rlhf_type grpo``).

A thin layer: `TreesMixin`, `ProofMixin` and `TreeArguments` do what is the same in swift's other trainer. Here is where
Megatron's differs: arguments have other names, the last rank is the main one, a batch is gathered over the ranks that
hold one copy of the model (tensor, context and pipeline parallel), and advantages are spread over tokens there.
"""

from __future__ import annotations

from typing import Any

import torch
from swift.infer_engine.protocol import RequestConfig
from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer
from swift.megatron.trainers.utils import gather_object
from swift.megatron.utils import get_padding_to
from swift.utils import get_logger

from treepo_swift.advantage.batch import SegmentAdvantages
from treepo_swift.wire.report import TreeReport

from .arguments import MegatronTreeArguments
from .proof import ProofMixin
from .ranks import Ranks
from .reward_watch import watched_rewards
from .rewards import spread_over_tokens
from .rollout import together
from .trees import check_loss_tokens, check_rollout_logprobs

logger = get_logger()


class TreeMegatronGRPOTrainer(ProofMixin, MegatronGRPOTrainer):
    """Trains GRPO on trees with Megatron; the same trees give each token the advantage that `TreeGRPOTrainer` gives.

    Samples that come without a tree are handled as swift does. What trajectories share is computed for each of them.
    """

    def __init__(self, args: Any, template: Any, **kwargs: Any) -> None:
        # Here no model has been loaded yet.
        self._tree_arguments = self._ask(args, kwargs.get('vllm_client'))
        self.tree_config = self._tree_arguments.tree_config
        self._sampled: list[tuple[TreeReport, SegmentAdvantages | None]] = []
        """What `_compute_advantages` leaves for the batches: of each local sample its report, and its segments'
        advantages where the estimator gives them."""
        super().__init__(args, template, **kwargs)

    def _ask(self, args: Any, client: Any) -> MegatronTreeArguments:
        """Refuse what can not be, and take from swift what it must not see."""
        asked = MegatronTreeArguments(args, self._ranks().count)
        asked._prepare_trees()
        args.multi_turn_scheduler = asked.multi_turn_scheduler
        args.vllm_server_pass_dataset = asked.vllm_server_pass_dataset
        if args.vllm_mode == 'server':
            asked.tree_engines, asked.tree_config = self._broadcast(lambda: asked.meet(client))
            if asked.tree_engines:
                asked._say_what_grows(asked._block_size_there())
        self.grows_trees = asked.tree_scheduler is not None or bool(asked.tree_engines)
        if self.grows_trees and asked.tree_config.is_given('shared_prefix'):
            logger.warning('treepo: shared_prefix does nothing with Megatron: every trajectory is computed by itself.')
        return asked

    def _ranks(self) -> Ranks:
        count = torch.distributed.get_world_size()
        return Ranks(torch.distributed.get_rank(), count, main=count - 1)

    def _is_training(self) -> bool:
        return bool(self.unwrapped_models[0].training)

    def _needs_trajectory_advantages(self) -> bool:
        # swift asks for the teacher before it has read the loss's settings.
        return self.args.loss_type in ('real', 'fipo') or self.args.off_policy_sequence_mask_delta is not None

    def _init_rollout_engine(self) -> None:
        super()._init_rollout_engine()
        self._set_up_trees(self._tree_arguments)

    # Weight sync.

    def _tokenizer(self) -> Any:
        return self.template.tokenizer

    def _computing_types(self) -> list[str]:
        low = [name for name in ('fp8_format', 'fp4_format') if getattr(self.args, name, None)]
        return [str(next(self.unwrapped_models[0].parameters()).dtype), *low]

    def _score(self, token_ids: list[int]) -> list[float]:
        """swift's own pass for old log-probs, through all stages; the last one, where the main rank is, has them."""
        # The collator writes into what it gets. Labels say of which tokens log-probs are wanted.
        probe = {'input_ids': [*token_ids], 'labels': [-100, *token_ids[1:]], 'length': len(token_ids)}
        inputs = self.template.data_collator([probe], padding_to=get_padding_to(self.args))
        places = (torch.roll(inputs['labels'][0], -1) != -100).nonzero().squeeze(-1)
        logprobs, _ = self.compute_per_token_logps(self.unwrapped_models[0], iter([inputs]))
        ours = None if logprobs is None else logprobs[0, places.to(logprobs.device)].float().tolist()
        return self._broadcast(lambda: ours)

    # The engine in this process.

    def _colocate_rollout(self, samples: list[Any], request_config: RequestConfig) -> list[Any]:
        if self.trees_here is None:
            return super()._colocate_rollout(samples, request_config)
        self._compare_weights()
        return self._rollout_here(self.samples2requests(samples), request_config)

    # Rewards and advantages.

    def _score_completions(self, samples: list[Any]) -> torch.Tensor:
        """Rewards of this rank's samples [n, functions]; checked over all ranks."""
        if not self.grows_trees:
            return super()._score_completions(samples)
        self._fill_gym_rewards(samples)
        limit = self.tree_config.faults.reward_timeout
        with watched_rewards(self, logger.warning, self._gather_lists, limit):
            rewards = super()._score_completions(samples)
        return self._of_this_rank(samples, self._settle_rewards(samples, self._all(rewards)))

    def _compute_advantages(
        self, samples: list[Any], rewards_per_func: torch.Tensor, kl_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Advantages of this rank's samples [n]; of segment-level ones, each trajectory's mean.

        `kl_values` are of all ranks [N].
        """
        plain = super()._compute_advantages(samples, rewards_per_func, kl_values=kl_values)  # logs reward metrics
        reports = self._gather_reports(samples)
        if reports is None:
            return plain
        self._log_trees()
        rewards_per_func = self._all(rewards_per_func)
        rewards = self._weigh(rewards_per_func)
        if kl_values is not None:
            rewards = rewards - self.beta * kl_values
        kept = self._gather_lists([int(not (self.overlong_filter and s.is_truncated)) for s in samples])
        advantages = self._estimate(samples, reports, rewards, kept, rewards_per_func)
        segments, self._segment_advantages = self._segment_advantages, None
        mine = self._of_this_rank(samples, reports)
        self._sampled = list(zip(mine, segments or [None] * len(mine), strict=True))
        self._logs['advantages'].extend(advantages)  # it holds one batch: swift's own are pushed out
        return torch.tensor(self._of_this_rank(samples, advantages), dtype=plain.dtype, device=plain.device)

    def _generate_and_score_completions(self, inputs: list[Any]) -> list[dict[str, Any]]:
        encoded = super()._generate_and_score_completions(inputs)
        sampled, self._sampled = self._sampled, []
        if sampled:  # on all ranks or on none
            # As swift has gathered the samples.
            rows = gather_object(sampled, group=self._get_rollout_group())
            batches = [data['grpo_batch'] for data in encoded]
            together(lambda: self._finish(batches, rows), self._gather_lists)
        return encoded

    def _finish(self, batches: list[Any], rows: list[tuple[TreeReport, SegmentAdvantages | None]]) -> None:
        """Check that what was sampled is what is trained on, and spread segments' advantages.

        With padding a batch may have more rows than samples; the mask is empty there.
        """
        self._refuse_teachers(batches)
        check_rollout_logprobs(
            self.rollout_importance_sampling_mode, [b.rollout_per_token_logps is None for b in batches]
        )
        size = self.micro_batch_size
        for index, batch in enumerate(batches):
            chunk = rows[index * size : (index + 1) * size]
            lengths = batch.completion_mask.sum(-1).tolist()
            check_loss_tokens([report for report, _ in chunk], lengths[: len(chunk)])
            segments = [advantages for _, advantages in chunk if advantages is not None]
            spread_over_tokens(segments, batch)

    def compute_eval_metrics(self, metrics: dict[str, Any]) -> None:
        super().compute_eval_metrics(metrics)
        failures = self._take_evaluation_failures()
        if failures.answers:
            metrics['tree/failures'] = torch.tensor(float(len(failures.errors)))

    # Values of all ranks and of this one.

    def _all(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks; there may be no column, where a teacher is the only signal."""
        rows = self._gather_lists(rewards.tolist())
        return torch.tensor(rows, dtype=rewards.dtype, device=rewards.device)

    def _of_this_rank(self, samples: list[Any], values: Any) -> Any:
        begin = self._ranks().index * len(samples)
        return values[begin : begin + len(samples)]
