"""The language-model head, only where a log-prob is asked for, in pieces that bound its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from .packing import Targets
from .reasons import NotShared

MAX_LOGITS = 2**26
"""Most logits that are held at once, and kept for the backward. More are made in pieces, and again in the backward.
With ZeRO-3 they are kept, as the plain path keeps its own."""


@dataclass(frozen=True)
class Edges:
    """`Targets` as tensors, and how they are cut."""

    parents: torch.Tensor
    edge_parents: torch.Tensor
    edge_tokens: torch.Tensor
    pieces: list[tuple[slice, slice]]
    """Of parents, and of the edges that leave them."""
    num_tokens: int
    """T of the trie."""

    @classmethod
    def of(cls, targets: Targets, *, num_tokens: int, vocabulary: int, device: torch.device) -> Edges:
        size = max(MAX_LOGITS // vocabulary, 1)
        starts = np.append(np.arange(0, len(targets.parents), size), len(targets.parents))
        bounds = np.searchsorted(targets.edge_parents, starts)
        pieces = [
            (slice(*map(int, starts[i : i + 2])), slice(*map(int, bounds[i : i + 2]))) for i in range(len(starts) - 1)
        ]
        tensors = [
            torch.from_numpy(np.ascontiguousarray(array)).to(device)
            for array in (targets.parents, targets.edge_parents, targets.edge_tokens)
        ]
        return cls(*tensors, pieces, num_tokens)  # type: ignore[call-arg]


class SharedHead:
    """Stands in for a head's forward: hidden states in, log-probs of edges and entropies out.

    It runs within the model's own forward, so hooks of DDP and ZeRO-3 see the head as always. [1, E, 2].
    """

    def __init__(self, head: Any, edges: Edges, temperature: float, entropies: bool) -> None:
        self.forward = head.forward
        # ZeRO-3 has a weight whole only while its module runs: nothing can be computed again from it afterwards.
        self.may_recompute = not any(hasattr(parameter, 'ds_id') for parameter in head.parameters())
        self.edges, self.temperature, self.entropies = edges, temperature, entropies
        self.result: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parents = self.edges.parents
        if hidden.shape[1] == self.edges.num_tokens:
            hidden = hidden.index_select(1, parents)
        if self.result is not None or hidden.shape[:2] != (1, len(parents)):
            raise NotShared('the model uses its head in a way of its own')
        found = []
        for parents, edges in self.edges.pieces:
            part = hidden[:, parents]
            given = (part, self.edges.edge_parents[edges] - parents.start, self.edges.edge_tokens[edges])
            if self.may_recompute and len(self.edges.pieces) > 1 and torch.is_grad_enabled():
                found.append(checkpoint(self._piece, *given, use_reentrant=False))
            else:
                found.append(self._piece(*given))
        self.result = torch.cat(found).unsqueeze(0)
        return self.result

    def _piece(self, hidden: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.forward(hidden)[0]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        total = logits.logsumexp(-1)
        logprobs = logits[parents, tokens] - total[parents]
        if not self.entropies:
            return torch.stack((logprobs, torch.zeros_like(logprobs)), dim=-1)
        with torch.no_grad():
            shifted = logits - total.unsqueeze(-1)
            entropies = -(shifted.exp() * shifted).sum(-1)
        return torch.stack((logprobs, entropies[parents]), dim=-1)


@contextmanager
def replaced_head(model: Any, shared: SharedHead) -> Iterator[None]:
    """While it lasts, the head of `model` is `shared`."""
    head = model.get_output_embeddings()
    own = head.__dict__.get('forward')
    head.forward = shared
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
