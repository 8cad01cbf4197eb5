"""`ColocateMixin`: trees on the vLLM engine in the trainer's own process (``--vllm_mode colocate``)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from swift.infer_engine.protocol import RequestConfig
from swift.rlhf_trainers.utils import profiling_context

from .rollout import RankRollout, plant_in_process, together
from .weight_sync import ServerProof, WeightSyncProof

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOTrainer as _Trainer

    from .rollout import ColocateTrees
else:
    _Trainer = object


class ColocateMixin(_Trainer):
    """Goes before `GRPOTrainer`. Without trees in this process everything is swift's own."""

    trees_here: ColocateTrees | None = None
    """The trees of this process's engine; None in server mode, and in a run without trees."""
    _to_compare: tuple[WeightSyncProof, list[int], list[float]] | None = None
    """The proof, the probe's tokens and the trainer's log-probs of them, from a sync until the engine is awake."""

    def _plant_here(self) -> None:
        """After swift has made the engine. Every rank has one; all raise, or none."""
        args = self.args
        self.trees_here = together(
            lambda: plant_in_process(self.engine, args.tree_scheduler, self.tree_config, args), self._gather_lists
        )

    def _infer_single_or_multi_turn(
        self, samples: list[Any], request_config: RequestConfig, is_global_inputs: bool = False
    ) -> list[Any]:
        if self.trees_here is None:
            return super()._infer_single_or_multi_turn(samples, request_config, is_global_inputs)
        ranks = RankRollout(self.trees_here, rank=self.accelerator.process_index, gather=self._gather_lists)
        with profiling_context(self, 'generate'), self._disable_sp_context():
            self._compare_weights()
            note = self._request_note()
            outputs = ranks.outputs(self.samples2requests(samples), note.group_size, self._get_request_config())
        return self._postprocess_rollout_outputs(samples, outputs)

    def _compare_weights(self) -> None:
        """What is left of a weight sync's proof: the engine's half, now that its KV cache is awake."""
        if self._to_compare is None:
            return
        (proof, token_ids, ours), self._to_compare = self._to_compare, None
        began = time.perf_counter()
        rank, was_proven = self.accelerator.process_index, proof.proven

        def compare() -> ServerProof:
            dtype = self.trees_here.engine_info['dtype']
            engine = f'the engine of rank {rank}'
            return proof.check(
                ours, self.trees_here.score(token_ids), url=engine, dtype=dtype, step=self.state.global_step
            )

        mine = together(compare, self._gather_lists)
        proof.servers.update(self._gather_proofs(rank, mine))
        self._note_proof(proof, was_proven, time.perf_counter() - began)

    def _gather_proofs(self, rank: int, mine: ServerProof) -> dict[str, ServerProof]:
        """Every rank's, so that all ranks log the same worst one."""
        return {f'the engine of rank {r}': proof for r, proof in self._gather_lists([(rank, mine)])}

    def _gather_lists(self, values: list[Any]) -> list[Any]:
        return gather_object(values) if self.accelerator.num_processes > 1 else values
