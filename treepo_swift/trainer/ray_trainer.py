"""`TreelessGRPOTrainer`: swift's GRPO trainer for Ray, which refuses schedulers that grow trees."""

from __future__ import annotations

from swift.ray.megatron.grpo_trainer import GRPOTrainer

from .ray import refuse


class TreelessGRPOTrainer(GRPOTrainer):
    """Otherwise swift's own. It is made when models have loaded: `refuse_trees` comes before that."""

    def _prepare_multi_turn(self) -> None:
        scheduler = self.args.multi_turn_scheduler
        refuse(scheduler)
        super()._prepare_multi_turn()
