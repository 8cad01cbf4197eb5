"""Whether the text of a path says that it should stop: by the user's `check_segment` or by the config's checks."""

from __future__ import annotations

from collections.abc import Awaitable

from treepo_swift.config import TreeConfig
from treepo_swift.core.policies.stopping import text_verdict
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import Path, StopReason

from .hooks import HookError, HookRunner
from .text import PathReader
from .user import UserScheduler


class SegmentCheck:
    """Asked at every boundary of every path of a batch. What goes wrong raises `HookError`."""

    def __init__(
        self, user: UserScheduler, hooks: HookRunner, reader: PathReader, config: TreeConfig, *, asks_user: bool
    ) -> None:
        """`asks_user` where `check_segment` is the user's own."""
        self._user = user
        self._hooks = hooks
        self._reader = reader
        self._config = config
        self._asks_user = asks_user

    def verdict(self, search: TreeSearch, path: Path) -> StopReason | None | Awaitable[StopReason | None]:
        """A reason to stop; to be awaited where a hook is asked. Plain sampling has no early stop."""
        if search.width == 1:
            return None
        if self._asks_user:
            return self._ask_user(search, path, self._reader.text(path.leaf))
        try:
            return text_verdict(self._reader.state(path.leaf), path, self._config)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # an answer detector may be a user's, and raise SystemExit
            detector = f'stop.answer.detector={self._config.stop.answer.detector!r}'
            raised = f'raised {type(e).__name__}'
            raise HookError(detector, _where(search, path), f'{raised}: {e}', kind=raised) from e

    async def _ask_user(self, search: TreeSearch, path: Path, text: str) -> StopReason | None:
        name, where = f'{type(self._user).__name__}.check_segment', _where(search, path)
        timeout = self._config.faults.hook_timeout
        verdict = await self._hooks.call(self._user.check_segment, path, text, timeout=timeout, where=where, name=name)
        if verdict is not None and not isinstance(verdict, StopReason):
            raise HookError(name, where, f'returned {verdict!r}, allowed are a StopReason or None')
        return verdict


def _where(search: TreeSearch, path: Path) -> str:
    return f'on segment {path.leaf.depth} of path {path.id} of tree {search.tree.id}'
