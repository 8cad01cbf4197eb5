"""`SharedPrefixMixin`: swift's GRPO trainer with log-probs over tries instead of padded rows, where that is exact."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from swift.utils import get_logger

from .batch import CACHE, read_rows
from .old_policy import why_needed
from .reasons import NotShared, why_not_model
from .trie import build_trie
from .trust import Result, Sharing

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOTrainer as _Trainer
else:
    _Trainer = object

logger = get_logger()


class SharedPrefixMixin(_Trainer):
    """Goes before `GRPOTrainer`, with a `tree_config`. Old, reference, teacher and policy log-probs all pass here;
    what swift makes of them stays its own."""

    _sharing: Sharing | None = None
    _leaves_out_old = False
    """Within `_prepare_batch_inputs`: the policy's pass without gradients is left out."""
    _is_reference = False
    """Within `null_ref_context`: the policy's model stands for the reference."""
    _looked_at_micro_batches = False

    # What swift calls.

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        self._leaves_out_old = self._can_leave_out_old(samples)
        try:
            batches = super()._prepare_batch_inputs(samples)
        finally:
            self._leaves_out_old = False
        if self.model.training and not self._looked_at_micro_batches:
            self._looked_at_micro_batches = True
            self._say_what_micro_batches_share(batches)
        return batches

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
        plain = partial(
            super()._get_per_token_logps_and_entropies_single,
            model,
            model_inputs,
            grpo_batch,
            compute_entropy=compute_entropy,
        )
        sharing = self._find_sharing()
        if sharing.enabled:
            rows = sharing.rows_for(model, partial(self._read, model_inputs, grpo_batch))
            shared = lambda rows: rows.logprobs(model, temperature=self.temperature, entropies=compute_entropy)
            result, is_shared = sharing.run(model, rows, shared, plain, grpo_batch.completion_mask)
        else:
            result, is_shared = plain(), False
        self._note_pass(grpo_batch, is_shared, self._now() - began)
        return result

    # Machinery.

    def _find_sharing(self) -> Sharing:
        if self._sharing is None:
            one_rank = self.accelerator.num_processes == 1
            self._sharing = Sharing(
                enabled=self.tree_config.shared_prefix.enabled and self._why_not_trainer() is None,
                say=logger.info,
                warn=logger.warning,
                gather=list if one_rank else gather_object,
                mixed_precision=getattr(self.accelerator, 'mixed_precision', None),
            )
            if self.tree_config.shared_prefix.enabled and not self._sharing.enabled:
                self._sharing.give_up(self._why_not_trainer())
        return self._sharing

    def _why_not_trainer(self) -> str | None:
        if self.is_multimodal:
            return 'the model is multimodal'
        if self.template.sequence_parallel_size > 1:
            return '--sequence_parallel_size splits rows over ranks'
        if getattr(self.args, 'use_liger_kernel', False):
            return '--use_liger_kernel has layers of its own'
        return None

    def _read(self, model_inputs: dict[str, Any], grpo_batch: Any) -> Any:
        return read_rows(model_inputs, grpo_batch, padding_free=self.template.padding_free)

    def _can_leave_out_old(self, samples: list[Any]) -> bool:
        if not self.tree_config.shared_prefix.skip_old_logprobs:
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
        try:
            for batch in batches:
                self._read(batch['model_inputs'], batch['grpo_batch'])
        except NotShared:
            pass
        read = [rows for b in batches if (rows := b['grpo_batch'].__dict__.get(CACHE)) is not None]
        if not read:
            return
        tries = sum(len(rows.trie.tokens) for rows in read)
        together = build_trie([rows.trie.tokens[path] for rows in read for path in rows.trie.paths])
        logger.info(
            f'treepo: --per_device_train_batch_size {size} cuts trees of {width}: their micro-batches share '
            f'{together.row_tokens / tries:.2f} row tokens per token, whole trees {together.ratio:.2f}. '
            f'A multiple of {width} keeps trees together.'
        )

    def _note_pass(self, grpo_batch: Any, is_shared: bool, seconds: float) -> None:
        if not self.model.training:
            return
        metrics = self._metrics['train']
        if not torch.is_grad_enabled():
            metrics['tree/logprob_seconds'].append(seconds)
            return
        metrics['tree/policy_seconds'].append(seconds)
        rows = grpo_batch.__dict__.get(CACHE)
        metrics['tree/train_token_ratio'].append(rows.trie.ratio if is_shared else 1.0)
        if rows is not None:
            metrics['tree/padding_ratio'].append(rows.computed_tokens / max(rows.trie.row_tokens, 1))

    def _now(self) -> float:
        if self.accelerator.device.type == 'cuda':
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()
