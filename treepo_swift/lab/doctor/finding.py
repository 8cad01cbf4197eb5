"""`Finding`: what a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from treepo_swift.config import ConfigError

Status = Literal['ok', 'warn', 'FAIL']


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    """What was looked at, in a word or two."""
    status: Status
    said: str
    fix: str = ''
    """What to do; empty where all is well."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f'{self.status:5} {self.name:14} {self.said}' + (f'\n      {"":14} -> {self.fix}' if self.fix else '')


def ok(name: str, said: str) -> Finding:
    return Finding(name, 'ok', said)


def warn(name: str, said: str, fix: str) -> Finding:
    return Finding(name, 'warn', said, fix)


def fail(name: str, said: str, fix: str) -> Finding:
    return Finding(name, 'FAIL', said, fix)


Check = Callable[[], 'Finding | Iterable[Finding]']


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings of all checks, one after the other; one that raises is a finding too."""
    for name, check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except ConfigError as e:
            yield fail('tree config', str(e), 'mend it there; `treepo-swift config --reference` lists the keys')
        except Exception as e:
            yield fail(name, f'{type(e).__name__}: {e}', 'see the message; where it helps nothing, please report it')
