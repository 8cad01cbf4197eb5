"""What went wrong in a batch, counted by kind: messages name paths and trees, so that no two are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import StopReason

from .outputs import RolloutError

SHOWN = 3
"""Kinds that a message names."""


class Failures:
    """Counts failed paths and failed trajectories of one batch."""

    def __init__(self, warn_once: Callable[[str, str], None]) -> None:
        """`warn_once(kind, message)` logs the first message of a kind, at once."""
        self._warn_once = warn_once
        self._paths: Counter[str] = Counter()
        self._trajectories: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        """Of all messages of this batch."""

    def add_path(self, error: Exception) -> None:
        """A path failed, or could not begin. It costs its tree that path; others may grow in its place."""
        self._add(getattr(error, 'kind', type(error).__name__), str(error))

    def add_tree(self, search: TreeSearch) -> None:
        """A tree has ended: count the trajectories that it does not have."""
        for path in search.tree.trajectories:
            if path.stop is not StopReason.FAILED:
                continue
            message = path.error or ''
            if search.last_error and message.endswith(search.last_error):
                message = search.last_error
            if message not in self._kinds:
                # The search gave up by itself: a policy raised, or the prompt has no room.
                self._add(message, message)
            self._trajectories[self._kinds[message]] += 1

    def check(self, total: int, allowed: float) -> None:
        """Raise `RolloutError` where more than the share `allowed` of the batch's `total` trajectories failed."""
        failed = self._trajectories.total()
        if failed > allowed * total:
            causes = '\n'.join(f'  {self._told(kind, n)}' for kind, n in self._trajectories.most_common(SHOWN))
            raise RolloutError(
                f'{failed} of {total} trajectories failed, more than faults.max_failure_fraction={allowed:g}. Most '
                f'common causes:\n{causes}'
            )

    def summary(self) -> str | None:
        """One sentence about the batch; None where nothing failed."""
        if not self._paths:
            return None
        kinds = [self._told(kind, n) for kind, n in self._paths.most_common(SHOWN)]
        rest = len(self._paths) - len(kinds)
        more = f'; and {rest} other kinds' if rest else ''
        return f'{self._paths.total()} paths failed in this batch: {"; ".join(kinds)}{more}'

    def _add(self, kind: str, message: str) -> None:
        self._paths[kind] += 1
        self._kinds[message] = kind
        self._examples.setdefault(kind, message)
        self._warn_once(kind, message)

    def _told(self, kind: str, count: int) -> str:
        example = self._examples[kind]
        return f'{count} x {kind}' + ('' if example == kind else f', e.g. {example}')
