"""`TreeRolloutScheduler`: trees inside ``swift rollout``, with the hooks that users override."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Sequence
from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rollout import MultiTurnScheduler
from swift.rollout.multi_turn import GYMScheduler
from swift.utils import get_logger

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.inert import inert
from treepo_swift.core.policies.stopping import TextChecker, text_verdict
from treepo_swift.core.tree import Path, StopReason
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.packing import PackedOutputs

from .admission import Forecast
from .batch import RolloutBatch, Server
from .concurrency import calm_garbage_collection
from .config_checks import check_config
from .engine import SegmentEngine, check_request_config
from .environment import ForkingState
from .failures import RolloutError, described, score
from .grouping import SWIFT_PLACEHOLDER, read_requests
from .grower import CpuClock
from .hooks import HookRunner
from .migrating import check_hooks, refuse_moved
from .outputs import OutputWriter, RolloutFailure
from .turn_hooks import TURN_HOOKS, overridden_hooks
from .vllm_engine import VllmSegmentEngine

__all__ = ['SWIFT_PLACEHOLDER', 'RolloutError', 'RolloutFailure', 'TreeRolloutScheduler']

logger = get_logger()


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
    watches_engine = True
    """Whether batches look for an engine that hangs. In colocate mode a `Watchdog` does."""
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
        self.check_class(use_gym_env=bool(kwargs.get('use_gym_env')))
        super().__init__(infer_engine, max_turns, *args, **kwargs)
        self._default = TreeConfig.load()
        self.config = self._default
        self._engine = VllmSegmentEngine(infer_engine) if segment_engine is None and infer_engine else segment_engine
        self._hooks = HookRunner()
        self._overridden = overridden_hooks(type(self), TreeRolloutScheduler)
        self._forecast = Forecast()
        self._warned: set[str] = set()
        """Kinds of warnings that were given."""

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
        if 'step' not in self._overridden:
            return True
        return super().check_finished(infer_request, response_choice, current_turn)

    # Machinery below.

    @classmethod
    def check_class(cls, *, use_gym_env: bool) -> None:
        """Raise where trees can not call what this class overrides, or it is not made for gym environments."""
        check_hooks(cls)
        if use_gym_env and not issubclass(cls, GYMScheduler):
            raise ConfigError(
                f'--use_gym_env true: {cls.__name__} plays no environment. Use '
                '--multi_turn_scheduler treepo_gym, or a subclass of treepo_swift.server.gym.TreeGymScheduler.'
            )
        if cls.run is not MultiTurnScheduler.run:
            raise NotImplementedError(
                f'{cls.__name__}.run: trees take many paths at once and would never call '
                'it. Override `step` and `check_finished` instead.'
            )

    @classmethod
    def has_turns(cls) -> bool:
        """Whether hooks are asked about turns, which may read what the dataset says beside the prompt."""
        return not overridden_hooks(cls, TreeRolloutScheduler).isdisjoint(TURN_HOOKS)

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
        except BaseException as e:
            # Of what is no Exception swift's worker dies, and with it every later rollout.
            if isinstance(e, (KeyboardInterrupt, GeneratorExit)) or asyncio.current_task().cancelling():
                raise
            logger.error(inert(f'treepo: the rollout failed.\n{traceback.format_exc()}'))
            return RolloutFailure(described(e))

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
            HungHooksError: more hooks hang than `faults.max_hung_hooks`.
            ConfigError: a setting is unknown or does not fit the engine.
        """
        started, clock = time.perf_counter(), CpuClock()
        server = self._server()
        if isinstance(request_config, dict):
            request_config = RequestConfig(**request_config)
        check_request_config(request_config)
        with clock:
            requests, notes = read_requests(infer_requests, require_trainer=self._default.checks.require_trainer)
        if not requests:
            return []
        if notes[0].mode == 'probe':
            return [await self._probe(server, request, note) for request, note in zip(requests, notes, strict=True)]
        # A batch has one trainer, hence one config: the trainer's, if it sent one.
        self.config = notes[0].tree_config(self._default)
        batch = RolloutBatch(server, self.config, requests, notes, request_config, clock)
        return await batch.run(started, show_progress=len(requests) > 1 if use_tqdm is None else use_tqdm)

    def _server(self) -> Server:
        if self._engine is None:
            raise RolloutError(
                f'{type(self).__name__} has no engine. `swift rollout` gives it one, and in colocate mode '
                'TreeGRPOTrainer does: is the plugin file among --external_plugins?'
            )
        eos = self.tokenizer.eos_token_id
        return Server(
            scheduler=self,
            overridden=self._overridden,
            checks_segments=type(self).check_segment is not TreeRolloutScheduler.check_segment,
            engine=self._engine,
            hooks=self._hooks,
            forecast=self._forecast,
            writer=OutputWriter(self._engine, self.get_response_token_data, 0 if eos is None else eos),
            warn=self._warn,
            warn_once=self._warn_once,
            watches_engine=self.watches_engine,
        )

    async def _probe(self, server: Server, request: RolloutInferRequest, note: RequestNote) -> RolloutOutput:
        """Tell the trainer about the engine, and whether it can follow the trainer's config."""
        engine = server.engine
        if note.config is not None:
            check_config(note.tree_config(self._default), engine.info, self.max_turns, self._warn_once)
        logprobs = await score(engine, note.token_ids, self._default.faults) if note.token_ids else None
        return server.writer.probe(request, logprobs)

    def _warn(self, message: str) -> None:
        logger.warning(inert(f'treepo: {message}'))

    def _warn_once(self, kind: str, message: str) -> None:
        """Once for each kind: messages may name a path, of which there are many."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(message)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_moved(type(self), name)
        super().__setattr__(name, value)

    def __getattr__(self, key: str) -> Any:
        # swift's base class answers None for names that do not exist, which turns typos into silence.
        value = super().__getattr__(key)
        if value is None:
            raise AttributeError(f'{type(self).__name__} object has no attribute {key!r}')
        return value
