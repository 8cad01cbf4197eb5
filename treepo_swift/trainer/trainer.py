"""`TreeGRPOTrainer`: swift's GRPO trainer with advantages that know the tree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers.rollout_mixin import DataCache
from swift.utils import get_logger

from treepo_swift.advantage import is_segment_level
from treepo_swift.advantage.batch import SegmentAdvantages, tree_advantages
from treepo_swift.compat.capabilities import swift_features
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.wire.note import REQUEST_KEY, RequestNote
from treepo_swift.wire.packing import accept_packed
from treepo_swift.wire.report import FAILURE_KEY, REPORT_KEY, TreeReport

from .colocate import ColocateMixin
from .metrics import EvaluationFailures, RolloutRound, tree_metrics
from .reward_watch import watched_rewards
from .rewards import find_reward_fault, set_missing_gym_rewards, settle_placeholders, spread_over_tokens
from .rollout import probe_servers, rollout_note
from .shared_prefix.mixin import SharedPrefixMixin
from .weight_sync import MAX_PROBE_TOKENS, PROBE_TEXT, WeightSyncError, WeightSyncProof

logger = get_logger()

CONFIG_FILE = 'treepo_config.yaml'
NO_TREES = (
    'treepo: nothing grows trees here, so this run is plain GRPO. For trees, start `swift rollout` with the plugin and '
    '--multi_turn_scheduler treepo; in colocate mode give --multi_turn_scheduler treepo to this command.'
)
MIXED_PRECISION = {'fp16': 'float16', 'bf16': 'bfloat16', 'fp8': 'bfloat16'}
"""accelerate's names for the types that a forward pass computes in, where they are not the parameters'."""


def train_on_samples_only(template: Any) -> None:
    """Keep the loss mask that came with a rollout.

    swift trains on a template's end-of-turn tokens wherever they follow a trained one, also where nobody sampled them:
    behind a turn that reached its limit, or where an agent template writes them again before a tool's result.
    """
    template._add_dynamic_eos = lambda *args: None


class TreeGRPOTrainer(SharedPrefixMixin, ColocateMixin, GRPOTrainer):
    """Trains GRPO on trees: asks the servers for them, or the engine in its process, and the registry for advantages.

    Samples that come without a tree (another scheduler, evaluation) are handled as swift does. With
    trees the tree config's `normalisation` replaces ``--scale_rewards``. An estimator that gives one advantage per
    trajectory leaves it to swift to spread it over tokens (`_postprocess_batch`); for one per segment we do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tree_config: TreeConfig = kwargs['args'].tree_config
        self.grows_trees = False
        self._sync_proof: WeightSyncProof | None = None
        self._rounds: list[RolloutRound] = []
        """Since the last advantages; several with ``--dynamic_sample``."""
        self._evaluation_failures = EvaluationFailures()
        self._segment_advantages: list[SegmentAdvantages] | None = None
        """What `_compute_advantages` leaves for `_postprocess_batch`, of each local sample."""
        super().__init__(*args, **kwargs)

    # Set-up.

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        here = self.args.tree_scheduler is not None
        self.grows_trees = here or bool(self._broadcast(lambda: self.args.tree_engines))
        if not self.grows_trees:
            logger.warning(NO_TREES)
            return
        if self.template.sequence_parallel_size > 1:
            raise ConfigError('--sequence_parallel_size > 1 is not supported with trees in this version.')
        train_on_samples_only(self.template)
        self.tree_config = self._broadcast(lambda: self.args.tree_config)
        if here:
            self._plant_here()
        if self.tree_config.checks.verify_weight_sync:
            self._sync_proof = WeightSyncProof(self._computing_types(), in_process=here)
        if self.accelerator.is_main_process:
            if not here:
                accept_packed(self.vllm_client.sessions)
            self._keep_config()

    def _keep_config(self) -> None:
        config, directory = self.tree_config, Path(self.args.output_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / CONFIG_FILE).write_text(config.to_yaml())
            logger.info(f'treepo: the whole tree config is in {directory / CONFIG_FILE}.')
        except OSError as e:
            # A full disk ends a run where swift saves a checkpoint, on all ranks; not here, on one of them.
            logger.warning(f'treepo: {directory / CONFIG_FILE} could not be written ({e}); the run goes on without it.')
        logger.info(
            f'treepo: advantages by estimator={config.advantage.estimator!r} and normalisation='
            f'{config.advantage.normalisation!r}; --scale_rewards applies to samples without a tree only.'
        )

    def _setup_teacher(self) -> None:
        super()._setup_teacher()
        # swift 4.6.0 takes every run without a teacher for self-distillation, which it can be by a dataset column, and
        # so refuses --loss_type real and fipo and --off_policy_sequence_mask_delta always. See `_postprocess_batch`.
        if self.grows_trees and self._is_dynamic_self_distillation and self._needs_trajectory_advantages():
            self._has_teacher = False

    def _needs_trajectory_advantages(self) -> bool:
        return self.loss_type in ('real', 'fipo') or self.off_policy_sequence_mask_delta is not None

    def _computing_types(self) -> list[str]:
        """Types that a forward pass here computes in: the parameters', and autocast's where there is one."""
        autocast = MIXED_PRECISION.get(self.accelerator.mixed_precision)
        return [str(next(self.model.parameters()).dtype), *([autocast] if autocast else [])]

    def _broadcast(self, function: Any) -> Any:
        """Call `function` on the main process and give its result, or its exception, to every rank."""
        result: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                result = [function()]
            except Exception as e:
                result = [e]
        result = broadcast_object_list(result, from_process=0)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    # Requests.

    def samples2requests(self, samples: list[Any]) -> list[RolloutInferRequest]:
        requests = super().samples2requests(samples)
        if self.grows_trees:
            note = self._request_note().to_dict()
            for request in requests:
                request.data_dict = {**(request.data_dict or {}), REQUEST_KEY: note}
        return requests

    def _request_note(self) -> RequestNote:
        # With --async_generate swift asks for the first evaluation rollout before it sets the model to eval.
        evaluates = not self.model.training or self.control.should_evaluate
        return rollout_note(
            self.tree_config,
            width=self.num_generations_eval if evaluates else self.num_generations,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            evaluates=evaluates,
            packed=self.trees_here is None,
        )

    def _server_rollout(self, samples: list[Any], request_config: RequestConfig, is_global_inputs: bool) -> list[Any]:
        """swift's, but for ``--async_generate`` over several ranks.

        There it runs in a thread, and for a multi-turn server it counts outputs by a collective, which would mix
        with those of the main thread. A tree server gives one output per request, so there is nothing to count.
        """
        if not (is_global_inputs and self.grows_trees):
            return super()._server_rollout(samples, request_config, is_global_inputs)
        requests = self.samples2requests(samples)
        if not self.accelerator.is_main_process:
            return []
        outputs = self._engine_infer(requests, request_config)
        if len(outputs) != len(requests):
            raise RuntimeError(f'The tree servers gave {len(outputs)} outputs for {len(requests)} requests.')
        return outputs

    def _prefetch(self, dataloader: Any) -> None:
        """swift's, for the first rollout of ``--async_generate``: what goes wrong there reaches every rank.

        Only the main process talks to the servers. It would raise alone, and the others would wait for it; swift hands
        a failure of the later rollouts to all ranks where they next wait for one, so this goes the same way.
        """
        try:
            super()._prefetch(dataloader)
        except Exception as e:
            if not swift_features().async_errors:
                raise  # `TreeGRPOConfig` has warned
            self._queue.put(DataCache(error=e))

    # Weight sync.

    def _move_model_to_vllm(self, *args: Any, **kwargs: Any) -> None:
        super()._move_model_to_vllm(*args, **kwargs)
        # With --async_generate too: swift waits for the rollout in flight before it sends weights.
        if self._sync_proof is not None and self._broadcast(self._sync_proof.is_due):
            self._verify_weight_sync(self._sync_proof)

    def _verify_weight_sync(self, proof: WeightSyncProof) -> None:
        """Compare log-probs of the probe text on every engine; all ranks take part, and all raise or none."""
        began = time.perf_counter()
        token_ids = self.processing_class.encode(PROBE_TEXT, add_special_tokens=False)[:MAX_PROBE_TOKENS]
        if self.trees_here is not None:
            # This engine has its weights, but perhaps no KV cache yet. And this model may be offloaded later.
            self._to_compare = proof, token_ids, self._score(token_ids)
            return
        with ThreadPoolExecutor(1) as thread:
            # The servers score while this side does. Only the main process has a client.
            asks = self.accelerator.is_main_process
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

    @torch.no_grad()
    def _score(self, token_ids: list[int]) -> list[float]:
        """The trainer's own log-probs of ``token_ids[1:]``. ZeRO-3 gathers parameters as in any forward pass."""
        was_training = self.model.training
        self.model.eval()
        try:
            ids = torch.tensor([token_ids], device=self.accelerator.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            self.model.train(was_training)
        logprobs = logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()

    # Rewards.

    def _compute_rewards_per_func(self, samples: list[Any]) -> torch.Tensor:
        """Rewards of one rollout over all ranks [N, functions], checked; remembers the rollout for the metrics."""
        if self.use_gym_env and self.grows_trees:
            set_missing_gym_rewards([sample.rollout_infos for sample in samples])
        with watched_rewards(self, logger.warning, gather_object):
            rewards = super()._compute_rewards_per_func(samples)
        reports = self._gather_reports(samples)
        if reports is None:
            if self.grows_trees:
                errors = gather_object([(s.rollout_infos or {}).get(FAILURE_KEY) for s in samples])
                self._evaluation_failures.add(errors)
            return rewards
        fault = find_reward_fault(rewards, self.reward_weights, self.reward_func_names, reports)
        if fault is not None:
            index, what = fault
            sample = gather_object([(s.request_id, s.messages[:-1]) for s in samples])[index]
            raise ValueError(
                f'{what} for sample {index} of the batch ({sample[0]}): a reward must be a finite number. '
                f'Its prompt: {str(sample[1])[:500]}'
            )
        self._rounds.append(RolloutRound(reports, self._weigh(rewards).tolist()))
        return settle_placeholders(rewards, reports)

    def _gather_reports(self, samples: Sequence[Any]) -> list[TreeReport] | None:
        """The reports of all samples over all ranks; None where they are not from trees."""
        if not self.grows_trees:
            return None
        values = gather_object([(s.rollout_infos or {}).get(REPORT_KEY) for s in samples])
        missing = values.count(None)
        if missing == len(values) and not self.model.training:
            return None
        if missing:
            raise RuntimeError(f'{missing} of {len(values)} samples of a batch came without a tree.')
        return [TreeReport.from_dict(value) for value in values]

    def _weigh(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        return (rewards_per_func * self.reward_weights.unsqueeze(0)).nansum(dim=1)

    # Advantages.

    def _compute_advantages(
        self, samples: list[Any], rewards_per_func: torch.Tensor, batch_encoded_inputs: list[dict[str, Any]]
    ) -> torch.Tensor:
        """Advantages of all samples over all ranks [N]; of segment-level ones, each trajectory's mean."""
        plain = super()._compute_advantages(samples, rewards_per_func, batch_encoded_inputs)  # logs reward metrics
        reports = self._gather_reports(samples)
        if reports is None:
            return plain
        self._log_trees()
        rewards = self._weigh(rewards_per_func)
        batches = [encoded['grpo_batch'] for encoded in batch_encoded_inputs]
        if self.kl_in_reward and self.beta != 0.0:
            kl = [((b.old_per_token_logps - b.ref_per_token_logps) * b.completion_mask).sum(-1) for b in batches]
            rewards = rewards - self.beta * gather(torch.cat(kl))
        self._check_alignment(reports, batches)
        kept = gather_object([n for b in batches for n in self._loss_mask(b).sum(-1).tolist()])
        advantages = tree_advantages(reports, rewards.tolist(), kept, self.tree_config)
        if is_segment_level(self.tree_config.advantage.estimator):
            start = sum(gather_object([len(samples)])[: self.accelerator.process_index])
            self._segment_advantages = advantages[start : start + len(samples)]
        return torch.tensor([a.mean for a in advantages], dtype=plain.dtype, device=plain.device)

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        taught = any(encoded['grpo_batch'].teacher_per_token_logps is not None for encoded in batch_encoded_inputs)
        if taught and self._needs_trajectory_advantages():
            raise ValueError(
                'The dataset has teacher prompts, which go together neither with --loss_type real and '
                'fipo nor with --off_policy_sequence_mask_delta.'
            )
        advantages, self._segment_advantages = self._segment_advantages, None
        if advantages is not None:
            chunks = self.split_by_mini_batches(advantages)
            for chunk, encoded in zip(chunks, batch_encoded_inputs, strict=True):
                spread_over_tokens(chunk, encoded['grpo_batch'])

    def _log_trees(self) -> None:
        rounds, self._rounds = self._rounds, []
        mode = 'train' if self.model.training else 'eval'
        for key, value in tree_metrics(rounds).items():
            self._metrics[mode][key].append(value)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        failures, self._evaluation_failures = self._evaluation_failures, EvaluationFailures()
        if failures.answers:
            self._metrics['eval']['tree/failures'].append(float(len(failures.errors)))
        if failures.errors:
            logger.warning(f'treepo: {failures.describe()}')
        return output

    def _loss_mask(self, batch: Any) -> torch.Tensor:
        if self.overlong_filter:
            return batch.completion_mask & ~batch.truncated_mask.unsqueeze(-1)
        return batch.completion_mask

    def _check_alignment(self, reports: Sequence[TreeReport], batches: Sequence[Any]) -> None:
        """Every trajectory has as many loss tokens as its nodes were sampled with; raises on all ranks or on none."""
        lengths = gather_object([n for b in batches for n in b.completion_mask.sum(-1).tolist()])
        for report, length in zip(reports, lengths, strict=True):
            sampled = report.loss_tokens
            if sampled != length:
                raise RuntimeError(
                    f'A trajectory of tree {report.id} has {length} loss tokens in the trainer, but '
                    f'its nodes {report.nodes} were sampled with {sampled}: advantages would land on '
                    'the wrong tokens. Do trainer and server use the same template and tokenizer?'
                )
        without = gather_object([b.rollout_per_token_logps is None for b in batches])
        if self.rollout_importance_sampling_mode is not None and any(without):
            raise RuntimeError(
                '--rollout_importance_sampling_mode: log-probs of the rollout are missing or do not fit '
                'its tokens, and swift would leave the correction out without a word.'
            )
