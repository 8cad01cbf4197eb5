"""Turns of one tree: users' hooks are asked when a turn has ended, and what they say becomes the next turn's tokens.

ms-swift's `MultiTurnScheduler.run` is the model: the same hooks in the same order with the same arguments. What differs
is that a turn may have several successors. So every turn begins with a request and an environment state that nobody
changes any more, and hooks work on copies of both.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from swift.infer_engine.protocol import ChatCompletionResponseChoice, ChatMessage, RolloutInferRequest
from swift.utils import remove_response

from treepo_swift.core.messages import NextTurn
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Path, StopReason, response_ids

from .engine import Prompt, SegmentEngine
from .environment import EnvironmentStates
from .hooks import HookError
from .replies import NodeData, Reply, Turn, data_of, told_reward
from .turn_hooks import TurnHooks, copy_for


class Conversation:
    """The turns of one tree."""

    def __init__(
        self,
        search: TreeSearch,
        *,
        hooks: TurnHooks,
        states: EnvironmentStates,
        engine: SegmentEngine,
        prefix: Callable[[RolloutInferRequest], list[int]],
        keep_choices: bool,
    ) -> None:
        """`prefix` gives the tokens with which the template begins every reply. `keep_choices` where turns may have to
        be played again."""
        self.states = states
        self._search = search
        self._hooks = hooks
        self._engine = engine
        self._prefix = prefix
        self._keep_choices = keep_choices

    async def begin(self, request: RolloutInferRequest) -> Prompt:
        """Start the environment, and encode what it begins with. Raises `HookError`, or what the template raises."""
        original = copy_for(self._search.tree.id, request)
        remove_response(original.messages)
        request = await self.states.start(original)
        self._hooks.prefix = self._prefix(request)
        prompt = await self._engine.encode(request)
        data_of(self._search.tree.root).begins = Turn(0, request, prompt)
        return prompt

    @asynccontextmanager
    async def ended_turn(self, path: Path, stop: StopReason) -> AsyncIterator[NextTurn | StopReason]:
        """Ask the hooks about a turn that has ended: how the path goes on, or a reason if it was its last turn.

        Within the block whoever asked puts that into the tree; then states are released that nobody needs any more.
        Raises `HookError`.
        """
        begun = data_of(path.leaf.turn_start).begins
        tree_id, number = self._search.tree.id, begun.number + 1
        where, state = f'after turn {number} on path {path.id} of tree {tree_id}', f'{tree_id}/{path.id}.{number}'
        with self.states.using(begun.request.uuid, state):
            try:
                following = await self._following(path, stop, begun, state, where)
            except HookError:
                raise
            except Exception as e:
                # Messages can be wrong in more ways than are checked for, and must not end the batch.
                problem = f'what its hooks left can not be used: {type(e).__name__}: {e}'
                raise HookError(type(self._hooks.user).__name__, where, problem) from e
            if isinstance(following, StopReason):
                path.reward = told_reward(data_of(path.leaf).ended)
            yield following

    async def _following(
        self, path: Path, stop: StopReason, begun: Turn, state: str, where: str
    ) -> NextTurn | StopReason:
        start = path.leaf.start
        nodes = path.leaf.lineage(since=start)
        ids = [token for node in nodes for token in node.token_ids]
        logprobs = [value for node in nodes for value in node.logprobs]
        await self.states.fork(begun, state, where)
        choice = self._choice(begun, ids, logprobs, stop)
        told = copy.deepcopy(choice) if self._keep_choices else None
        ended, finished = await self._hooks.end(begun, Reply.of(ids), choice, state, where)
        if finished:
            data_of(path.leaf).ended = ended
            return stop
        following = await self._hooks.step(ended, choice, logprobs, where)
        prompt, environment_ids = await self._environment_tokens(path, following, where)
        keep = start.length + following.reply.sampled
        if not self._search.has_room(keep + len(environment_ids)):
            data_of(path.leaf).ended = ended
            return StopReason.CONTEXT_LIMIT
        prompt = dataclasses.replace(prompt, token_ids=self._search.tree.prompt_ids)
        begins = dataclasses.replace(following, prompt=prompt, choice=told)
        return NextTurn(keep, environment_ids, NodeData(begins=begins))

    # Tokens.

    def _choice(
        self, begun: Turn, ids: Sequence[int], logprobs: Sequence[float], stop: StopReason
    ) -> ChatCompletionResponseChoice:
        content = [{'token': f'token_id:{token}', 'logprob': value} for token, value in zip(ids, logprobs, strict=True)]
        text = self._engine.completion(begun.prompt, list(ids), first=not begun.continues)
        return ChatCompletionResponseChoice(
            0, ChatMessage('assistant', text), stop.finish_reason, {'content': content}, token_ids=list(ids)
        )

    async def _environment_tokens(self, path: Path, following: Turn, where: str) -> tuple[Prompt, list[int]]:
        """The next turn's prompt, and those of its tokens that stand behind what was sampled so far."""
        if following.continues:
            return following.prompt, following.reply.inserted
        so_far = [*self._search.tree.prompt_ids, *response_ids(path.leaf.start), *following.reply.ids]
        prompt = await self._encode(following, where)
        if prompt.token_ids[: len(so_far)] != so_far:
            raise HookError(
                self._hooks.name('step'),
                where,
                'with what it returned, the template does not give the tokens so far any more. Trees need the exact '
                'history: append messages, and change neither earlier ones nor what stands before them (tools, system)',
            )
        return prompt, following.reply.inserted + prompt.token_ids[len(so_far) :]

    async def _encode(self, turn: Turn, where: str) -> Prompt:
        """The next turn's prompt: replies as the tokens that they are, the rest by the template."""
        request = copy_for(turn.request.uuid, turn.request)
        for index, replies in turn.replies():
            ids = [*self._hooks.prefix, *(token for reply in replies for token in reply.ids)]
            # Not as a list, which agent templates take for a list of texts.
            request.messages[index]['content'] = {'token_ids': ids}
        try:
            return await self._engine.encode(request)
        except Exception as e:
            problem = f'the template can not encode what it returned: {type(e).__name__}: {e}'
            raise HookError(self._hooks.name('step'), where, problem) from e
