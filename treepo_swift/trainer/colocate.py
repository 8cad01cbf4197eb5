"""`ColocateMixin`: trees on the vLLM engine in the trainer's own process (``--vllm_mode colocate``)."""

from __future__ import annotations

from typing import Any

from swift.infer_engine.protocol import RequestConfig
from swift.rlhf_trainers.utils import profiling_context

from .proof import ProofMixin


class ColocateMixin(ProofMixin):
    """Goes before `GRPOTrainer`. Without trees in this process everything is swift's own."""

    def _infer_single_or_multi_turn(
        self, samples: list[Any], request_config: RequestConfig, is_global_inputs: bool = False
    ) -> list[Any]:
        if self.trees_here is None:
            return super()._infer_single_or_multi_turn(samples, request_config, is_global_inputs)
        with profiling_context(self, 'generate'), self._disable_sp_context():
            self._compare_weights()
            outputs = self._rollout_here(self.samples2requests(samples), self._get_request_config())
        return self._postprocess_rollout_outputs(samples, outputs)
