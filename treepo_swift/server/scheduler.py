"""`TreeRolloutScheduler`: trees inside ``swift rollout``, with the hooks that users override."""

from __future__ import annotations

import asyncio
import copy
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rollout import MultiTurnScheduler
from swift.rollout.multi_turn import GYMScheduler
from swift.utils import get_logger
from tqdm import tqdm

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.forks import check_policies
from treepo_swift.core.messages import Limits
from treepo_swift.core.policies.stopping import TextChecker, text_verdict
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Path, StopReason
from treepo_swift.wire.note import REQUEST_KEY, RequestNote
from treepo_swift.wire.packing import PackedOutputs
from treepo_swift.wire.report import BatchReport

from .admission import KV_SHARE, Admission, Forecast
from .conversation import TURN_HOOKS, Conversation, overridden_hooks
from .engine import Prompt, SegmentEngine, check_request_config
from .environment import ForkingState
from .grouping import Group, group_requests, prompt_key
from .grower import CpuClock, TreeGrower
from .hooks import HookError, HookRunner
from .migrating import check_hooks, refuse_moved
from .outputs import OutputWriter, PlainOutputs, RolloutError, RolloutFailure
from .tasks import Rendezvous, all_or_cancel, calm_garbage_collection
from .text import PathReader
from .vllm_engine import VllmSegmentEngine

logger = get_logger()

SWIFT_PLACEHOLDER = [{'role': 'user', 'content': '<placeholder>'}]
"""What swift sends to a server that has no requests this time, to ignore the answer."""


@dataclass(slots=True)
class _Planted:
    """One tree of a batch: its requests' positions, its prompt and its search."""

    group: Group
    request: RolloutInferRequest
    note: RequestNote
    prompt: Prompt
    search: TreeSearch
    talk: Conversation | None
    """None where no hook is to be asked about turns."""

    @property
    def meets_others(self) -> bool:
        return self.search.config.budget.policy == 'by_segment_tokens'


def plain_config(config: TreeConfig, max_response: int) -> TreeConfig:
    """The same for plain sampling: one request to the end, no early stop."""
    return TreeConfig(
        segment_length=max_response,
        max_depth=1,
        stop={'answer': 'none', 'repetition': 'none'},
        fork_state=config.fork_state,
        faults=config.faults,
        seed=config.seed,
    )


def _where(search: TreeSearch, path: Path) -> str:
    return f'on segment {path.leaf.depth} of path {path.id} of tree {search.tree.id}'


