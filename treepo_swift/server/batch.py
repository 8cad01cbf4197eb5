"""One batch: its requests are grouped, a tree is planted for each group, grown, and written."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from tqdm import tqdm

from treepo_swift.config import TreeConfig
from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.messages import Limits
from treepo_swift.core.policies.stopping import TextChecker
from treepo_swift.core.search import TreeSearch
from treepo_swift.wire.groups import Group, group_requests, prompt_key, prompt_text
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.packing import PackedOutputs
from treepo_swift.wire.report import BatchReport, EngineCounters
from treepo_swift.wire.trace import is_traced

from .admission import KV_SHARE, Admission, Forecast
from .concurrency import BackgroundTasks, Rendezvous, all_or_cancel, task_group
from .config_checks import check_budget, check_config
from .conversation import Conversation
from .engine import Prompt, SegmentEngine
from .environment import EnvironmentStates
from .failures import FailurePolicy
from .grouping import SWIFT_PLACEHOLDER
from .grower import CpuClock, Services, TreeGrower
from .hooks import HookRunner
from .outputs import OutputWriter, PlainOutputs
from .segment_check import SegmentCheck
from .text import PathReader
from .turn_hooks import TURN_HOOKS, TurnHooks
from .user import UserScheduler


@dataclass(frozen=True, slots=True)
class Server:
    """What outlives a batch: the scheduler with the user's hooks, its engine, and what was learned."""

    scheduler: UserScheduler
    overridden: frozenset[str]
    """Hooks about turns and states that the user has of their own."""
    checks_segments: bool
    """Whether `check_segment` is the user's own."""
    engine: SegmentEngine
    hooks: HookRunner
    forecast: Forecast
    writer: OutputWriter
    warn: Callable[[str], None]
    warn_once: Callable[[str, str], None]
    """Takes the kind of a warning, which is given once, and its text."""
    watches_engine: bool
    """Whether batches look for an engine that hangs; not where a `Watchdog` does."""


@dataclass(slots=True)
class PlantedTree:
    """One tree of a batch: which requests it answers, its prompt and its search."""

    group: Group
    prompt: Prompt
    search: TreeSearch
    conversation: Conversation | None
    """None where no hook is to be asked about turns."""

    @property
    def meets_others(self) -> bool:
        """Whether trees share a budget, and wait for each other at each depth."""
        return self.search.config.budget.policy == 'by_segment_tokens'


def plain_config(config: TreeConfig, max_response: int) -> TreeConfig:
    """The same for plain sampling: one request to the end, no early stop, and nothing to fall back to but the root."""
    return TreeConfig(
        segment_length=max_response,
        max_depth=1,
        fallback='root',
        stop={'answer': 'none', 'repetition': 'none'},
        fork_state=config.fork_state,
        faults=config.faults,
        seed=config.seed,
    )


