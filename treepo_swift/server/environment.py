"""What a scheduler keeps for each trajectory, as the paths of a tree need it: forked, and let go of."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swift.infer_engine.protocol import RolloutInferRequest

from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Node

from .concurrency import BackgroundTasks
from .hooks import HookError
from .replies import Reply, Turn, data_of, short
from .turn_hooks import TurnHooks


class ForkingState:
    """The part of `TreeRolloutScheduler` that is about the state of environments."""

    trajectory_state: tuple[str, ...] | None = None
    """Names of the dict attributes whose values under ``infer_request.uuid`` fork with a path; None: of all that have
    the uuid among their keys."""

    def fork_state(self, parent_id: str, child_id: str) -> None:
        """Called before hooks are asked about a turn: they change the state `child_id`, a copy of `parent_id`.

        `parent_id` stays as it is, for other paths to start from. Both are what hooks see as ``infer_request.uuid``.
        """
        for name in self.state_attributes(parent_id):
            states = getattr(self, name)
            try:
                states[child_id] = copy.deepcopy(states[parent_id])
            except Exception as e:
                raise TypeError(
                    f'{name} holds a {type(states[parent_id]).__name__} that can not be copied ({e}): '
                    'override fork_state, or set fork_state: replay'
                ) from e

    def release_state(self, state_id: str) -> None:
        """Called once for each state when no path can start from it any more."""
        for name in self.state_attributes(state_id):
            getattr(self, name).pop(state_id, None)

    # Machinery below.

    def state_attributes(self, state_id: str) -> list[str]:
        """Names of the dict attributes that hold something for a state."""
        names = list(vars(self)) if self.trajectory_state is None else self.trajectory_state
        return [name for name in names if isinstance(getattr(self, name), dict) and state_id in getattr(self, name)]

    def move_state(self, parent_id: str, child_id: str) -> None:
        """Let a child take its parent's state over, which nobody needs any more."""
        for name in self.state_attributes(parent_id):
            states = getattr(self, name)
            states[child_id] = states.pop(parent_id)


class EnvironmentStates:
    """The states of one tree's environment, one for each place where a turn begins.

    Hooks are asked about a turn on a fork of the state that the turn began with. A state is released as soon as no
    path, fork or fallback can start from it any more, in the background: nobody waits for an environment that closes.
    """

    def __init__(
        self,
        hooks: TurnHooks,
        search: TreeSearch,
        *,
        by_copy: bool,
        background: BackgroundTasks,
        failed: Callable[[HookError], None],
    ) -> None:
        """`by_copy` is ``fork_state: copy``; `failed` hears what goes wrong while a state is released."""
        self._hooks = hooks
        self._search = search
        self._by_copy = by_copy
        self._background = background
        self._failed = failed
        self._original: RolloutInferRequest
        self._alive: dict[str, None] = {}
        """In the order in which they came."""
        self._in_use: Counter[str] = Counter()
        """States with which hooks work now, and how many."""
        self._moved: set[str] = set()
        """Those that a child has taken over (``fork_state: replay``)."""

    async def start(self, original: RolloutInferRequest) -> RolloutInferRequest:
        """Start the tree's environment; returns the request with which it begins."""
        self._original = original
        return await self._start(self._search.tree.id)

    @contextmanager
    def using(self, *states: str) -> Iterator[None]:
        """While hooks work with `states`, none is released. What nobody needs afterwards is."""
        self._in_use.update(states)
        try:
            yield
        finally:
            self._in_use.subtract(states)
            self.release_unneeded()

    async def fork(self, begun: Turn, child: str, where: str) -> None:
        """Make the state `child` of that with which the turn after `begun` started."""
        parent = begun.request.uuid
        self._alive[child] = None
        if self._by_copy:
            if self._concerns('fork_state', parent):
                await self._hooks.call('fork_state', parent, child, where=where)
        elif parent not in self._moved and self._hooks.user.state_attributes(parent):
            # The first to come takes the environment as it stands; it must be played again for the others.
            self._moved.add(parent)
            self._hooks.user.move_state(parent, child)
        elif 'on_trajectory_start' in self._hooks.overridden or parent in self._moved:
            await self._replay(begun, child, where)

    def release_unneeded(self) -> None:
        """Let go of the states from which nothing can start any more."""
        needed = {data_of(node).begins.request.uuid for node in self._needed_turn_starts()}
        for state in [s for s in self._alive if s not in needed and self._in_use[s] <= 0]:
            del self._alive[state]
            if self._concerns('release_state', state):
                self._background.start(self._release(state))

    def release_all(self) -> None:
        """When the tree has ended, whatever ended it."""
        for state in self._alive:
            if self._concerns('release_state', state):
                self._background.start(self._release(state))
        self._alive.clear()

    def _needed_turn_starts(self) -> set[Node]:
        """Where turns begin that are not over on every path, or that fallback may cut in or behind."""
        starts: set[Node] = set()
        for node in self._search.open_nodes():
            start: Node | None = node.turn_start
            while start is not None and start not in starts:
                starts.add(start)
                # A fallback may keep any number of turns of a path.
                start = start.start if self._search.forks.may_cut else None
        return starts

    def _concerns(self, hook: str, state: str) -> bool:
        """Whether a hook about states has something to do."""
        return hook in self._hooks.overridden or bool(self._hooks.user.state_attributes(state))

    async def _release(self, state: str) -> None:
        try:
            await self._hooks.call('release_state', state, where=f'for state {state}')
        except HookError as e:
            self._failed(e)

    async def _start(self, state: str) -> RolloutInferRequest:
        self._alive[state] = None
        return await self._hooks.start(self._original, state, f'at the root of tree {self._search.tree.id}')

    async def _replay(self, begun: Turn, child: str, where: str) -> None:
        """Bring a fresh environment to where the turn after `begun` started."""
        request = await self._start(child)
        first = data_of(self._search.tree.root).begins
        self._check_replay(request.messages, first.request.messages, 'on_trajectory_start', where)
        for turn in begun.so_far():
            choice = copy.deepcopy(turn.choice)
            ids, logprobs = list(choice.token_ids), [item['logprob'] for item in choice.logprobs['content']]
            ended, finished = await self._hooks.end(turn.previous, Reply.of(ids), choice, child, where)
            self._check_replay(finished, False, 'check_finished', where)
            again = await self._hooks.step(ended, choice, logprobs, where)
            self._check_replay(again.request.messages, turn.request.messages, 'step', where)
            self._search.tree.stats.replayed_turns += 1

    def _check_replay(self, again: Any, before: Any, hook: str, where: str) -> None:
        if again != before:
            raise HookError(
                self._hooks.name(hook),
                where,
                f'gave {short(again)} when its turn was played again, and {short(before)} at first. fork_state: '
                'replay needs an environment that does the same again',
                kind='did something else when its turn was played again',
            )
