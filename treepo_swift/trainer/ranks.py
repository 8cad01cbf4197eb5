"""`Ranks`: the processes of a training, and how they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar('T')


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others. All of them call each method at the same time."""

    index: int
    count: int
    main: int = 0
    """Index of the process that talks to rollout servers: swift's first, in Megatron its last."""

    @property
    def is_main(self) -> bool:
        return self.index == self.main

    def broadcast(self, function: Callable[[], T]) -> T:
        """Call `function` on the main process and give its result, or its exception, to every rank."""
        result: list[Any] = [None]
        if self.is_main:
            try:
                result = [function()]
            except Exception as e:
                result = [e]
        if self.count > 1:
            result = broadcast_object_list(result, from_process=self.main)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The ranks' lists one behind the other, on every rank."""
        return gather_object(values) if self.count > 1 else values
