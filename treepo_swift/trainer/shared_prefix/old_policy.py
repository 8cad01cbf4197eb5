"""When the log-probs of the policy that sampled need no pass of their own."""

from __future__ import annotations

from typing import Any


def why_needed(trainer: Any, *, taught: bool) -> str | None:
    """Why a rollout's old log-probs must be computed; None where swift's loss gives the same without.

    Where every token of a rollout is trained before the weights move, the policy still is the one that sampled: the
    ratio is 1, and swift takes the policy's own log-probs, detached, where the old ones are None.
    """
    if trainer.old_policy():
        return 'the weights move before all of a rollout is trained (--num_iterations, --steps_per_generation)'
    if trainer.beta != 0.0 and trainer.kl_in_reward:
        return 'the KL term is part of the reward'
    if taught:
        return 'a teacher is compared with them'
    if trainer.rollout_importance_sampling_mode is not None or trainer.log_rollout_offpolicy_metrics:
        return 'they are compared with the log-probs of the rollout'
    if trainer.off_policy_sequence_mask_delta is not None:
        return '--off_policy_sequence_mask_delta compares with them'
    if trainer.use_liger_loss:
        return 'the liger loss takes them'
    return None
