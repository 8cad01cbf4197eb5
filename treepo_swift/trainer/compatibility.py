"""Which of swift's GRPO options go together with trees; the others are refused, with the reason, before a model loads.

docs/compatibility.md is the table for users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from treepo_swift.advantage import is_segment_level
from treepo_swift.config import ConfigError, TreeConfig

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOConfig

SCALE_REWARDS = {'batch': 'whiten', 'none': 'none'}
"""swift's scaling -> the `normalisation` that does the like for trees. Its default, `group`, can not be told from a
`group` that somebody asked for, so it contradicts nothing."""


def check_options(args: GRPOConfig, config: TreeConfig, more: Iterable[str] = ()) -> None:
    """Raise `ConfigError` with every reason why these options can not train on trees; `more` are a trainer's own."""
    reasons = [
        *_advantage_reasons(args, config),
        *_segment_reasons(args, config),
        *_rollout_reasons(args),
        *_colocate_reasons(args, config),
        *more,
    ]
    if reasons:
        raise ConfigError('These options can not be used with trees:\n' + '\n'.join(f'  {r}' for r in reasons))


def _advantage_reasons(args: GRPOConfig, config: TreeConfig) -> Iterator[str]:
    if args.advantage_estimator != 'grpo':
        yield (
            f'--advantage_estimator {args.advantage_estimator}: with trees the estimator is set in the tree config '
            f'(now {config.advantage.estimator!r}). Set TREEPO_ADVANTAGE__ESTIMATOR={args.advantage_estimator} instead.'
        )
    if args.scale_rewards == 'gdpo':
        yield (
            '--scale_rewards gdpo: it normalises every reward function by itself within a prompt, but subgroups of '
            f'a tree compare total rewards. Leave it out; normalisation={config.advantage.normalisation!r} applies.'
        )
    # Another estimator and loss_type real set scale_rewards by themselves.
    implied = args.advantage_estimator != 'grpo' or args.loss_type == 'real'
    wanted = SCALE_REWARDS.get(args.scale_rewards)
    if wanted not in (None, config.advantage.normalisation) and not implied:
        yield (
            f'--scale_rewards {args.scale_rewards} with normalisation={config.advantage.normalisation!r} in the tree '
            f'config: tree advantages are scaled by the latter. Set TREEPO_ADVANTAGE__NORMALISATION={wanted}, or leave '
            '--scale_rewards out.'
        )
    if args.loss_type == 'real' and config.advantage.normalisation == 'whiten':
        yield (
            '--loss_type real: it only takes the sign of an advantage, which whitening with a mean shift changes. '
            'Set TREEPO_ADVANTAGE__NORMALISATION=none (or group).'
        )
    if args.loss_type == 'real' and args.per_device_train_batch_size % args.num_generations:
        yield (
            f'--loss_type real with --per_device_train_batch_size {args.per_device_train_batch_size}: its loss '
            'compares the answers to a prompt with each other, so every micro-batch must hold whole prompts, '
            f'a multiple of --num_generations {args.num_generations}.'
        )
    if args.kl_in_reward and args.beta != 0.0 and getattr(config.advantage, 'reject_flat_subgroups', False):
        yield (
            '--kl_in_reward true with reject_flat_subgroups: with a KL term in them no two rewards are alike, so no '
            'subgroup would ever be rejected. Use one of the two.'
        )


def _segment_reasons(args: GRPOConfig, config: TreeConfig) -> Iterator[str]:
    """Options that need one advantage per trajectory, where the estimator gives one per segment."""
    if not is_segment_level(config.advantage.estimator):
        return
    estimator = f'estimator={config.advantage.estimator!r}, which gives every segment an advantage of its own'
    if args.loss_type == 'real':
        yield f'--loss_type real with {estimator}: its loss has one sign per trajectory. Use a trajectory-level one.'
    if args.importance_sampling_level == 'sequence':
        yield (
            f'--importance_sampling_level sequence with {estimator}: all tokens of a trajectory then share one '
            'gradient, and the differences are lost. Use sequence_token.'
        )
    if args.use_liger_kernel:
        yield (
            f"--use_liger_kernel true with {estimator}: liger's GRPO loss takes the mean over a trajectory. Leave "
            'it out.'
        )
    if args.advantage_reweight == 'rlsd':
        yield (
            f'--advantage_reweight rlsd with {estimator}: it reweights one advantage per trajectory. Use a '
            'trajectory-level one.'
        )


def _rollout_reasons(args: GRPOConfig) -> Iterator[str]:
    if args.structured_outputs_regex:
        yield '--structured_outputs_regex: its automaton would start anew at every segment.'
    if args.async_generate and args.eval_on_start:
        yield (
            '--async_generate true with --eval_on_start true: swift then evaluates on the first training rollout '
            "and trains on the evaluation's. Use --eval_strategy steps without --eval_on_start."
        )


def _colocate_reasons(args: GRPOConfig, config: TreeConfig) -> Iterator[str]:
    """Options that can not go with trees on the engine in the trainer's process."""
    if args.tree_scheduler is None:
        return
    if args.vllm_tensor_parallel_size > 1:
        yield (
            f'--vllm_tensor_parallel_size {args.vllm_tensor_parallel_size} in colocate mode: its ranks must add, step '
            'and abort the same requests in the same order, and each would grow trees by itself. Use 1, or '
            '--vllm_mode server, where `swift rollout` takes any.'
        )
    if args.completion_length_limit_scope == 'total':
        yield (
            '--completion_length_limit_scope total: on trees --max_completion_length limits each turn, and the '
            "engine's model length all of them. Use per_round, and --vllm_max_model_len for the whole."
        )
    if config.budget.policy == 'by_segment_tokens' and args.world_size > 1:
        yield (
            f'budget.policy=by_segment_tokens on {args.world_size} ranks in colocate mode: all trees of a batch share '
            'those tokens, and here they grow on several engines. Use another budget, or --vllm_mode server.'
        )


def megatron_reasons(args: Any, ranks: int) -> Iterator[str]:
    """Options of Megatron-SWIFT alone, on so many ranks."""
    if args.router_replay_mode == 'R3':
        yield (
            '--router_replay_mode R3: it replays the experts that the engine chose, and what trees give back does not '
            'hold them. Use R2 or disabled.'
        )
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    stages = args.pipeline_model_parallel_size
    replicas = ranks // (tensor * context * stages)
    together = args.per_device_generation_batch_size * tensor * context
    if args.dynamic_sample and stages > 1 and replicas > 1 and together % args.num_generations:
        yield (
            f'--dynamic_sample true with {stages} pipeline stages and {replicas} data-parallel replicas: swift looks '
            f'for groups in the order of ranks, where only {together} answers of a replica follow each other, not a '
            f'multiple of --num_generations {args.num_generations}. It would cut trees. Raise --generation_batch_size.'
        )
