"""`TreesMixin`: what swift's trainers do with trees, whether they run on transformers or on Megatron."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.utils import get_logger

from treepo_swift.advantage import is_segment_level
from treepo_swift.advantage.batch import SegmentAdvantages, tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.wire.note import REQUEST_KEY, RequestNote
from treepo_swift.wire.packing import accept_packed
from treepo_swift.wire.report import FAILURE_KEY, REPORT_KEY, TreeReport

from .dealing import TreeServers
from .metrics import EvaluationFailures, RolloutRound, tree_metrics
from .ranks import Ranks
from .rewards import find_reward_fault, set_missing_gym_rewards, settle_placeholders
from .rollout import RankRollout, plant_in_process, rollout_note, together
from .servers import keep_alive
from .tree_writer import TreeWriter

if TYPE_CHECKING:
    from swift.rlhf_trainers import GRPOTrainer as _Trainer

    from .arguments import TreeArguments
    from .rollout import ColocateTrees
else:
    _Trainer = object

T = TypeVar('T')
logger = get_logger()

CONFIG_FILE = 'treepo_config.yaml'
NO_TREES = (
    'treepo: nothing grows trees here, so this run is plain GRPO. For trees, start `swift rollout` with the plugin and '
    '--multi_turn_scheduler treepo; in colocate mode give --multi_turn_scheduler treepo to this command.'
)


def train_on_samples_only(template: Any) -> None:
    """Keep the loss mask that came with a rollout.

    swift trains on a template's end-of-turn tokens wherever they follow a trained one, also where nobody sampled them:
    behind a turn that reached its limit, or where an agent template writes them again before a tool's result.
    """
    template._add_dynamic_eos = lambda *args: None


class TreesMixin(_Trainer):
    """Goes before a GRPO trainer of swift. A run without trees is left alone.

    A trainer says how its ranks talk and whether it trains, and calls what is here from swift's methods.
    """

    tree_config: TreeConfig
    grows_trees = False
    trees_here: ColocateTrees | None = None
    """The trees of this process's engine; None in server mode, and in a run without trees."""
    _servers: TreeServers | None = None
    """On the main process in server mode only."""
    _tree_writer: TreeWriter | None = None
    """Where ``--log_completions true`` keeps this rank's trees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rounds: list[RolloutRound] = []
        """Since the last advantages; several with ``--dynamic_sample``."""
        self._evaluation_failures = EvaluationFailures()
        self._segment_advantages: list[SegmentAdvantages] | None = None
        """What advantages leave for the batches, of each local sample; None where swift spreads them itself."""
        super().__init__(*args, **kwargs)

    # What a trainer says of itself.

    def _ranks(self) -> Ranks:
        raise NotImplementedError

    def _is_training(self) -> bool:
        raise NotImplementedError

    def _tokenizer(self) -> Any:
        return self.processing_class

    def _evaluates(self) -> bool:
        """Whether the next rollout is for an evaluation."""
        return not self._is_training()

    # Set-up.

    def _broadcast(self, function: Callable[[], T]) -> T:
        return self._ranks().broadcast(function)

    def _gather_lists(self, values: list[Any]) -> list[Any]:
        return self._ranks().gather(values)

    def _set_up_trees(self, asked: TreeArguments) -> None:
        """After swift has made its engine or met the servers; `grows_trees` is known."""
        if not self.grows_trees:
            logger.warning(NO_TREES)
            return
        train_on_samples_only(self.template)
        self.tree_config = self._broadcast(lambda: asked.tree_config)
        if asked.tree_scheduler is not None:
            self._plant_here(asked)
        elif self._ranks().is_main:
            self._meet_servers(asked)
        self._keep_config()
        self._tree_writer = self._new_tree_writer()

    def _meet_servers(self, asked: TreeArguments) -> None:
        client = self.vllm_client
        keep_alive(client.sessions)
        accept_packed(client.sessions)
        ranks = [engine.get('ranks', 1) for _, engine in asked.tree_engines]
        self._servers = TreeServers(client, dict(zip(client.base_urls, ranks, strict=True)))
        client.infer = self._servers.infer

    def _plant_here(self, asked: TreeArguments) -> None:
        """After swift has made the engine. Every rank has one; all raise, or none."""
        self.trees_here = together(
            lambda: plant_in_process(self.engine, asked.tree_scheduler, self.tree_config, asked), self._gather_lists
        )

    def _new_tree_writer(self) -> TreeWriter | None:
        config, ranks = self.tree_config, self._ranks()
        if not self.args.log_completions or not config.trace.rate:
            return None
        folder = Path(self.args.output_dir)
        writer = TreeWriter(folder, self._tokenizer(), config, rank=ranks.index, warn=logger.warning)
        if ranks.is_main:
            logger.info(f'treepo: trees are written to {writer.path.parent}; `treepo-swift view {folder}` shows them.')
        return writer

    def _keep_config(self) -> None:
        config, directory = self.tree_config, Path(self.args.output_dir)
        if self._ranks().is_main:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / CONFIG_FILE).write_text(config.to_yaml())
            except OSError as e:
                # A full disk ends a run where swift saves a checkpoint, on all ranks; not here, on one of them.
                logger.warning(
                    f'treepo: {directory / CONFIG_FILE} could not be written ({e}); the run goes on without it.'
                )
        # swift's loggers speak on the first rank of a machine, which need not be the main one.
        logger.info(f'treepo: the whole tree config is in {directory / CONFIG_FILE}.')
        logger.info(
            f'treepo: advantages by estimator={config.advantage.estimator!r} and normalisation='
            f'{config.advantage.normalisation!r}; --scale_rewards applies to samples without a tree only.'
        )

    # swift 4.6.0 takes every run without a teacher for self-distillation, which it can be by a dataset column, and so
    # refuses --loss_type real and fipo and --off_policy_sequence_mask_delta always.

    def _setup_teacher(self) -> None:
        super()._setup_teacher()
        if self.grows_trees and self._is_dynamic_self_distillation and self._needs_trajectory_advantages():
            self._has_teacher = False

    def _needs_trajectory_advantages(self) -> bool:
        return self.loss_type in ('real', 'fipo') or self.off_policy_sequence_mask_delta is not None

    def _refuse_teachers(self, batches: Sequence[Any]) -> None:
        """What `_setup_teacher` has let through, and a dataset column has brought back."""
        if self._needs_trajectory_advantages() and any(b.teacher_per_token_logps is not None for b in batches):
            raise ValueError(
                'The dataset has teacher prompts, which go together neither with --loss_type real and '
                'fipo nor with --off_policy_sequence_mask_delta.'
            )

    # Requests.

    def samples2requests(self, samples: list[Any]) -> list[RolloutInferRequest]:
        requests = super().samples2requests(samples)
        if self.grows_trees:
            note = self._request_note().to_dict()
            for request in requests:
                request.data_dict = {**(request.data_dict or {}), REQUEST_KEY: note}
        return requests

    def _request_note(self) -> RequestNote:
        evaluates = self._evaluates()
        note = rollout_note(
            self.tree_config,
            width=self.num_generations_eval if evaluates else self.num_generations,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            evaluates=evaluates,
            packed=self.trees_here is None,
        )
        return dataclasses.replace(note, trace=self._tree_writer is not None and note.mode == 'tree')

    def _rollout_here(self, requests: Sequence[RolloutInferRequest], request_config: RequestConfig) -> list[Any]:
        """The outputs of this rank's requests, from the engines of all ranks."""
        assert self.trees_here is not None
        ranks = RankRollout(self.trees_here, rank=self._ranks().index, gather=self._gather_lists)
        return ranks.outputs(requests, self._request_note().group_size, request_config)

    # Rewards.

    def _fill_gym_rewards(self, samples: Sequence[Any]) -> None:
        if self.use_gym_env and self.grows_trees:
            set_missing_gym_rewards([sample.rollout_infos for sample in samples])

    def _settle_rewards(self, samples: Sequence[Any], rewards: torch.Tensor) -> torch.Tensor:
        """Rewards of one rollout over all ranks [N, functions], checked; remembers the rollout for the metrics.

        `samples` are this rank's. Raises ``ValueError`` for a reward that is no number, on all ranks.
        """
        reports = self._gather_reports(samples)
        if reports is None:
            if self.grows_trees:
                errors = self._gather_lists([(s.rollout_infos or {}).get(FAILURE_KEY) for s in samples])
                self._evaluation_failures.add(errors)
            return rewards
        fault = find_reward_fault(rewards, self.reward_weights, self.reward_func_names, reports)
        if fault is not None:
            index, what = fault
            sample = self._gather_lists([(s.request_id, s.messages[:-1]) for s in samples])[index]
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
        values = self._gather_lists([(s.rollout_infos or {}).get(REPORT_KEY) for s in samples])
        missing = values.count(None)
        if missing == len(values) and not self._is_training():
            return None
        if missing:
            raise RuntimeError(f'{missing} of {len(values)} samples of a batch came without a tree.')
        reports = [TreeReport.from_dict(value) for value in values]
        if self._is_training():
            check_whole(reports, self.num_generations)
        return reports

    def _weigh(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        return (rewards_per_func * self.reward_weights.unsqueeze(0)).nansum(dim=1)

    # Advantages.

    def _estimate(
        self,
        samples: Sequence[Any],
        reports: Sequence[TreeReport],
        rewards: torch.Tensor,
        kept: Sequence[int],
        rewards_per_func: torch.Tensor,
    ) -> list[float]:
        """Advantages of all samples over all ranks [N]; of segment-level ones, each trajectory's mean.

        `samples` are this rank's; the others are of all ranks: reports, total rewards [N], whether (not 0) a
        trajectory has tokens in the loss, and rewards [N, functions]. What is different for each segment stays in
        `_segment_advantages`.
        """
        advantages = tree_advantages(reports, rewards.tolist(), kept, self.tree_config)
        if self._tree_writer is not None:
            training = self._is_training()
            self._tree_writer.add(
                samples,
                reports,
                rewards=rewards.tolist(),
                rewards_per_function=rewards_per_func.tolist(),
                names=self.reward_func_names,
                advantages=advantages,
                step=self.state.global_step + training,
                mode='train' if training else 'eval',
            )
        if is_segment_level(self.tree_config.advantage.estimator):
            begin = sum(self._gather_lists([len(samples)])[: self._ranks().index])
            self._segment_advantages = advantages[begin : begin + len(samples)]
        return [a.mean for a in advantages]

    def _log_trees(self) -> None:
        rounds, self._rounds = self._rounds, []
        mode = 'train' if self._is_training() else 'eval'
        for key, value in tree_metrics(rounds).items():
            self._metrics[mode][key].append(value)

    def _take_evaluation_failures(self) -> EvaluationFailures:
        """Those of the evaluation that has ended; a warning tells of them."""
        failures, self._evaluation_failures = self._evaluation_failures, EvaluationFailures()
        if failures.errors:
            logger.warning(f'treepo: {failures.describe()}')
        return failures


def check_whole(reports: Sequence[TreeReport], width: int) -> None:
    """Raise unless every tree has `width` trajectories. In the last batch of an evaluation one may have fewer."""
    for tree, leaves in Counter(report.id for report in reports).items():
        if leaves != width:
            raise RuntimeError(
                f'Tree {tree} came back with {leaves} trajectories, not --num_generations {width}, and would have '
                'a baseline of its own. A step has whole groups; does something before the rollout change or drop '
                'single samples of a prompt?'
            )


def check_loss_tokens(reports: Sequence[TreeReport], lengths: Sequence[int]) -> None:
    """Raise unless every trajectory has as many loss tokens (`lengths`) as its nodes were sampled with."""
    for report, length in zip(reports, lengths, strict=True):
        sampled = report.loss_tokens
        if sampled != length:
            raise RuntimeError(
                f'A trajectory of tree {report.id} has {length} loss tokens in the trainer, but '
                f'its nodes {report.nodes} were sampled with {sampled}: advantages would land on '
                'the wrong tokens. Do trainer and server use the same template and tokenizer?'
            )


def check_rollout_logprobs(mode: str | None, missing: Sequence[bool]) -> None:
    """Raise where ``--rollout_importance_sampling_mode`` needs log-probs that a batch has not."""
    if mode is not None and any(missing):
        raise RuntimeError(
            '--rollout_importance_sampling_mode: log-probs of the rollout are missing or do not fit '
            'its tokens, and swift would leave the correction out without a word.'
        )
