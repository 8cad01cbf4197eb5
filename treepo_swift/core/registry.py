"""A named table of strategies, with one clear error for a name that is not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from treepo_swift.config import ConfigError

T = TypeVar('T')


class Registry(Generic[T]):
    """Maps names to strategies of one kind (``kind`` is the word used in error messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its target under ``name``; a taken name raises ``ValueError``.

        A plugin file that is imported twice registers the same function of the same module again, which is fine.
        """

        def add(entry: T) -> T:
            if _origin(self._entries.get(name, entry)) != _origin(entry):
                raise ValueError(f'{self.kind} {name!r} is registered already: choose another name.')
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(f'Unknown {self.kind} {name!r}: allowed are {", ".join(sorted(self._entries))}.')
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, '__module__', ''), getattr(entry, '__qualname__', repr(entry))
