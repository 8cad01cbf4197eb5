"""Calls a user's hooks about turns, in ms-swift's order and with its arguments, and checks what they return."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RolloutInferRequest, RolloutOutput

from treepo_swift.config import TreeConfig
from treepo_swift.wire.report import REPORT_KEY

from .hooks import HookError, HookRunner
from .replies import Reply, Turn, short
from .user import UserScheduler

TURN_HOOKS = ('on_trajectory_start', 'on_turn_end', 'check_finished', 'step')
STATE_HOOKS = ('fork_state', 'release_state')
MEDIA_KEYS = ('images', 'audios', 'videos')


def overridden_hooks(cls: type, base: type) -> frozenset[str]:
    """Those hooks about turns and states that `cls`, a subclass of `base`, has of its own."""
    names = (*TURN_HOOKS, *STATE_HOOKS)
    return frozenset(name for name in names if getattr(cls, name) is not getattr(base, name))


def copy_for(state: str, request: RolloutInferRequest) -> RolloutInferRequest:
    """A request that hooks may change, of the environment `state`; texts and images are shared, as strings are."""
    copied = copy.deepcopy(request)
    copied.uuid = state
    return copied


class TurnHooks:
    """A scheduler's hooks for one tree. What they may not return raises `HookError`."""

    def __init__(self, user: UserScheduler, overridden: frozenset[str], runner: HookRunner, config: TreeConfig) -> None:
        self.user = user
        self.overridden = overridden
        self.prefix: list[int] = []
        """Tokens with which the template begins every reply."""
        self._runner = runner
        self._timeout = config.faults.hook_timeout

    async def call(self, hook: str, *args: Any, where: str) -> Any:
        name = self.name(hook)
        return await self._runner.call(getattr(self.user, hook), *args, timeout=self._timeout, where=where, name=name)

    def name(self, hook: str) -> str:
        """Of the hook as it stands in errors."""
        return f'{type(self.user).__name__}.{hook}'

    async def start(self, original: RolloutInferRequest, state: str, where: str) -> RolloutInferRequest:
        """`on_trajectory_start`: the request as the environment `state` begins it."""
        request = copy_for(state, original)
        if 'on_trajectory_start' in self.overridden:
            await self.call('on_trajectory_start', [request], where=where)
            if not request.messages:
                raise HookError(self.name('on_trajectory_start'), where, 'left the request without messages')
        return request

    async def end(
        self, begun: Turn, reply: Reply, choice: ChatCompletionResponseChoice, state: str, where: str
    ) -> tuple[Turn, bool]:
        """`on_turn_end` and `check_finished`: the turn that has ended, and whether it was the last."""
        request, number = copy_for(state, begun.request), begun.number + 1
        if begun.continues:
            request.messages[-1]['content'] += choice.message.content
        else:
            request.messages.append({'role': 'assistant', 'content': choice.message.content})
        before = copy.deepcopy(request.messages)
        infos, result = dict(begun.infos), {}
        if 'on_turn_end' in self.overridden:
            result = await self.call('on_turn_end', request, choice, number, where=where)
            if not isinstance(result, dict):
                problem = f'returned {result!r}, allowed is a dict with "done" and "rollout_infos", or an empty one'
                raise HookError(self.name('on_turn_end'), where, problem)
            self._check_history(before, request.messages, 'on_turn_end', where)
            infos.update(self._checked_infos(result, 'on_turn_end', where))
        finished = True
        if self.overridden & {'step', 'check_finished'}:
            finished = await self.call('check_finished', request, choice, number, where=where)
            self._check_history(before, request.messages, 'check_finished', where)
        if 'done' in result:
            finished = result['done']
        if len(request.messages) != len(before):
            raise HookError(self.name('check_finished'), where, 'appended messages, which only `step` may')
        if self.user.max_turns and number >= self.user.max_turns:
            finished = True
        return Turn(number, request, begun.prompt, infos, begun, reply, len(before) - 1), bool(finished)

    async def step(self, ended: Turn, choice: ChatCompletionResponseChoice, logprobs: list[float], where: str) -> Turn:
        """`step`: the same turn with what the next begins with."""
        name = self.name('step')
        if 'step' not in self.overridden:
            raise HookError(
                self.name('check_finished'),
                where,
                f'returned False, but there is no next turn without a `step` in {type(self.user).__name__}',
            )
        before = ended.request.messages
        result = await self.call('step', copy.deepcopy(ended.request), choice, ended.number, where=where)
        request = self._checked_request(result, before, where)
        if (
            result.get('response_token_ids') is None
            and request.messages[ended.message].get('content') != before[ended.message]['content']
        ):
            problem = 'changed the text of the reply without "response_token_ids", so that text and tokens would differ'
            raise HookError(name, where, problem)
        try:
            reply = Reply.from_step(result, ended.reply.ids, logprobs, self.prefix)
        except ValueError as e:
            raise HookError(name, where, str(e)) from None
        infos = {**ended.infos, **self._checked_infos(result, 'step', where)}
        request.uuid = ended.request.uuid
        return dataclasses.replace(ended, request=request, reply=reply, infos=infos)

    # What hooks may return.

    def _checked_request(self, result: Any, before: list[Any], where: str) -> RolloutInferRequest:
        """The request that `step` returned: the history `before`, with messages appended that are not ours to say."""
        name = self.name('step')
        if not isinstance(result, dict) or not isinstance(result.get('infer_request'), RolloutInferRequest):
            raise HookError(
                name,
                where,
                f'returned {short(result)}, allowed is a dict whose "infer_request" is the RolloutInferRequest to go '
                'on with',
            )
        request = result['infer_request']
        if not isinstance(request.messages, list):
            raise HookError(name, where, f'messages={short(request.messages)}, allowed is a list')
        last = request.messages[-1] if len(request.messages) > len(before) else {}
        if last.get('role') == 'assistant':
            if last.get('content'):
                raise HookError(
                    name,
                    where,
                    'appended an assistant message of its own. Return its tokens as "response_token_ids", masked, or '
                    'append a user or tool message',
                )
            request.messages.pop()  # swift's dummy for templates that want one
        self._check_history(before, request.messages, 'step', where)
        return request

    def _check_history(self, before: list[Any], after: Any, hook: str, where: str) -> None:
        """Refuse messages that are not `before` with more behind; the reply's text may differ."""
        if not isinstance(after, list) or len(after) < len(before):
            changed = len(after) if isinstance(after, list) else 0
        else:
            same = [a == b for a, b in zip(before[:-1], after)]
            changed = len(same) if all(same) else same.index(False)
            if all(same) and after[len(same)].get('role') == 'assistant':
                return
        raise HookError(
            self.name(hook),
            where,
            f'rewrote the history at message {changed} of {len(before)}. What was sampled was sampled from that '
            'history, so its tokens must stay: append messages only',
        )

    def _checked_infos(self, result: dict[str, Any], hook: str, where: str) -> dict[str, Any]:
        infos = result.get('rollout_infos') or {}
        if not isinstance(infos, dict) or REPORT_KEY in infos:
            problem = f'returned rollout_infos={short(infos)}, allowed is a dict without the key {REPORT_KEY!r}'
            raise HookError(self.name(hook), where, problem)
        media = {key: infos[key] for key in MEDIA_KEYS if key in infos}
        try:
            if media:
                # swift's own way of making images sendable; it changes its copy.
                holder = RolloutOutput.model_construct(rollout_infos=copy.copy(media))
                holder.mminfo_to_serializable()
                infos = {**infos, **holder.rollout_infos}
            return json.loads(json.dumps(infos, allow_nan=False))
        except Exception as e:
            raise HookError(self.name(hook), where, f'its rollout_infos can not be sent as JSON: {e}') from None
