"""ms-swift's gym environments as trees: ``--use_gym_env true --multi_turn_scheduler treepo_gym``."""

from __future__ import annotations

from swift.rollout.multi_turn import GYMScheduler

from .scheduler import TreeRolloutScheduler


class TreeGymScheduler(TreeRolloutScheduler, GYMScheduler):
    """`GYMScheduler` whose environments fork with their paths: one `reset` a tree, then a copy for every turn."""

    async def release_state(self, state_id: str) -> None:  # type: ignore[override]
        await self._close_and_remove(state_id)
