"""Turns of one tree: users' hooks are asked when a turn has ended, and what they say becomes the next turn's tokens.

ms-swift's `MultiTurnScheduler.run` is the model: the same hooks in the same order with the same arguments. What differs
is that a turn may have several successors. So every turn begins with a request and an environment state that nobody
changes any more, and hooks work on copies of both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, ChatMessage, RolloutInferRequest, RolloutOutput
from swift.rollout import MultiTurnScheduler
from swift.utils import remove_response

from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import NextTurn
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Path, StopReason, response_ids
from treepo_swift.wire.report import REPORT_KEY

from .engine import Prompt, SegmentEngine
from .hooks import HookError, HookRunner
from .replies import NodeData, Reply, Turn, data_of

if TYPE_CHECKING:
    from .scheduler import TreeRolloutScheduler

TURN_HOOKS = ('on_trajectory_start', 'on_turn_end', 'check_finished', 'step')
STATE_HOOKS = ('fork_state', 'release_state')
MEDIA_KEYS = ('images', 'audios', 'videos')


def overridden_hooks(user: MultiTurnScheduler, base: type) -> set[str]:
    """Those hooks about turns and states that a subclass of `base` has of its own."""
    return {name for name in (*TURN_HOOKS, *STATE_HOOKS) if getattr(type(user), name) is not getattr(base, name)}


class Conversation:
    """The hooks' side of one tree."""

    def __init__(
        self,
        user: TreeRolloutScheduler,
        asked: set[str],
        search: TreeSearch,
        *,
        engine: SegmentEngine,
        hooks: HookRunner,
        config: TreeConfig,
        prefix: Callable[[RolloutInferRequest], list[int]],
    ) -> None:
        """`asked` are the hooks to call; `prefix` gives the tokens with which the template begins every reply."""
        self._user = user
        self._asked = asked
        self._search = search
        self._engine = engine
        self._hooks = hooks
        self._config = config
        self._get_prefix = prefix
        self._prefix: list[int] = []
        self._original: RolloutInferRequest
        self._states: set[str] = set()
        self._moved: set[str] = set()
        """States that a child has taken over (``fork_state: replay``)."""

    # What the scheduler calls.

    async def begin(self, request: RolloutInferRequest) -> Prompt:
        """Start the environment, and encode what it begins with. Raises `HookError`, or what the template raises."""
        self._original = _copy(request, self._search.tree.id)
        remove_response(self._original.messages)
        request = await self._start_environment(self._search.tree.id)
        self._prefix = self._get_prefix(request)
        prompt = await self._engine.encode(request)
        data_of(self._search.tree.root).begins = Turn(0, request, prompt)
        return prompt

    async def end_turn(self, path: Path, stop: StopReason) -> NextTurn | StopReason:
        """Ask the hooks about a turn that has ended; a reason if it was the path's last. Raises `HookError`."""
        begun = data_of(path.leaf.turn_start).begins
        where = f'after turn {begun.number + 1} on path {path.id} of tree {self._search.tree.id}'
        try:
            return await self._end_turn(path, stop, begun, where)
        except HookError:
            raise
        except Exception as e:
            # Messages can be wrong in more ways than are checked for, and must not end the batch.
            raise HookError(
                f'{type(self._user).__name__} {where}: what its hooks left can not be used: {type(e).__name__}: {e}'
            ) from e

    async def _end_turn(self, path: Path, stop: StopReason, begun: Turn, where: str) -> NextTurn | StopReason:
        start = path.leaf.start
        nodes = path.leaf.lineage(since=start)
        ids = [token for node in nodes for token in node.token_ids]
        logprobs = [value for node in nodes for value in node.logprobs]
        state = f'{self._search.tree.id}/{path.id}.{begun.number + 1}'
        await self._fork_state(begun, state, where)
        choice = self._choice(begun, ids, logprobs, stop)
        told = copy.deepcopy(choice) if self._config.fork_state == 'replay' else None
        ended, finished = await self._ask(begun, Reply.of(ids), choice, state, where)
        if finished:
            data_of(path.leaf).ended = ended
            await self._release(state)
            return stop
        following = await self._step(ended, choice, logprobs, where)
        so_far = self._ids_so_far(path, following.reply)
        prompt, environment_ids = following.prompt, following.reply.ids[following.reply.sampled :]
        if not following.continues:
            prompt = await self._encode(following, where)
            if prompt.token_ids[: len(so_far)] != so_far:
                raise HookError(
                    f'{self._name("step")} {where}: with what it returned, the template does not give the '
                    'tokens so far any more. Trees need the exact history: append messages, and change '
                    'neither earlier ones nor what stands before them (tools, system)'
                )
            environment_ids = environment_ids + prompt.token_ids[len(so_far) :]
        keep = start.length + following.reply.sampled
        if not self._search.has_room(keep + len(environment_ids)):
            data_of(path.leaf).ended = ended
            await self._release(state)
            return StopReason.CONTEXT_LIMIT
        prompt = dataclasses.replace(prompt, token_ids=self._search.tree.prompt_ids)
        begins = dataclasses.replace(following, prompt=prompt, choice=told)
        return NextTurn(keep, environment_ids, NodeData(begins=begins))

    async def release(self) -> list[HookError]:
        """Let go of all states; returns what went wrong there."""
        errors = []
        for state in list(self._states):
            try:
                await self._release(state)
            except HookError as e:
                errors.append(e)
        return errors

    # Hooks.

    async def _call(self, hook: str, *args: Any, where: str) -> Any:
        return await self._hooks.call(
            getattr(self._user, hook),
            *args,
            timeout=self._config.faults.hook_timeout,
            where=where,
            name=self._name(hook),
        )

    def _name(self, hook: str) -> str:
        return f'{type(self._user).__name__}.{hook}'

    async def _start_environment(self, state: str) -> RolloutInferRequest:
        request = _copy(self._original, state)
        self._states.add(state)
        if 'on_trajectory_start' in self._asked:
            where = f'at the root of tree {self._search.tree.id}'
            await self._call('on_trajectory_start', [request], where=where)
            if not request.messages:
                raise HookError(f'{self._name("on_trajectory_start")} {where}: left the request without messages')
        return request

    async def _ask(
        self, begun: Turn, reply: Reply, choice: ChatCompletionResponseChoice, state: str, where: str
    ) -> tuple[Turn, bool]:
        """`on_turn_end` and `check_finished`: the turn that has ended, and whether it was the last."""
        request, number = _copy(begun.request, state), begun.number + 1
        if begun.continues:
            request.messages[-1]['content'] += choice.message.content
        else:
            request.messages.append({'role': 'assistant', 'content': choice.message.content})
        before = copy.deepcopy(request.messages)
        infos, result = dict(begun.infos), {}
        if 'on_turn_end' in self._asked:
            result = await self._call('on_turn_end', request, choice, number, where=where)
            if not isinstance(result, dict):
                raise HookError(
                    f'{self._name("on_turn_end")} {where}: returned {result!r}, allowed is a dict with '
                    '"done" and "rollout_infos", or an empty one'
                )
            self._check_history(before, request.messages, 'on_turn_end', where)
            infos.update(self._checked_infos(result, 'on_turn_end', where))
        finished = True
        if self._asked & {'step', 'check_finished'}:
            finished = await self._call('check_finished', request, choice, number, where=where)
            self._check_history(before, request.messages, 'check_finished', where)
        if 'done' in result:
            finished = result['done']
        if len(request.messages) != len(before):
            raise HookError(f'{self._name("check_finished")} {where}: appended messages, which only `step` may')
        if self._user.max_turns and number >= self._user.max_turns:
            finished = True
        return Turn(number, request, begun.prompt, infos, begun, reply, len(before) - 1), bool(finished)

    async def _step(self, ended: Turn, choice: ChatCompletionResponseChoice, logprobs: list[float], where: str) -> Turn:
        """`step`: the same turn with what the next begins with."""
        name = self._name('step')
        if 'step' not in self._asked:
            raise HookError(
                f'{self._name("check_finished")} {where}: returned False, but there is no next turn without '
                f'a `step` in {type(self._user).__name__}'
            )
        before = ended.request.messages
        result = await self._call('step', copy.deepcopy(ended.request), choice, ended.number, where=where)
        if not isinstance(result, dict) or not isinstance(result.get('infer_request'), RolloutInferRequest):
            raise HookError(
                f'{name} {where}: returned {_short(result)}, allowed is a dict whose "infer_request" is the '
                'RolloutInferRequest to go on with'
            )
        request = result['infer_request']
        if not isinstance(request.messages, list):
            raise HookError(f'{name} {where}: messages={_short(request.messages)}, allowed is a list')
        last = request.messages[-1] if len(request.messages) > len(before) else {}
        if last.get('role') == 'assistant':
            if last.get('content'):
                raise HookError(
                    f'{name} {where}: appended an assistant message of its own. Return its tokens as '
                    '"response_token_ids", masked, or append a user or tool message'
                )
            request.messages.pop()  # swift's dummy for templates that want one
        self._check_history(before, request.messages, 'step', where)
        if (
            result.get('response_token_ids') is None
            and request.messages[ended.message].get('content') != before[ended.message]['content']
        ):
            raise HookError(
                f'{name} {where}: changed the text of the reply without "response_token_ids", so that text '
                'and tokens would differ'
            )
        reply = self._checked_reply(result, ended.reply.ids, logprobs, where)
        infos = {**ended.infos, **self._checked_infos(result, 'step', where)}
        request.uuid = ended.request.uuid
        return dataclasses.replace(ended, request=request, reply=reply, infos=infos)

    # What hooks may return.

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
            f'{self._name(hook)} {where}: rewrote the history at message {changed} of {len(before)}. What '
            'was sampled was sampled from that history, so its tokens must stay: append messages only'
        )

    def _checked_infos(self, result: dict[str, Any], hook: str, where: str) -> dict[str, Any]:
        infos = result.get('rollout_infos') or {}
        if not isinstance(infos, dict) or REPORT_KEY in infos:
            raise HookError(
                f'{self._name(hook)} {where}: returned rollout_infos={_short(infos)}, allowed is a dict '
                f'without the key {REPORT_KEY!r}'
            )
        media = {key: infos[key] for key in MEDIA_KEYS if key in infos}
        try:
            if media:
                # swift's own way of making images sendable; it changes its copy.
                holder = RolloutOutput.model_construct(rollout_infos=copy.copy(media))
                holder.mminfo_to_serializable()
                infos = {**infos, **holder.rollout_infos}
            return json.loads(json.dumps(infos, allow_nan=False))
        except Exception as e:
            raise HookError(f'{self._name(hook)} {where}: its rollout_infos can not be sent as JSON: {e}') from None

    def _checked_reply(self, result: dict[str, Any], sampled: list[int], logprobs: list[float], where: str) -> Reply:
        """The reply as `step` wants it: sampled tokens from its beginning, then inserted ones."""
        name = self._name('step')
        ids, mask = result.get('response_token_ids'), result.get('response_loss_mask')
        ids = sampled if ids is None else ids
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise HookError(f'{name} {where}: response_token_ids={_short(ids)}, allowed is a list of token ids')
        kept = next((i for i, (a, b) in enumerate(zip(ids, sampled)) if a != b), min(len(ids), len(sampled)))
        if mask is None:
            mask = [1] * kept + [0] * (len(ids) - kept)
        if not isinstance(mask, list) or not all(value in (0, 1) for value in mask):
            raise HookError(f'{name} {where}: response_loss_mask={_short(mask)}, allowed is a list of 0 and 1')
        if len(mask) != len(ids):
            raise HookError(
                f'{name} {where}: returned a response_loss_mask of {len(mask)} values for {len(ids)} response_token_ids'
            )
        explicit = len(self._prefix)
        if explicit and ids[:explicit] == self._prefix and not any(mask[:explicit]) and kept < explicit:
            # swift's schedulers may write the template's prefix into the reply; here it is in the prompt.
            return self._checked_reply(
                {**result, 'response_token_ids': ids[explicit:], 'response_loss_mask': mask[explicit:]},
                sampled,
                logprobs,
                where,
            )
        if any(mask[kept:]):
            raise HookError(
                f'{name} {where}: its response_loss_mask trains on token {mask.index(1, kept)} of '
                f'response_token_ids, but only the first {kept} were sampled'
            )
        given = result.get('rollout_logprobs')
        trained = [value for value, keep in zip(logprobs, mask) if keep]
        if given and list(given) != trained:
            raise HookError(
                f'{name} {where}: returned {len(given)} rollout_logprobs, which are not those of the '
                f'{len(trained)} tokens that response_loss_mask trains on'
            )
        return Reply(list(ids), [int(value) for value in mask], kept)

    # Tokens.

    def _choice(
        self, begun: Turn, ids: Sequence[int], logprobs: Sequence[float], stop: StopReason
    ) -> ChatCompletionResponseChoice:
        content = [{'token': f'token_id:{token}', 'logprob': value} for token, value in zip(ids, logprobs, strict=True)]
        text = self._engine.completion(begun.prompt, list(ids), first=not begun.continues)
        return ChatCompletionResponseChoice(
            0, ChatMessage('assistant', text), stop.finish_reason, {'content': content}, token_ids=list(ids)
        )

    def _ids_so_far(self, path: Path, reply: Reply) -> list[int]:
        """All tokens of the next turn's input that are known already."""
        return [*self._search.tree.prompt_ids, *response_ids(path.leaf.start), *reply.ids]

    async def _encode(self, turn: Turn, where: str) -> Prompt:
        """The next turn's prompt: replies as the tokens that they are, the rest by the template."""
        request = _copy(turn.request, turn.request.uuid)
        for index, replies in turn.replies():
            ids = [*self._prefix, *(token for reply in replies for token in reply.ids)]
            # Not as a list, which agent templates take for a list of texts.
            request.messages[index]['content'] = {'token_ids': ids}
        try:
            return await self._engine.encode(request)
        except Exception as e:
            raise HookError(
                f'{self._name("step")} {where}: the template can not encode what it returned: {type(e).__name__}: {e}'
            ) from e

    # The environment's state.

    async def _fork_state(self, begun: Turn, child: str, where: str) -> None:
        parent = begun.request.uuid
        self._states.add(child)
        if self._config.fork_state == 'copy':
            if self._cares('fork_state', parent):
                await self._call('fork_state', parent, child, where=where)
        elif parent not in self._moved and self._user.state_attributes(parent):
            # The first to come takes the environment as it stands; it must be played again for the others.
            self._moved.add(parent)
            self._user.move_state(parent, child)
        elif 'on_trajectory_start' in self._asked or parent in self._moved:
            await self._replay(begun, child, where)

    def _cares(self, hook: str, state: str) -> bool:
        """Whether a hook about states has something to do."""
        return hook in self._asked or bool(self._user.state_attributes(state))

    async def _replay(self, begun: Turn, child: str, where: str) -> None:
        """Bring a fresh environment to where the turn after `begun` started."""
        request = await self._start_environment(child)
        first = data_of(self._search.tree.root).begins
        self._check_replay(request.messages, first.request.messages, 'on_trajectory_start', where)
        for turn in begun.so_far():
            choice = copy.deepcopy(turn.choice)
            ids, logprobs = list(choice.token_ids), [item['logprob'] for item in choice.logprobs['content']]
            ended, finished = await self._ask(turn.previous, Reply.of(ids), choice, child, where)
            self._check_replay(finished, False, 'check_finished', where)
            again = await self._step(ended, choice, logprobs, where)
            self._check_replay(again.request.messages, turn.request.messages, 'step', where)
            self._search.tree.stats.replayed_turns += 1

    def _check_replay(self, again: Any, before: Any, hook: str, where: str) -> None:
        if again != before:
            raise HookError(
                f'{self._name(hook)} {where}: gave {_short(again)} when its turn was played again, and '
                f'{_short(before)} at first. fork_state: replay needs an environment that does the same again'
            )

    async def _release(self, state: str) -> None:
        if state in self._states:
            self._states.discard(state)
            if self._cares('release_state', state):
                await self._call('release_state', state, where=f'for state {state}')


def _copy(request: RolloutInferRequest, state: str) -> RolloutInferRequest:
    """One that hooks may change; texts and images are shared, as strings are."""
    copied = copy.deepcopy(request)
    copied.uuid = state
    return copied


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'
