"""An asynchronous face of vLLM's synchronous engine: trees in the trainer's own process (colocate mode).

swift's colocate mode has an `LLMEngine`, which computes only while somebody calls `step`. `SteppedEngine` is that
somebody, and offers what `VllmSegmentEngine` asks of vLLM's `AsyncLLM`. Everything runs in one thread: between two
steps the trees take what came and ask for more.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from .engine import EngineGone

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine
    from vllm import LLMEngine

ROUNDS = 6
"""Rounds of the event loop between two steps. An output passes a queue, its path's task, and a new task for each fork
(and a meeting, where trees share a budget): with fewer rounds than that, forks start a step late."""

LAST_STEPS = 16
"""Most steps after which nothing of an aborted request may be left; vLLM needs one for each batch in flight."""


class SteppedEngine:
    """`LLMEngine` as an engine whose requests are streams. The first request starts the steps, the last one ends them.

    A step that raises leaves the engine in an unknown state. Then every stream raises `EngineGone`, and so does every
    later one.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._streams: dict[str, asyncio.Queue[Any]] = {}
        self._inside: set[str] = set()
        """Requests that the engine works on. A stream may still have outputs to hand out when its request has ended."""
        self._stepping: asyncio.Task[None] | None = None
        self._gone: str | None = None
        """Why the engine can not be used any more."""
        self.vllm_config = engine.vllm_config
        self.output_processor = engine.output_processor
        """Where the interval of streams is set in a vLLM whose requests have none."""
        self.log_stats = engine.log_stats
        self.steps = 0
        """Steps that were taken."""
        self.answers = 0
        """Outputs that came of them: what tells an engine that works from one that only turns."""

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._inside)

    def list_loras(self) -> Any:
        """Adapters that the engine holds, for swift's own look-up."""
        return self._engine.list_loras()

    async def generate(
        self,
        inputs: Any,
        sampling: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        """The outputs of one request as they come. Closing the generator aborts the request."""
        if self._gone is not None:
            raise EngineGone(self._gone)
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._streams[request_id] = outputs
        try:
            self._engine.add_request(request_id, inputs, sampling, lora_request=lora_request, priority=priority)
            self._inside.add(request_id)
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step_on())
            finished = False
            while not finished:
                output = await outputs.get()
                if isinstance(output, EngineGone):
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._streams[request_id]
            self._abort({request_id} & self._inside)

    def _abort(self, request_ids: set[str]) -> None:
        self._inside -= request_ids
        if request_ids and self._gone is None:
            self._engine.abort_request(list(request_ids))

    async def _step_on(self) -> None:
        try:
            while self._engine.has_unfinished_requests():
                outputs = self._engine.step()
                self.steps += 1
                self.answers += len(outputs)
                self._inside.difference_update(output.request_id for output in outputs if output.finished)
                for output in outputs:
                    # What was aborted a moment ago may still have had an output in this step.
                    if output.request_id in self._streams:
                        self._streams[output.request_id].put_nowait(output)
                for _ in range(ROUNDS):
                    await asyncio.sleep(0)
        except Exception as e:
            self._gone = f"vLLM's engine raised {type(e).__name__} in a step, and can not be used any more: {e}"
            for waiting in self._streams.values():
                gone = EngineGone(self._gone)
                gone.__cause__ = e
                waiting.put_nowait(gone)

    def check_awake(self) -> None:
        """Raise `EngineGone` where a step would compute nothing, and a rollout would wait for good."""
        if self._gone is None and self._engine.is_sleeping():
            raise EngineGone(
                "vLLM's engine sleeps, or its scheduler is paused: a rollout was asked for before swift woke it up."
            )

    async def settle(self) -> None:
        """When a batch has ended: nothing of it is left in the engine, which swift may put to sleep now."""
        self._abort(set(self._inside))  # of what could not even be cancelled
        if self._stepping is not None:
            await self._stepping
            self._stepping = None
        # Where batches are scheduled ahead, one that was in flight at an abort still has to be taken out.
        for _ in range(LAST_STEPS):
            if self._gone is not None or not self._holds_something():
                return
            self._engine.step()
        self._gone = f"vLLM's engine still holds requests of a rollout {LAST_STEPS} steps after they were aborted."
        raise EngineGone(self._gone)

    def _holds_something(self) -> bool:
        """Whether the engine's core has to be stepped although no request is unfinished."""
        core = getattr(self._engine.engine_core, 'engine_core', None)
        return core is not None and bool(core.scheduler.has_requests() or core.batch_queue)


def stepped_face(engine: GRPOVllmEngine) -> GRPOVllmEngine:
    """A copy of swift's synchronous engine that is used as its asynchronous one is, over the same vLLM engine."""
    face = copy.copy(engine)
    face.engine = SteppedEngine(engine.engine)
    face.use_async_engine = True
    # swift gives the trainer's --max_length to this template, which would then cut the prompts of later turns from
    # the left. A rollout server has none: the engine's own length is the limit.
    face.template = copy.copy(engine.template)
    face.template.max_length = None
    return face
