"""Whether this run shares prefixes: proven once by the plain path, and given up with one line that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .batch import Result
from .joining import Shared
from .reasons import NotShared, unwrap, why_not_model

TOLERANCE = {
    torch.float64: (1e-5, 1e-6),
    torch.float32: (5e-3, 5e-4),
    torch.float16: (0.2, 5e-3),
    torch.bfloat16: (1.0, 3e-2),
}
"""Largest and mean difference of log-probs (nats) that rounding explains, by the type that a forward computes in."""
MIXED_PRECISION = {'fp16': torch.float16, 'bf16': torch.bfloat16}


class Sharing:
    """Decides pass by pass. Every rank makes the same number of forwards, whatever it can share itself: ZeRO-3 and
    DDP count on that. So ranks agree on the check, and only while it has not been made."""

    def __init__(
        self,
        *,
        enabled: bool,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        gather: Callable[[list[Any]], list[Any]] = list,
        mixed_precision: str | None = None,
    ) -> None:
        """`gather` collects a list over all ranks."""
        self.enabled = enabled
        self._say, self._warn, self._gather = say, warn, gather
        self._computes_in = MIXED_PRECISION.get(mixed_precision or '')
        self._said: set[str] = set()
        self._reasons: dict[tuple[int, bool], str | None] = {}
        self._checked: set[int] = set()

    def computes_in(self, model: Any) -> torch.dtype:
        """The type that a forward computes in."""
        return self._computes_in or next(unwrap(model).parameters()).dtype

    def give_up(self, reason: str) -> None:
        """For one pass; each reason is said once."""
        if reason not in self._said:
            self._said.add(reason)
            self._say(f'treepo: log-probs are computed row by row, not over the trie: {reason}.')

    def rows_for(self, model: Any, read: Callable[[], Shared]) -> Shared | None:
        """What `read` gives, or None where this pass is better computed row by row."""
        try:
            self._refuse(model)
            return read()
        except NotShared as e:
            self.give_up(str(e))
            return None

    def _refuse(self, model: Any) -> None:
        key = id(unwrap(model)), unwrap(model).training
        if key not in self._reasons:
            self._reasons[key] = why_not_model(model)
        if self._reasons[key] is not None:
            raise NotShared(f'{type(unwrap(model)).__name__}: {self._reasons[key]}')

    def run(
        self,
        model: Any,
        rows: Shared | None,
        shared: Callable[[Shared], Result],
        plain: Callable[[], Result],
        trained: torch.Tensor,
    ) -> tuple[Result, bool]:
        """The log-probs of one pass, and whether they came from the trie. `trained` marks what is compared."""
        model_id = id(unwrap(model))
        if model_id not in self._checked:
            if not any(self._gather([rows is not None])):
                return plain(), False
            self._checked.add(model_id)
            checked = self._check(model, rows, shared, plain, trained)
            if not torch.is_grad_enabled():
                return checked, self.enabled and rows is not None
        if self.enabled and rows is not None:
            return shared(rows), True
        return plain(), False

    @torch.no_grad()
    def _check(
        self,
        model: Any,
        rows: Shared | None,
        shared: Callable[[Shared], Result],
        plain: Callable[[], Result],
        trained: torch.Tensor,
    ) -> Result:
        """Compute both ways; without agreement on every rank this run shares no prefixes. Gives the plain result."""
        expected, fault, gap = plain(), None, 0.0
        if rows is None:
            plain()
        else:
            try:
                fault, gap = self._compare(model, shared(rows)[0][trained], expected[0][trained])
            except NotShared as e:
                fault = f'{type(unwrap(model)).__name__}: {e}'
        faults = [fault for fault in self._gather([fault]) if fault]
        if faults:
            self.enabled = False
            self._warn(f'treepo: this run shares no prefixes in training: {faults[0]}. Results are as without it.')
        elif rows is not None:
            self._say(
                f'treepo: log-probs are computed over the trie of each micro-batch ({rows.trie.ratio:.2f} row tokens '
                f'per token in the first). Checked against the plain path: {int(trained.sum())} log-probs differ by '
                f'at most {gap:.2g}.'
            )
        return expected

    def _compare(self, model: Any, found: torch.Tensor, expected: torch.Tensor) -> tuple[str | None, float]:
        gaps = (found.double() - expected.double()).abs()
        # A nan is no small difference.
        largest, mean = (value if value == value else float('inf') for value in (gaps.max().item(), gaps.mean().item()))
        dtype = self.computes_in(model)
        most, most_mean = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
        if largest <= most and mean <= most_mean:
            return None, largest
        return (
            f'log-probs over the trie differ from the plain path by up to {largest:.3g}, {mean:.3g} in the mean; '
            f'{dtype} explains {most:g} and {most_mean:g}'
        ), largest