class RolloutBatch:
    """Grows the trees of one call. When `run` returns, or raises, nothing of the batch is alive."""

    def __init__(
        self,
        server: Server,
        config: TreeConfig,
        requests: Sequence[RolloutInferRequest],
        notes: Sequence[RequestNote],
        request_config: RequestConfig,
        clock: CpuClock,
    ) -> None:
        self._server = server
        self._engine = server.engine
        self._config = config
        self._requests = requests
        self._notes = notes
        self._request_config = request_config
        self._clock = clock
        self._mode = notes[0].mode
        self._outputs = PackedOutputs() if notes[0].packed else PlainOutputs()
        self._failures = FailurePolicy(
            config.faults,
            engine=server.engine,
            hooks=server.hooks,
            warn_once=server.warn_once,
            watches_engine=server.watches_engine,
        )
        self._tree_ids: set[str] = set()
        self._conversations: set[Conversation] = set()
        """Of trees whose environments may be alive."""
        self._releases = BackgroundTasks()

    async def run(self, started: float, *, show_progress: bool) -> list[RolloutOutput] | PackedOutputs:
        """Outputs in request order; packed where the trainer asks so. `started` is when the call came."""
        with self._clock:
            groups = self._group()
            self._check_config(groups)
        await self._begin_engine()
        counted = self._engine.counters()
        try:
            trees = await self._plant_all(groups)
            with tqdm(
                total=len(self._requests), desc='trajectories', dynamic_ncols=True, disable=not show_progress
            ) as bar:
                async with self._failures.watching():
                    await self._grow_all(trees, bar.update)
        finally:
            for conversation in self._conversations:
                conversation.states.release_all()
            await self._releases.finish()
            if summary := self._failures.summary():
                self._server.warn(summary)
        self._failures.check(len(self._requests))
        return self._finished(started, counted)

    # Requests become groups.

    def _group(self) -> list[Group]:
        keys = [prompt_key(request) for request in self._requests]
        sizes = [note.group_size for note in self._notes]
        groups = group_requests(keys, sizes)
        if any(sizes[g.members[0]] not in (None, len(g.members)) for g in groups):
            self._server.warn_once(
                'split groups',
                "Some of a prompt's requests are missing: its tree is smaller than --num_generations. That is so in "
                'the last batch of an evaluation; a training stops.',
            )
        return groups

    def _check_config(self, groups: Sequence[Group]) -> None:
        if self._mode == 'tree':
            max_turns = self._server.scheduler.max_turns
            check_config(self._config, self._engine.info, max_turns, self._server.warn_once)
            check_budget(self._config, groups)

    async def _begin_engine(self) -> None:
        asked = self._config.entropy_logprobs if self._mode == 'tree' else {}
        top_logprobs = max(asked.values(), default=0)
        await self._engine.begin_batch(
            self._request_config, top_logprobs=top_logprobs, encode_timeout=self._config.faults.hook_timeout
        )

    # Groups become planted trees.

    async def _plant_all(self, groups: Sequence[Group]) -> list[PlantedTree]:
        async with task_group() as tasks:
            planted = [tasks.create_task(self._plant(group)) for group in groups]
        return [task.result() for task in planted]

    async def _plant(self, group: Group) -> PlantedTree:
        request = self._requests[group.members[0]]
        search = self._new_search(group)
        conversation = None if request.messages == SWIFT_PLACEHOLDER else self._new_conversation(search)
        prompt = Prompt([], {})
        try:
            prompt = await (conversation.begin(request) if conversation else self._engine.encode(request))
            search.set_prompt(prompt.token_ids)
        except NodeFailure as e:
            self._failures.path_failed(e)
            search.give_up(str(e))
        except (Exception, SystemExit) as e:
            search.give_up(
                NodeFailure(
                    f'the prompt could not be encoded: {type(e).__name__}: {e}',
                    kind='the prompt could not be encoded',
                    remedy='Look at this sample of the dataset, and at what the template wants of it.',
                )
            )
        return PlantedTree(group, prompt, search, conversation)

    def _new_search(self, group: Group) -> TreeSearch:
        request, note = self._requests[group.members[0]], self._notes[group.members[0]]
        config, info = self._config, self._engine.info
        max_response = self._request_config.max_tokens or info.max_model_len
        if len(group.members) == 1:
            if note.config is not None:
                # As long as the paths of the trainer's trees.
                max_response = min(max_response, config.max_response_tokens)
            config = plain_config(config, max_response)
        copy = group.copy if note.copy is None else note.copy
        seed = f'{config.seed}:{self._request_config.seed}:{note.step}:{copy}:{prompt_text(request)}'
        return TreeSearch(
            config,
            tree_id=self._new_tree_id(request),
            prompt_ids=[],
            width=len(group.members),
            limits=Limits(max_response, info.max_model_len, self._server.scheduler.max_turns),
            rng=random.Random(seed),
            progress=note.progress,
            by_segment=self._server.scheduler.by_segment,
        )

    def _new_tree_id(self, request: RolloutInferRequest) -> str:
        """The request's own id. Where several have the same, or none, trees would share baselines and states."""
        tree_id = request.uuid or uuid.uuid4().hex
        while tree_id in self._tree_ids:
            tree_id = f'{request.uuid}-{uuid.uuid4().hex}'
        self._tree_ids.add(tree_id)
        return tree_id

    def _new_conversation(self, search: TreeSearch) -> Conversation | None:
        server = self._server
        if not server.overridden & {*TURN_HOOKS}:
            return None
        by_copy = self._config.fork_state == 'copy'
        hooks = TurnHooks(server.scheduler, server.overridden, server.hooks, self._config)
        conversation = Conversation(
            search,
            hooks=hooks,
            states=EnvironmentStates(
                hooks, search, by_copy=by_copy, background=self._releases, failed=self._failures.release_failed
            ),
            engine=self._engine,
            prefix=server.writer.prefix,
            keep_choices=not by_copy,
        )
        self._conversations.add(conversation)
        return conversation

    # Planted trees grow, and are written.

    async def _grow_all(self, trees: list[PlantedTree], progress: Callable[[int], Any]) -> None:
        meeting = Rendezvous(sum(tree.meets_others for tree in trees))
        admission = Admission(ranks=self._engine.info.ranks, kv_tokens=self._engine.info.kv_tokens)
        services = self._services(progress)
        growing = [self._grow(tree, services, admission, meeting if tree.meets_others else None) for tree in trees]
        # A tree's tokens are let go when its outputs are written.
        trees.clear()
        await all_or_cancel(growing)

    def _services(self, progress: Callable[[int], Any]) -> Services:
        server = self._server
        reader = PathReader(self._engine.decode, TextChecker(self._config), self._engine.stop_strings)
        return Services(
            engine=self._engine,
            reader=reader,
            check=SegmentCheck(server.scheduler, server.hooks, reader, self._config, asks_user=server.checks_segments),
            clock=self._clock,
            seeded=self._request_config.seed is not None,
            failures=self._failures,
            progress=progress,
        )

    async def _grow(
        self, tree: PlantedTree, services: Services, admission: Admission, meeting: Rendezvous | None
    ) -> None:
        grower = TreeGrower(tree.search, tree.prompt, tree.conversation, services)
        async with admission.admitted(partial(self._expected_tokens, tree)) as placement:
            await grower.run(placement, meeting)
        with self._clock:
            self._write(tree)
        if tree.conversation:
            tree.conversation.states.release_all()
            self._conversations.remove(tree.conversation)

    def _write(self, tree: PlantedTree) -> None:
        self._failures.tree_ended(tree.search)
        members = tree.group.members
        requests = [self._requests[position] for position in members]
        note, grown = self._notes[members[0]], tree.search.tree
        outputs = self._server.writer.tree(
            requests,
            tree.prompt,
            grown,
            with_report=note.mode == 'tree',
            with_trace=note.trace and is_traced(grown.id, self._config.trace.rate),
        )
        self._outputs.add(members, outputs)
        if tree.search.width > 1:
            self._server.forecast.learn(tree.search.tree.stats.decoded_tokens)

    def _expected_tokens(self, tree: PlantedTree) -> int:
        """KV tokens to set aside for a tree; 0 where it must not wait for others to end."""
        if tree.search.width == 1 or tree.meets_others:
            return 0
        # Before any tree is done: answers of half the length that they may have.
        longest = min(tree.search.limits.max_response, self._config.max_response_tokens)
        decoded = self._server.forecast.decoded_tokens(unknown=tree.search.width * longest // 2)
        return len(tree.prompt.token_ids) + round(KV_SHARE * decoded)

    def _finished(self, started: float, counted: EngineCounters | None) -> list[RolloutOutput] | PackedOutputs:
        if self._mode == 'tree':
            now = self._engine.counters()
            self._outputs.batch = BatchReport(
                seconds=time.perf_counter() - started,
                scheduler_cpu_seconds=self._clock.seconds,
                hung_hooks=self._server.hooks.hung.total(),
                engine=None if counted is None or now is None else now.since(counted),
            )
        return self._outputs if isinstance(self._outputs, PackedOutputs) else self._outputs.in_order()
