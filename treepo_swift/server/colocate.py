"""`ColocateTrees`: a tree scheduler in the trainer's process, over the engine that swift's colocate mode has there."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput

from treepo_swift.config import TreeConfig

from .concurrency import calm_garbage_collection
from .config_checks import check_config
from .stepped import SteppedEngine, stepped_face
from .watchdog import Watchdog

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine

    from .scheduler import TreeRolloutScheduler
    from .vllm_engine import VllmSegmentEngine

T = TypeVar('T')


class ColocateTrees:
    """Grows trees on this process's engine. When a call returns, or raises, nothing of its rollout is alive."""

    def __init__(
        self, engine: GRPOVllmEngine, scheduler: type[TreeRolloutScheduler], config: TreeConfig, **options: Any
    ) -> None:
        """Make the scheduler, with the `options` that ``swift rollout`` would give it (`max_turns`, `gym_env`, ...).

        Raises `ConfigError` where `config` asks for what this engine can not give.
        """
        face = stepped_face(engine)
        self._stepped: SteppedEngine = face.engine
        self._scheduler = scheduler(infer_engine=face, **options)
        self._scheduler.watches_engine = False
        server = self._scheduler._server()
        self._hooks = server.hooks
        self._segments = cast('VllmSegmentEngine', server.engine)
        self._stall_timeout = config.faults.stall_timeout
        self._runner = asyncio.Runner()
        """One event loop for all rollouts: hooks that hang belong to the loop on which they were called."""
        check_config(config, self._segments.info, self._scheduler.max_turns, server.warn_once)

    @property
    def engine_info(self) -> dict[str, Any]:
        """What a rollout server would tell the trainer about its engine."""
        return dataclasses.asdict(self._segments.info)

    def rollout(self, requests: Sequence[RolloutInferRequest], request_config: RequestConfig) -> list[RolloutOutput]:
        """One output per request, in request order.

        Raises:
            EngineGone: the engine failed in a step, or sleeps.
            RolloutStalled: nothing came for `faults.stall_timeout` seconds.
            Exception: what `TreeRolloutScheduler.rollout` raises.
        """
        # The trainer's objects come and go in cycles: frozen, they and their tensors would never be collected.
        with calm_garbage_collection(freeze=False):
            answers = self._run(lambda: self._scheduler.rollout(requests, request_config, use_tqdm=False))
        outputs = cast(list[RolloutOutput], answers)  # Nobody asked for them packed.
        # Siblings share what came before they forked, and swift changes messages where they are.
        for output in outputs:
            output.messages, output.rollout_infos = copy.deepcopy((output.messages, output.rollout_infos))
        return outputs

    def score(self, token_ids: list[int]) -> list[float]:
        """The engine's log-probs of ``token_ids[1:]``, each given all ids before it."""
        return self._run(lambda: self._segments.score(token_ids))

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._runner.run(self._guarded(work))

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._stepped.check_awake()
        try:
            return await Watchdog(self._stall_timeout, self._progress, self._describe).guard(work())
        finally:
            await self._stepped.settle()

    def _progress(self) -> tuple[int, int]:
        return self._stepped.answers, self._hooks.returned

    def _describe(self) -> str:
        return (
            f'{self._stepped.running} requests are in the engine, which has taken {self._stepped.steps} steps so far '
            f'and given {self._stepped.answers} answers; {self._hooks.returned} hooks have come back.'
        )
