"""What the rest of the server asks of `TreeRolloutScheduler`, which stands above it: hooks, states and settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class UserScheduler(Protocol):
    """A scheduler, with the hooks that its user may have overridden (those of swift's base class are asked by name)."""

    max_turns: int | None
    by_segment: bool
    check_segment: Callable[..., Any]

    def state_attributes(self, state_id: str) -> list[str]:
        """Names of the dict attributes that hold something for a state."""

    def move_state(self, parent_id: str, child_id: str) -> None:
        """Let a child take its parent's state over."""
