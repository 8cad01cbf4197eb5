"""`ProofMixin`: after a weight sync both sides score one text (`weight_sync` judges what they say)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from swift.utils import get_logger

from .rollout import together
from .servers import probe_servers
from .sync_watch import SyncWatch
from .trees import TreesMixin
from .weight_sync import MAX_PROBE_TOKENS, PROBE_TEXT, ServerProof, WeightSyncError, WeightSyncProof

if TYPE_CHECKING:
    from .arguments import TreeArguments

logger = get_logger()


class ProofMixin(TreesMixin):
    """A trainer says how it scores tokens, and in which types it computes."""

    _sync_watch: SyncWatch | None = None
    """On the main process in server mode only."""
    _sync_proof: WeightSyncProof | None = None
    _to_compare: tuple[WeightSyncProof, list[int], list[float]] | None = None
    """The proof, the probe's tokens and the trainer's log-probs of them, from a sync until the engine is awake."""

    # What a trainer says of itself.

    def _score(self, token_ids: list[int]) -> list[float]:
        """The trainer's own log-probs of ``token_ids[1:]``; all ranks call it at the same time."""
        raise NotImplementedError

    def _computing_types(self) -> list[str]:
        """Types that a forward pass here computes in."""
        raise NotImplementedError

    # Comparing.

    def _set_up_trees(self, asked: TreeArguments) -> None:
        super()._set_up_trees(asked)
        if self._servers is not None:
            self._sync_watch = SyncWatch(self.vllm_client)
        if self.grows_trees and self.tree_config.checks.verify_weight_sync:
            self._sync_proof = WeightSyncProof(self._computing_types(), in_process=self.trees_here is not None)

    def _move_model_to_vllm(self, *args: Any, **kwargs: Any) -> None:
        if self.grows_trees and self.trees_here is None and not self.args.async_generate:
            # With --async_generate a batch may be under way there, and nobody would answer before it is done.
            self._broadcast(lambda: self._servers.leave_out_dead())
        with self._sync_watch or nullcontext():
            super()._move_model_to_vllm(*args, **kwargs)
        # With --async_generate too: swift waits for the rollout in flight before it sends weights.
        if self._sync_proof is not None and self._broadcast(self._sync_proof.is_due):
            self._verify_weight_sync(self._sync_proof)

    def _verify_weight_sync(self, proof: WeightSyncProof) -> None:
        """Compare log-probs of the probe text on every engine; all ranks take part, and all raise or none."""
        began = time.perf_counter()
        token_ids = self._tokenizer().encode(PROBE_TEXT, add_special_tokens=False)[:MAX_PROBE_TOKENS]
        if self.trees_here is not None:
            # This engine has its weights, but perhaps no KV cache yet. And this model may be offloaded later.
            self._to_compare = proof, token_ids, self._score(token_ids)
            return
        with ThreadPoolExecutor(1) as thread:
            # The servers score while this side does. Only the main process has a client.
            asks = self._ranks().is_main
            asked = thread.submit(probe_servers, self.vllm_client, token_ids=token_ids) if asks else None
            ours = self._score(token_ids)

        def compare() -> WeightSyncProof:
            answers = asked.result()
            for url, answer in zip(self.vllm_client.base_urls, answers, strict=True):
                if answer is None:
                    raise WeightSyncError(
                        f'{url} grew trees when the training started and does not any more: was it restarted without '
                        '--external_plugins or --multi_turn_scheduler?'
                    )
                dtype = answer['engine'].get('dtype')
                proof.check(ours, answer['logprobs'], url=url, dtype=dtype, step=self.state.global_step)
            return proof

        was_proven = proof.proven
        proof = self._sync_proof = self._broadcast(compare)
        self._note_proof(proof, was_proven, time.perf_counter() - began)

    def _compare_weights(self) -> None:
        """What is left of a weight sync's proof: the engine's half, now that its KV cache is awake."""
        if self._to_compare is None:
            return
        (proof, token_ids, ours), self._to_compare = self._to_compare, None
        began = time.perf_counter()
        rank, was_proven = self._ranks().index, proof.proven

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

    def _note_proof(self, proof: WeightSyncProof, was_proven: bool, seconds: float) -> None:
        worst = proof.worst
        self._metrics['train']['tree/sync_gap'].append(worst.gap)
        self._metrics['train']['tree/proof_seconds'].append(seconds)
        if was_proven:  # the first ones find cold caches, and are made whatever they take
            proof.took(seconds)
        if proof.proven and not was_proven:
            logger.info(
                f'treepo: weight sync is proven: the policy moved by {worst.drift:.4g} nats per token and every engine '
                f'followed, to {worst.gap:.4g} at the farthest (at the first sync it was {worst.noise:.4g}).'
            )
