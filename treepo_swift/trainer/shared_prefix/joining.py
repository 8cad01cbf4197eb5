"""Micro-batches of one optimizer step in one forward, each with the loss and the weight that it has by itself.

Trees that `--per_device_train_batch_size` cuts apart are whole again. The first micro-batch's pass computes the
log-probs of those after it too. Each loss is computed from a copy of its own log-probs, and its backward ends there.
When the last one has run, the gradients that came together go through the model at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from .batch import Result, Rows
from .logprobs import trie_logprobs
from .reasons import unwrap
from .trie import Trie, build_trie

LOGIT_BYTES = 10
"""Of each logit of a plain pass: itself in 16 bits, a copy in float32 and its gradient."""


class Joined:
    """Micro-batches whose log-probs are computed together, in the order in which they are trained."""

    def __init__(self, batches: Sequence[Any], rows: Sequence[Rows]) -> None:
        self.trie: Trie = build_trie([ids for part in rows for ids in part.ids])
        self._rows = {id(batch): part for batch, part in zip(batches, rows, strict=True)}
        ends = np.cumsum([0, *(len(part.columns) for part in rows)])
        self._places = {id(batch): slice(*map(int, ends[i : i + 2])) for i, batch in enumerate(batches)}
        self._first = batches[0]
        self._left: set[int] = set()
        self._values: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._entropies: torch.Tensor | None = None

    def logprobs(self, model: Any, *, temperature: float, entropies: bool) -> Result:
        """Those of the first micro-batch, as `Rows.logprobs` gives them; the others' are there to be taken."""
        asked = [places for rows in self._rows.values() for places in rows.asked]
        with _synchronized(model):
            self._values, self._entropies = trie_logprobs(
                model, self.trie, asked, temperature=temperature, entropies=entropies
            )
        self._copy = self._values.detach().requires_grad_(self._values.requires_grad)
        self._left = set(self._places)
        return self.take(self._first)

    def has(self, batch: Any) -> bool:
        """Whether the log-probs of a micro-batch are there to be taken."""
        return id(batch) in self._left

    def take(self, batch: Any) -> Result:
        """The log-probs and entropies of a micro-batch, once."""
        assert self._copy is not None
        self._left.remove(id(batch))
        place, rows = self._places[id(batch)], self._rows[id(batch)]
        spread = None if self._entropies is None else rows.place(self._entropies[place])
        return rows.place(self._copy[place]), spread

    @property
    def is_used_up(self) -> bool:
        return not self._left

    def backward(self) -> None:
        """Send on what the losses of the micro-batches asked for. What was not taken asked for nothing."""
        if self._values is not None and self._copy is not None and self._copy.grad is not None:
            self._values.backward(self._copy.grad)


Shared = Rows | Joined
"""What a pass computes over one trie."""


def affordable_tokens(model: Any, computed_tokens: int) -> int:
    """Tokens of a trie that need no more memory than a plain pass over `computed_tokens` tokens.

    A plain pass holds the logits of all of them. With gradient checkpointing the rest is little: for each token about
    2 bytes x layers x hidden size that are kept, and 17 x intermediate size of the layer at work (fitted to what
    docs/training.md reports). Half of what that leaves is taken. Without checkpointing the activations decide, and as
    many tokens are taken.
    """
    inner = unwrap(model)
    config = inner.config
    if not getattr(inner, 'is_gradient_checkpointing', False):
        return computed_tokens
    kept = 2 * config.num_hidden_layers * config.hidden_size + 17 * getattr(config, 'intermediate_size', 0)
    return int(computed_tokens * (1 + LOGIT_BYTES * config.vocab_size / kept / 2))


def fitting(parts: Sequence[Rows], max_tokens: int) -> int:
    """How many of `parts`, from the first on, have a common trie of at most `max_tokens`; at least one."""
    ids = list(parts[0].ids)
    for count, part in enumerate(parts[1:], start=1):
        ids += part.ids
        if len(build_trie(ids).tokens) > max_tokens:
            return count
    return len(parts)


def windows(count: int, size: int) -> list[range]:
    """Micro-batches 0 to `count` - 1 of a rollout, in groups that are trained in one optimizer step of `size`."""
    if count % size == 0:
        return [range(i, i + size) for i in range(0, count, size)]
    # One optimizer step takes whole rollouts; else steps and rollouts are out of step, and nothing goes together.
    return [range(count)] if size % count == 0 else [range(i, i + 1) for i in range(count)]


@contextmanager
def _synchronized(model: Any) -> Iterator[None]:
    """DDP decides in the forward whether its backward averages over ranks; this one belongs to an optimizer step."""
    if not isinstance(model, DistributedDataParallel) or not torch.is_grad_enabled():
        yield
        return
    before = model.require_backward_grad_sync
    model.require_backward_grad_sync = True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before
