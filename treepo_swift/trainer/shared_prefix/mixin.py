"""`SharedPrefixMixin`: swift's GRPO trainer with log-probs over tries instead of padded rows, where that is exact."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from swift.utils import get_logger

from .attention import needs_masks, refuse_large_masks
from .batch import CACHE, Result, Rows, read_rows, refuse_too_little
from .joining import Joined, Shared, affordable_tokens, fitting, windows
from .old_policy import why_needed
from .reasons import NotShared, why_not_model
from .trie import build_trie
from .trust import Sharing

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOTrainer as _Trainer
else:
    _Trainer = object

logger = get_logger()

ONE_BACKWARD = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways of distributing that do not mind if several micro-batches have one forward and one backward."""


class SharedPrefixMixin(_Trainer):
    """Goes before `GRPOTrainer`, with a `tree_config`. Old, reference, teacher and policy log-probs all pass here;
    what swift makes of them stays its own. A run without trees is left alone."""

    grows_trees: bool

    _sharing: Sharing | None = None
    _leaves_out_old = False
    """Within `_prepare_batch_inputs`: the policy's pass without gradients is left out."""
    _is_reference = False
    """Within `null_ref_context`: the policy's model stands for the reference."""
    _looked_at_micro_batches = False
    _following: dict[int, list[dict[str, Any]]] = {}
    """For each micro-batch of the rollout, by the id of its `grpo_batch`: itself and those after it of its optimizer
    step."""
    _joined: Joined | None = None
    """What has been computed for micro-batches that are still to come."""

    # What swift calls.

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        if self.model.training:
            # Ids of the last rollout's batches may be given again.
            self._following, self._joined = {}, None
        self._leaves_out_old = self._can_leave_out_old(samples)
        try:
            batches = super()._prepare_batch_inputs(samples)
        finally:
            self._leaves_out_old = False
        if self.model.training:
            self._find_following(batches)
            if not self._looked_at_micro_batches:
                self._looked_at_micro_batches = True
                self._say_what_micro_batches_share(batches)
        return batches

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._joined is not None and (self._joined.is_used_up or self.accelerator.sync_gradients):
            self._joined.backward()
            self._joined = None
        return loss

    @contextmanager
    def null_ref_context(self) -> Iterator[None]:
        self._is_reference = True
        try:
            with super().null_ref_context():
                yield
        finally:
            self._is_reference = False

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._leaves_out_old and model is self.model and not self._is_reference:
            return None, None
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _get_per_token_logps_and_entropies_single(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, compute_entropy: bool = False
    ) -> Result:
        began = self._now()
        joined = self._joined
        if joined is not None and torch.is_grad_enabled() and joined.has(grpo_batch):
            result = joined.take(grpo_batch)
            self._note_pass(grpo_batch, joined, self._now() - began)
            return result
        plain = partial(
            super()._get_per_token_logps_and_entropies_single,
            model,
            model_inputs,
            grpo_batch,
            compute_entropy=compute_entropy,
        )
        sharing = self._find_sharing()
        rows, is_shared = None, False
        if sharing.enabled:
            rows = sharing.rows_for(model, partial(self._find_shared, model, model_inputs, grpo_batch))
            shared = lambda rows: rows.logprobs(model, temperature=self.temperature, entropies=compute_entropy)
            result, is_shared = sharing.run(model, rows, shared, plain, grpo_batch.completion_mask)
        else:
            result = plain()
        if is_shared and isinstance(rows, Joined) and torch.is_grad_enabled():
            self._joined = rows
        self._note_pass(grpo_batch, rows if is_shared else None, self._now() - began)
        return result

    # Machinery.

    def _find_sharing(self) -> Sharing:
        if self._sharing is None:
            one_rank = self.accelerator.num_processes == 1
            self._sharing = Sharing(
                enabled=self._may_share and self._why_not_trainer() is None,
                say=logger.info,
                warn=logger.warning,
                gather=list if one_rank else gather_object,
                mixed_precision=getattr(self.accelerator, 'mixed_precision', None),
            )
            if self._may_share and not self._sharing.enabled:
                self._sharing.give_up(self._why_not_trainer())
        return self._sharing

    @property
    def _may_share(self) -> bool:
        return self.grows_trees and self.tree_config.shared_prefix.enabled

    def _why_not_trainer(self) -> str | None:
        if self.is_multimodal:
            return 'the model is multimodal'
        if self.template.sequence_parallel_size > 1:
            return '--sequence_parallel_size splits rows over ranks'
        if getattr(self.args, 'use_liger_kernel', False):
            return '--use_liger_kernel has layers of its own'
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return 'FSDP shards the head, and sharing with it is not tested'
        return None

    def _read(self, model_inputs: dict[str, Any], grpo_batch: Any) -> Rows:
        return read_rows(model_inputs, grpo_batch, padding_free=self.template.padding_free)

    def _find_shared(self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any) -> Shared:
        """What is computed together with a micro-batch; raises `NotShared` where that shares too little."""
        rows = self._read(model_inputs, grpo_batch)
        found: Shared = rows
        following = self._following.get(id(grpo_batch), [])
        if len(following) > 1 and torch.is_grad_enabled():
            parts = [rows, *self._read_following(following[1:])]
            count = fitting(parts, self._most_tokens(model, rows))
            if count > 1:
                found = Joined([batch['grpo_batch'] for batch in following[:count]], parts[:count])
        refuse_too_little(found.trie)
        device, dtype = self.accelerator.device, self._find_sharing().computes_in(model)
        if needs_masks(device, dtype):
            refuse_large_masks(found.trie.pairs, dtype)
        return found

    def _most_tokens(self, model: Any, rows: Rows) -> int:
        return self.tree_config.shared_prefix.max_tokens or affordable_tokens(model, rows.computed_tokens)

    def _read_following(self, batches: list[dict[str, Any]]) -> Iterator[Rows]:
        """The rows of micro-batches, as far as they can be shared."""
        for batch in batches:
            try:
                yield self._read(batch['model_inputs'], batch['grpo_batch'])
            except NotShared:
                return

    def _find_following(self, batches: list[dict[str, Any]]) -> None:
        self._following = {}
        if self._find_sharing().enabled and self._why_not_joined() is None:
            for window in windows(len(batches), self.args.gradient_accumulation_steps):
                for i in window:
                    self._following[id(batches[i]['grpo_batch'])] = batches[i : window.stop]

    def _why_not_joined(self) -> str | None:
        if self.dynamic_num_samples:
            return 'rollouts have other numbers of samples than requests'
        if self.accelerator.distributed_type not in ONE_BACKWARD:
            return f'{self.accelerator.distributed_type.value} counts the passes of each micro-batch'
        if 'lomo' in str(self.args.optim).lower():
            return '--optim lomo updates weights within the backward'
        return None

    def _can_leave_out_old(self, samples: list[Any]) -> bool:
        if not (self.grows_trees and self.tree_config.shared_prefix.skip_old_logprobs):
            return False
        taught = self._has_teacher_explicit()
        if not taught and self._is_dynamic_self_distillation:
            # A column of the dataset, so of single samples; all ranks leave the pass out, or none.
            mine = any(sample.teacher_prompt or sample.teacher_images is not None for sample in samples)
            taught = any(gather_object([mine])) if self.accelerator.num_processes > 1 else mine
        reason = why_needed(self, taught=taught)
        if reason is None:
            # With dropout two passes differ, and the plain path's ratio is not 1.
            dropout = why_not_model(self.model)
            reason = dropout if dropout and 'dropout' in dropout else None
        if reason is not None:
            logger.info_once(f'treepo: old log-probs are computed in a pass of their own: {reason}.')
        return reason is None

    def _say_what_micro_batches_share(self, batches: list[dict[str, Any]]) -> None:
        """Where a micro-batch holds less than a tree: what is lost, and which value would not lose it."""
        size, width = self.args.per_device_train_batch_size, self.num_generations
        if len(batches) == 1 or size % width == 0 or not self._find_sharing().enabled:
            return
        read = list(self._read_following(batches))
        if not read:
            return
        computed, at = 0, 0
        while at < len(read):
            following = self._following.get(id(batches[at]['grpo_batch']), [None])
            parts = read[at : at + len(following)]
            count = fitting(parts, self._most_tokens(self.model, parts[0]))
            computed += len(build_trie([ids for part in parts[:count] for ids in part.ids]).tokens)
            at += count
        whole = build_trie([ids for part in read for ids in part.ids])
        reason = self._why_not_joined() or 'together they have more than shared_prefix.max_tokens'
        if whole.row_tokens / computed > 0.98 * whole.ratio:
            return
        logger.info(
            f'treepo: --per_device_train_batch_size {size} cuts trees of {width}: what is computed at once shares '
            f'{whole.row_tokens / computed:.2f} row tokens per token, whole trees {whole.ratio:.2f} (micro-batches do '
            f'not all go together: {reason}). A multiple of {width} keeps trees together.'
        )

    def _note_pass(self, grpo_batch: Any, shared: Shared | None, seconds: float) -> None:
        if not (self.model.training and self.grows_trees):
            return
        metrics = self._metrics['train']
        if not torch.is_grad_enabled():
            metrics['tree/logprob_seconds'].append(seconds)
            return
        metrics['tree/policy_seconds'].append(seconds)
        metrics['tree/train_token_ratio'].append(shared.trie.ratio if shared is not None else 1.0)
        rows = grpo_batch.__dict__.get(CACHE)
        if rows is not None:
            metrics['tree/padding_ratio'].append(rows.computed_tokens / max(rows.trie.row_tokens, 1))

    def _now(self) -> float:
        if self.accelerator.device.type == 'cuda':
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()