class TreeRolloutScheduler(ForkingState, MultiTurnScheduler):
    """Grows the answers to a prompt as one tree (TreePO, arXiv 2508.17445).

    A subclass with a `step` takes several turns, by the rules of ms-swift's `MultiTurnScheduler`: where a turn has
    ended, `on_turn_end` and `check_finished` are asked whether it was the last, and `step` appends what the
    environment says. A scheduler of swift becomes a tree by its base class::

        class TipsTree(TreeRolloutScheduler, MathTipsScheduler):
            pass

    Hooks get copies that are theirs: another path may take another turn from the same place. What a scheduler keeps
    for a trajectory under ``infer_request.uuid`` therefore has to fork too, see `ForkingState`.
    """

    grows_trees = True
    """How the trainer's arguments tell a tree scheduler from others, by its name in swift's registry."""
    by_segment = False
    """Ask the engine segment by segment, as the paper's code does: the same trees, only slower. For benchmarks."""

    def __init__(
        self,
        infer_engine: Any = None,
        max_turns: int | None = None,
        *args: Any,
        segment_engine: SegmentEngine | None = None,
        **kwargs: Any,
    ) -> None:
        """swift passes `infer_engine`; give a `segment_engine` instead to run on an engine of your own."""
        check_hooks(type(self))
        super().__init__(infer_engine, max_turns, *args, **kwargs)
        if kwargs.get('use_gym_env') and not isinstance(self, GYMScheduler):
            raise ConfigError(
                f'--use_gym_env true: {type(self).__name__} plays no environment. Use '
                '--multi_turn_scheduler treepo_gym, or a subclass of treepo_swift.server.gym.TreeGymScheduler.'
            )
        if type(self).run is not MultiTurnScheduler.run:
            raise NotImplementedError(
                f'{type(self).__name__}.run: trees take many paths at once and would never call '
                'it. Override `step` and `check_finished` instead.'
            )
        self._default = TreeConfig.load()
        self.config = self._default
        self._engine = VllmSegmentEngine(infer_engine) if segment_engine is None and infer_engine else segment_engine
        self._hooks = HookRunner()
        self._asked = overridden_hooks(self, TreeRolloutScheduler)
        self._reader: PathReader | None = None
        self._warned: set[str] = set()
        self._clock = CpuClock()
        self._forecast = Forecast()
        self._talks: list[Conversation] = []
        """Of the rollout that runs."""

    # Override these. They may be plain or async functions; a plain one runs in a thread of its own. With them come
    # `step`, `on_trajectory_start` (once a tree) and `on_turn_end` of the base class, `fork_state` and `release_state`.

    def check_segment(self, path: Path, text: str) -> StopReason | None:
        """Called at every segment boundary: return a reason (`StopReason.HOOK` is yours) to end the turn there.

        Args:
            path: the growing path; ``path.leaf.lineage()`` are its segments.
            text: what its turn says so far.
        """
        checker = TextChecker(self.config)
        return text_verdict(checker.feed(checker.start(), text), path, self.config)

    def check_finished(
        self, infer_request: RolloutInferRequest, response_choice: ChatCompletionResponseChoice, current_turn: int
    ) -> bool:
        """Called when a turn has ended, with the meaning that it has in ms-swift. Without a `step` there is one turn.

        A turn that `check_segment` ended has the finish reason ``stop``; ``length`` stands for a real limit.
        """
        if 'step' not in self._asked:
            return True
        return super().check_finished(infer_request, response_choice, current_turn)

    # Machinery below.

    async def async_infer(
        self,
        infer_requests: list[RolloutInferRequest | dict[str, Any]],
        request_config: RequestConfig | dict[str, Any],
        *,
        use_tqdm: bool | None = None,
    ) -> list[RolloutOutput] | PackedOutputs | RolloutFailure:
        """swift's server calls this with all requests of a step. See `rollout`; failures become `RolloutFailure`."""
        try:
            with calm_garbage_collection():
                return await self.rollout(infer_requests, request_config, use_tqdm=use_tqdm)
        except Exception as e:
            logger.error(f'treepo: the rollout failed.\n{traceback.format_exc()}')
            return RolloutFailure(f'{type(e).__name__}: {e}')

    async def rollout(
        self,
        infer_requests: Sequence[RolloutInferRequest | dict[str, Any]],
        request_config: RequestConfig | dict[str, Any],
        *,
        use_tqdm: bool | None = None,
    ) -> list[RolloutOutput] | PackedOutputs:
        """One output per request, in request order, each with its own request's id; packed where the trainer asks so.

        Raises:
            RolloutError: too many trajectories failed, or the trainer runs without the plugin.
            ConfigError: a setting is unknown or does not fit the engine.
        """
        started = time.perf_counter()
        self._clock, self._talks = CpuClock(), []
        if self._engine is None:
            raise RolloutError(
                'TreeRolloutScheduler has no engine: trees need `--vllm_mode server` and `swift rollout`.'
            )
        if isinstance(request_config, dict):
            request_config = RequestConfig(**request_config)
        check_request_config(request_config)
        with self._clock:
            requests = [RolloutInferRequest(**r) if isinstance(r, dict) else copy.copy(r) for r in infer_requests]
            notes = [self._take_note(request) for request in requests]
        if not requests:
            return []
        if notes[0].mode == 'probe':
            return [await self._probe(request, note) for request, note in zip(requests, notes, strict=True)]
        with self._clock:
            # A batch has one trainer, hence one config: the trainer's, if it sent one.
            self.config = notes[0].tree_config(self._default)
            groups = self._group(requests, notes)
            if notes[0].mode == 'tree':
                self._check_config(self.config)
                self._check_budget(groups)
        by_entropy = self.config.branching.policy == 'entropy' and notes[0].mode == 'tree'
        await self._engine.begin_batch(request_config, top_logprobs=self.config.branching.top_k if by_entropy else 0)
        self._reader = PathReader(self._engine.decode, TextChecker(self.config), self._engine.stop_strings)
        counted = self._engine.counters()
        outputs = PackedOutputs() if notes[0].packed else PlainOutputs()
        shown = len(requests) > 1 if use_tqdm is None else use_tqdm
        try:
            trees = await asyncio.gather(*(self._plant(group, requests, notes, request_config) for group in groups))
            with tqdm(total=len(requests), desc='trajectories', dynamic_ncols=True, disable=not shown) as bar:
                failures = await self._grow(trees, requests, outputs, request_config.seed is not None, bar.update)
        finally:
            await self._release_states(self._talks)
        self._check_failures(failures, len(requests))
        if notes[0].mode == 'tree':
            now = self._engine.counters()
            outputs.batch = BatchReport(
                seconds=time.perf_counter() - started,
                scheduler_cpu_seconds=self._clock.seconds,
                engine=None if counted is None or now is None else now.since(counted),
            )
        return outputs if isinstance(outputs, PackedOutputs) else outputs.in_order()

    def _take_note(self, request: RolloutInferRequest) -> RequestNote:
        """Remove the trainer's note from the request; what is left of `data_dict` is the dataset's."""
        request.data_dict = dict(request.data_dict or {})
        values = request.data_dict.pop(REQUEST_KEY, None)
        if values is not None:
            return RequestNote.from_dict(values)
        if request.messages == SWIFT_PLACEHOLDER:
            return RequestNote(mode='independent')
        if self._default.checks.require_trainer:
            raise RolloutError(
                'This rollout server grows trees, but the request was not sent by TreeGRPOTrainer: the trainer runs '
                'without the plugin and would train on trees with flat advantages. Add the same --external_plugins '
                'file to `swift rlhf` (`treepo-swift plugin` prints its path), or set '
                'TREEPO_CHECKS__REQUIRE_TRAINER=false on the server if that is what you want.'
            )
        return RequestNote()

    def _check_config(self, config: TreeConfig) -> None:
        info = self._engine.info
        config.check_fits(info.max_model_len, '--vllm_max_model_len')
        check_policies(config)
        TextChecker(config)
        if config.fork_at == 'turn' and config.pacing == 'even' and not self.max_turns:
            raise ConfigError(
                "pacing='even' with fork_at='turn': forks are spread over the turns, whose number "
                'nobody gave. Start `swift rollout` with --max_turns, or set pacing to {turn: width}.'
            )
        if config.branching.policy == 'entropy' and config.branching.top_k > info.max_logprobs:
            raise ConfigError(
                f'branching.top_k={config.branching.top_k}: this server returns at most {info.max_logprobs} '
                'log-probs per token. Lower it, or start `swift rollout` with --vllm_engine_kwargs '
                '\'{"max_logprobs": ...}\'.'
            )
        if config.segment_length % info.block_size:
            self._warn_once(
                f"segment_length={config.segment_length} is not a multiple of the engine's KV block of "
                f'{info.block_size} tokens: every fork computes the tokens of its last, partial block again. '
                'Set segment_length to a multiple of it, or --vllm_engine_kwargs \'{"block_size": ...}\' to a divisor.'
            )

    def _check_budget(self, groups: Sequence[Group]) -> None:
        trees = sum(len(group.members) > 1 for group in groups)
        needed = trees * self.config.segment_length
        budget = self.config.budget
        if budget.policy == 'by_segment_tokens' and budget.tokens < needed:
            raise ConfigError(
                f'budget.tokens={budget.tokens}: {trees} prompts of a batch need at least a '
                f'segment of {self.config.segment_length} tokens each, {needed} in all.'
            )

    def _group(self, requests: Sequence[RolloutInferRequest], notes: Sequence[RequestNote]) -> list[Group]:
        keys = [
            prompt_key(
                messages=r.messages,
                images=r.images,
                audios=r.audios,
                videos=r.videos,
                tools=r.tools,
                objects=r.objects,
                template=r.chat_template_kwargs,
                data=r.data_dict,
            )
            for r in requests
        ]
        sizes = [1 if note.mode == 'independent' else note.num_generations for note in notes]
        groups = group_requests(keys, sizes)
        if any(sizes[g.members[0]] not in (None, len(g.members)) for g in groups):
            self._warn_once(
                "A prompt's requests were split between servers: its tree becomes several smaller ones. "
                'Make prompts per step a multiple of the number of servers.'
            )
        return groups

    async def _plant(
        self,
        group: Group,
        requests: Sequence[RolloutInferRequest],
        notes: Sequence[RequestNote],
        request_config: RequestConfig,
    ) -> _Planted:
        request, note = requests[group.members[0]], notes[group.members[0]]
        config, info = self.config, self._engine.info
        max_response = request_config.max_tokens or info.max_model_len
        if note.mode == 'independent' and note.config is not None:
            max_response = min(max_response, config.max_response_tokens)  # as long as a path in training
        if len(group.members) == 1:
            # Plain sampling: one request to the end, no early stop.
            config = plain_config(config, max_response)
        rng = random.Random(f'{config.seed}:{request_config.seed}:{note.step}:{group.copy}:{group.key}')
        search = TreeSearch(
            config,
            tree_id=request.uuid or f'tree-{group.members[0]}',
            prompt_ids=[],
            width=len(group.members),
            limits=Limits(max_response, info.max_model_len, self.max_turns),
            rng=rng,
            progress=note.progress,
            by_segment=self.by_segment,
        )
        talk = None if request.messages == SWIFT_PLACEHOLDER else self._talk(search)
        prompt = Prompt([], {})
        try:
            prompt = await (talk.begin(request) if talk else self._engine.encode(request))
            search.set_prompt(prompt.token_ids)
        except HookError as e:
            search.give_up(str(e))
        except Exception as e:
            search.give_up(f'the prompt could not be encoded: {type(e).__name__}: {e}')
        return _Planted(group, request, note, prompt, search, talk)

    def _talk(self, search: TreeSearch) -> Conversation | None:
        if not self._asked & {*TURN_HOOKS}:
            return None
        talk = Conversation(
            self,
            self._asked,
            search,
            engine=self._engine,
            hooks=self._hooks,
            config=self.config,
            prefix=lambda request: self._writer.prefix(request)[0],
        )
        self._talks.append(talk)
        return talk

    async def _release_states(self, talks: list[Conversation]) -> None:
        """What goes wrong here is told, and hurts nobody any more."""
        for talk in talks:
            for error in await talk.release():
                self._warn_once(f'{type(error).__name__}: {error}')

    async def _grow(
        self,
        trees: list[_Planted],
        requests: Sequence[RolloutInferRequest],
        outputs: PlainOutputs | PackedOutputs,
        seeded: bool,
        progress: Callable[[int], Any],
    ) -> Counter[str]:
        """Drive all trees of a batch to their ends, and write what they give; returns what failed, and how often."""
        meeting = Rendezvous(sum(tree.meets_others for tree in trees))
        admission = Admission(ranks=self._engine.info.ranks, kv_tokens=self._engine.info.kv_tokens)
        failures: Counter[str] = Counter()
        writer = self._writer

        async def grow(tree: _Planted) -> None:
            grower = TreeGrower(
                tree.search,
                tree.prompt,
                engine=self._engine,
                reader=self._reader,
                check=partial(self._check, tree.search),
                end_turn=tree.talk and tree.talk.end_turn,
                clock=self._clock,
                seeded=seeded,
                warn=self._warn_once,
                progress=progress,
            )
            async with admission.place(partial(self._expected_tokens, tree)) as place:
                await grower.run(place, meeting if tree.meets_others else None)
            await self._release_states([tree.talk] if tree.talk else [])
            with self._clock:
                failures.update(p.error for p in tree.search.tree.trajectories if p.stop is StopReason.FAILED)
                members = tree.group.members
                outputs.add(
                    members,
                    writer.tree(
                        [requests[position] for position in members],
                        tree.prompt,
                        tree.search.tree,
                        with_report=tree.note.mode == 'tree',
                    ),
                )
                self._learn(tree)

        growing = list(map(grow, trees))
        # A tree's tokens are let go when its outputs are written.
        trees.clear()
        await all_or_cancel(growing)
        return failures

    def _learn(self, tree: _Planted) -> None:
        stats, width = tree.search.tree.stats, tree.search.width
        if width > 1:
            self._forecast.learn(stats.decoded_tokens)

    def _expected_tokens(self, tree: _Planted) -> int:
        """KV tokens to set aside for a tree; 0 where it must not wait for others to end."""
        if tree.search.width == 1 or tree.meets_others:
            return 0
        # Before any tree is done: answers of half the length that they may have.
        longest = min(tree.search.limits.max_response, self.config.max_response_tokens)
        decoded = self._forecast.decoded_tokens(unknown=tree.search.width * longest // 2)
        return len(tree.prompt.token_ids) + round(KV_SHARE * decoded)

    def _check(self, search: TreeSearch, path: Path) -> StopReason | None | Awaitable[StopReason | None]:
        """What the text of a path says, by the user's `check_segment` or else by the config's checks."""
        if search.width == 1:
            return None
        if type(self).check_segment is TreeRolloutScheduler.check_segment:
            return self._text_verdict(path)
        return self._ask_segment(search, path, self._reader.text(path.leaf))

    async def _ask_segment(self, search: TreeSearch, path: Path, text: str) -> StopReason | None:
        where = _where(search, path)
        verdict = await self._hooks.call(
            self.check_segment, path, text, timeout=self.config.faults.hook_timeout, where=where
        )
        if verdict is not None and not isinstance(verdict, StopReason):
            raise HookError(
                f'{type(self).__name__}.check_segment {where}: returned {verdict!r}, allowed are a StopReason or None'
            )
        return verdict

    def _text_verdict(self, path: Path) -> StopReason | None:
        try:
            return text_verdict(self._reader.state(path.leaf), path, self.config)
        except Exception as e:  # an answer detector may be a user's
            raise HookError(
                f'stop.answer.detector={self.config.stop.answer.detector!r}: raised {type(e).__name__}: {e}'
            ) from e

    def _check_failures(self, failures: Counter[str], total: int) -> None:
        allowed = self.config.faults.max_failure_fraction
        if failures.total() > allowed * total:
            causes = '\n'.join(f'  {count} x {error}' for error, count in failures.most_common(3))
            raise RolloutError(
                f'{failures.total()} of {total} trajectories failed, more than '
                f'faults.max_failure_fraction={allowed:g}. Most common causes:\n{causes}'
            )

    async def _probe(self, request: RolloutInferRequest, note: RequestNote) -> RolloutOutput:
        if note.config is not None:
            self._check_config(note.tree_config(self._default))
        return self._writer.probe(request, await self._engine.score(note.token_ids) if note.token_ids else None)

    @property
    def _writer(self) -> OutputWriter:
        eos = self.tokenizer.eos_token_id
        return OutputWriter(self._engine, self.get_response_token_data, 0 if eos is None else eos)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(f'treepo: {message}')

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_moved(type(self), name)
        super().__setattr__(name, value)

    def __getattr__(self, key: str) -> Any:
        # swift's base class answers None for names that do not exist, which turns typos into silence.
        value = super().__getattr__(key)
        if value is None:
            raise AttributeError(f'{type(self).__name__} object has no attribute {key!r}')
        return value
