"""What a scheduler keeps for each trajectory, as the paths of a tree need it: forked, and let go of."""

from __future__ import annotations

import copy


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
