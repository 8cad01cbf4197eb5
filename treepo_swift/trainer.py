"""`TreeGRPOTrainer`: swift's GRPO trainer with advantages that know the tree."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from accelerate.utils import broadcast_object_list, gather_object
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.rlhf_trainers import GRPOConfig, GRPOTrainer
from swift.utils import get_logger

from .advantage import estimate, whiten
from .advantage.registry import check_estimator
from .config import ConfigError, TreeConfig
from .metrics import tree_metrics
from .plugin import SCHEDULER_NAMES
from .transport import REPORT_KEY, REQUEST_KEY, RequestNote
from .tree import StopReason
from .weight_sync import MAX_PROBE_TOKENS, PROBE_TEXT, WeightSyncError, WeightSyncProof

logger = get_logger()

CONFIG_FILE = 'treepo_config.yaml'


@dataclass
class TreeGRPOConfig(GRPOConfig):
    """swift's GRPO arguments, refused where they contradict the tree's before any model loads."""
    def __post_init__(self) -> None:
        super().__post_init__()
        config = TreeConfig.load()
        if config != TreeConfig():  # defaults may belong to a run whose server grows no trees; see prepare_rollout
            config.check_fits(self.max_completion_length, '--max_completion_length')
        if self.vllm_mode == 'colocate' and getattr(self, 'multi_turn_scheduler', None) in SCHEDULER_NAMES:
            raise ConfigError('--vllm_mode colocate: trees grow in `swift rollout` only, which is --vllm_mode server.')


class TreeGRPOTrainer(GRPOTrainer):
    """Trains GRPO on trees: asks the server for them, and the registry for their advantages.

    Samples that come without a tree (a server with another scheduler, evaluation) train as plain GRPO does. Tree
    advantages are whitened over the loss tokens of the whole batch, over all ranks; ``--scale_rewards`` applies to
    plain GRPO only. swift itself spreads a trajectory's advantage over its tokens (`_postprocess_batch`).
    """
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tree_config = TreeConfig.load()
        check_estimator(self.tree_config.estimator)
        self.grows_trees = False
        self._sync_proof: WeightSyncProof | None = None
        super().__init__(*args, **kwargs)

    # Set-up.

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        engines = self._broadcast(self._handshake) if self.use_fast_infer and self.vllm_mode == 'server' else []
        self.grows_trees = bool(engines)
        if not self.grows_trees:
            logger.warning('treepo: no rollout server grows trees, so this run is plain GRPO. For trees, start '
                           '`swift rollout` with the plugin and --multi_turn_scheduler treepo.')
            return
        self.tree_config.check_fits(self.max_completion_length, '--max_completion_length')
        for url, engine in engines:
            self.tree_config.check_fits(engine['max_model_len'], f'--vllm_max_model_len of {url}')
        if self.kl_in_reward and self.beta != 0.0:
            raise ConfigError('--kl_in_reward true: tree advantages take rewards without a KL term in this version. '
                              'Leave it out and use --beta, which adds the KL term to the loss.')
        if self.advantage_estimator != 'grpo':
            raise ConfigError(f'--advantage_estimator {self.advantage_estimator}: with trees the estimator is set in '
                              f'the tree config (now {self.tree_config.estimator!r}). Leave the flag out.')
        if self.template.sequence_parallel_size > 1:
            raise ConfigError('--sequence_parallel_size > 1 is not supported with trees in this version.')
        if self.tree_config.verify_weight_sync:
            self._sync_proof = WeightSyncProof(str(next(self.model.parameters()).dtype))
        if self.accelerator.is_main_process:
            directory = Path(self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / CONFIG_FILE).write_text(self.tree_config.to_yaml())
            logger.info(f'treepo: trees of width {self.num_generations}, config in {directory / CONFIG_FILE}')

    def _handshake(self) -> list[tuple[str, dict[str, Any]]]:
        """Ask every server whether it grows trees: (url, engine info) of each, empty where none does."""
        answers = self._probe_servers(None)
        trees = [answer is not None for answer in answers]
        if any(trees) and not all(trees):
            plain = [url for url, tree in zip(self.vllm_client.base_urls, trees, strict=True) if not tree]
            raise ConfigError(f'Some rollout servers grow trees and others do not: {", ".join(plain)} '
                              'need --multi_turn_scheduler treepo too.')
        return [(url, answer['engine']) for url, answer in zip(self.vllm_client.base_urls, answers) if answer]

    def _probe_servers(self, token_ids: list[int] | None) -> list[dict[str, Any] | None]:
        """One probe for each server (the client deals requests out evenly); None where it knows no probes."""
        note = RequestNote(mode='probe', token_ids=token_ids).to_dict()
        request = RolloutInferRequest(messages=[{'role': 'user', 'content': 'probe'}], data_dict={REQUEST_KEY: note})
        outputs = self.vllm_client.infer(
            [asdict(request)] * self.vllm_client.num_servers,
            asdict(RequestConfig(max_tokens=1, return_details=True)),
            use_tqdm=False)
        return [getattr(output, 'rollout_infos', {}).get(REQUEST_KEY) for output in outputs]

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
        if not self.model.training:
            return RequestNote(mode='independent')
        return RequestNote(
            config=self.tree_config.to_dict(), num_generations=self.num_generations, step=self.state.global_step)

    # Weight sync.

    def _move_model_to_vllm(self, *args: Any, **kwargs: Any) -> None:
        super()._move_model_to_vllm(*args, **kwargs)
        if self._sync_proof is not None:
            self._verify_weight_sync(self._sync_proof)

    def _verify_weight_sync(self, proof: WeightSyncProof) -> None:
        """Compare log-probs of the probe text on every server; all ranks take part, and all raise or none."""
        token_ids = self.processing_class.encode(PROBE_TEXT, add_special_tokens=False)[:MAX_PROBE_TOKENS]
        ours = self._score(token_ids)

        def compare() -> WeightSyncProof:
            answers = self._probe_servers(token_ids)
            for url, answer in zip(self.vllm_client.base_urls, answers, strict=True):
                proof.check(ours, answer['logprobs'], where=f'{url}, step {self.state.global_step}')
            return proof

        was_proven = proof.proven
        proof = self._sync_proof = self._broadcast(compare)
        self._metrics['train']['tree/sync_gap'].append(proof.gap)
        if proof.proven and not was_proven:
            logger.info(f'treepo: weight sync is proven: the policy moved by {proof.drift:.4g} nats per token and the '
                        f'server followed to {proof.gap:.4g}.')

    @torch.no_grad()
    def _score(self, token_ids: list[int]) -> list[float]:
        """The trainer's own log-probs of ``token_ids[1:]``."""
        was_training = self.model.training
        self.model.eval()
        try:
            ids = torch.tensor([token_ids], device=self.accelerator.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            self.model.train(was_training)
        logprobs = logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()

    # Advantages.

    def _compute_advantages(self, samples: list[Any], rewards_per_func: torch.Tensor,
                            batch_encoded_inputs: list[dict[str, Any]]) -> torch.Tensor:
        """Tree advantages of all samples over all ranks [N], or plain GRPO's where they came without trees."""
        plain = super()._compute_advantages(samples, rewards_per_func, batch_encoded_inputs)  # logs reward metrics
        reports = gather_object([(s.rollout_infos or {}).get(REPORT_KEY) for s in samples])
        if all(report is None for report in reports):
            return plain
        if any(report is None for report in reports):
            raise RuntimeError(f'{reports.count(None)} of {len(reports)} samples of a batch came without a tree.')
        rewards = (rewards_per_func * self.reward_weights.unsqueeze(0)).nansum(dim=1).tolist()
        lengths = gather_object(self._loss_lengths(batch_encoded_inputs))
        mode = 'train' if self.model.training else 'eval'
        for key, value in tree_metrics(reports, rewards).items():
            self._metrics[mode][key].append(value)
        advantages = tree_advantages(reports, rewards, lengths, self.tree_config)
        return torch.tensor(advantages, dtype=plain.dtype, device=plain.device)

    def _loss_lengths(self, batch_encoded_inputs: list[dict[str, Any]]) -> list[int]:
        """Loss tokens of each local sample."""
        lengths: list[int] = []
        for encoded in batch_encoded_inputs:
            batch = encoded['grpo_batch']
            mask = batch.completion_mask
            if self.overlong_filter:
                mask = mask & ~batch.truncated_mask.unsqueeze(-1)
            lengths += mask.sum(-1).tolist()
        return lengths


def tree_advantages(reports: Sequence[dict[str, Any]], rewards: Sequence[float], lengths: Sequence[int],
                    config: TreeConfig) -> list[float]:
    """Whitened advantages of a whole batch, one per trajectory.

    Failed trajectories are in no baseline and get 0. Arguments are in the same order, over all ranks: what
    ``rollout_infos['tree']`` says, the weighted reward, and the number of loss tokens.
    """
    healthy = [i for i, report in enumerate(reports) if report['stop'] != StopReason.FAILED.value]
    raw = estimate([[reports[i]['id'], *reports[i]['nodes']] for i in healthy], [rewards[i] for i in healthy],
                   estimator=config.estimator,
                   weighting=config.weighting,
                   reject_flat_subgroups=config.reject_flat_subgroups,
                   include_root=config.include_root,
                   count_chains=config.count_chains)
    advantages = [0.0] * len(reports)
    for i, value in zip(
            healthy, whiten(raw, [lengths[i] for i in healthy], shift_mean=config.whiten_shift_mean), strict=True):
        advantages[i] = value
    return advantages


__all__ = ['TreeGRPOConfig', 'TreeGRPOTrainer', 'WeightSyncError', 'tree_advantages']
