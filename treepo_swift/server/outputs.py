"""From trajectories to the `RolloutOutput` objects that swift's trainer expects, one for every request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from swift.infer_engine.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    RolloutInferRequest,
    RolloutOutput,
    UsageInfo,
)

from treepo_swift.core.inert import one_line
from treepo_swift.core.tree import Path, StopReason, Tree, response_ids, sampled_tokens
from treepo_swift.wire.note import REQUEST_KEY
from treepo_swift.wire.report import FAILURE_KEY, MAX_ERROR, REPORT_KEY, BatchReport, TreeReport
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace

from .replies import Response, Turn, data_of, ended_turn, loss_tokens

if TYPE_CHECKING:
    from .engine import Prompt, SegmentEngine


class RolloutFailure:
    """What `async_infer` returns instead of outputs when a rollout failed.

    swift's worker logs an exception and sends None, of which the trainer sees a bare "500 Internal Server Error".
    This object is iterated in the server's process, where it becomes a 500 that carries the message.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __iter__(self) -> Iterator[RolloutOutput]:
        from fastapi import HTTPException

        raise HTTPException(status_code=500, detail=self.message)


class PlainOutputs:
    """The outputs of a batch for a trainer that takes them as swift sends them."""

    def __init__(self) -> None:
        self._outputs: dict[int, RolloutOutput] = {}
        self.batch: BatchReport | None = None
        """Goes into the report of the batch's first output."""

    def add(self, positions: Sequence[int], outputs: Sequence[RolloutOutput]) -> None:
        """Take the outputs of one tree, which stand at `positions` of the batch."""
        self._outputs.update(zip(positions, outputs, strict=True))

    def in_order(self) -> list[RolloutOutput]:
        """One output per request, in request order."""
        outputs = [self._outputs[position] for position in range(len(self._outputs))]
        if self.batch is not None:
            outputs[0].rollout_infos[REPORT_KEY]['batch'] = self.batch.to_dict()
        return outputs


class ResponseMask(Protocol):
    """`MultiTurnScheduler.get_response_token_data`: adds the tokens with which the template begins every reply."""

    def __call__(
        self, request: RolloutInferRequest, choice: ChatCompletionResponseChoice, *, response_token_ids: list[int]
    ) -> tuple[list[int], list[int]]: ...


class OutputWriter:
    """Writes outputs with one engine's template."""

    def __init__(self, engine: SegmentEngine, mask: ResponseMask, filler_token: int) -> None:
        """`filler_token` is the one token of a placeholder."""
        self._engine = engine
        self._mask = mask
        self._filler_token = filler_token

    def prefix(self, request: RolloutInferRequest) -> list[int]:
        """Tokens with which the template begins every reply."""
        choice = ChatCompletionResponseChoice(0, ChatMessage('assistant', ''), 'stop')
        return self._mask(request, choice, response_token_ids=[])[0]

    def choice(self, prompt: Prompt, ids: list[int], stop: StopReason) -> ChatCompletionResponseChoice:
        """The assistant message of a response, as reward functions and hooks see it."""
        content = self._engine.completion(prompt, ids) if ids else ''
        return ChatCompletionResponseChoice(0, ChatMessage('assistant', content), stop.finish_reason)

    def tree(
        self,
        requests: Sequence[RolloutInferRequest],
        prompt: Prompt,
        tree: Tree,
        *,
        with_report: bool,
        with_trace: bool = False,
    ) -> list[RolloutOutput]:
        """An output for each of a tree's requests; without a report they train as plain GRPO does."""
        prefix = self.prefix(requests[0])
        outputs = [
            self._trajectory(request, prompt, tree, index, prefix, with_report)
            for index, request in enumerate(requests)
        ]
        if with_report and with_trace:
            outputs[0].rollout_infos[TRACE_KEY] = TreeTrace.of(tree).to_dict()
        return outputs

    def _trajectory(
        self,
        request: RolloutInferRequest,
        prompt: Prompt,
        tree: Tree,
        index: int,
        prefix: list[int],
        with_report: bool,
    ) -> RolloutOutput:
        path = tree.trajectories[index]
        turn = ended_turn(path)
        infos: dict[str, Any] = {'num_turns': 1}
        if turn is not None:
            choice, messages = self._last_reply(turn, path), turn.messages
            infos = {**turn.infos, 'num_turns': turn.number}
        else:
            choice = self.choice(prompt, response_ids(path.leaf), path.stop)
            begun = data_of(tree.root).begins
            before = request.messages if begun is None else begun.request.messages
            messages = [*before, {'role': 'assistant', 'content': choice.message.content}]
        if with_report:
            infos[REPORT_KEY] = TreeReport.of(tree, index, loss_tokens(path)).to_dict()
        elif path.stop is StopReason.FAILED:
            infos[FAILURE_KEY] = one_line(path.error or 'no cause was given', MAX_ERROR)
        response = Response.of(path, prefix=prefix, filler=self._filler_token)
        sampled = sampled_tokens(path.leaf)
        usage = UsageInfo(len(prompt.token_ids), sampled, len(prompt.token_ids) + sampled)
        # All of it is ours and of the right types: validating would copy every list.
        return RolloutOutput.model_construct(
            response=ChatCompletionResponse(self._engine.info.model, [choice], usage, id=request.uuid or tree.id),
            messages=messages,
            response_token_ids=response.ids,
            response_loss_mask=response.mask,
            rollout_logprobs=response.logprobs,
            rollout_infos=infos,
        )

    def _last_reply(self, turn: Turn, path: Path) -> ChatCompletionResponseChoice:
        ids = turn.reply.ids[: turn.reply.sampled]
        text = self._engine.completion(turn.prompt, ids, first=not turn.previous.continues)
        return ChatCompletionResponseChoice(0, ChatMessage('assistant', text), path.stop.finish_reason)

    def probe(self, request: RolloutInferRequest, scores: list[float] | None) -> RolloutOutput:
        """Tell the trainer about the engine, and the log-probs of its fixed text where it sent one."""
        choice = ChatCompletionResponseChoice(0, ChatMessage('assistant', ''), 'stop')
        info = {'engine': dataclasses.asdict(self._engine.info), 'logprobs': scores}
        return RolloutOutput(
            response=ChatCompletionResponse(
                self._engine.info.model, [choice], UsageInfo(0, 0, 0), id=request.uuid or ''
            ),
            messages=request.messages,
            rollout_infos={REQUEST_KEY: info},
        )
