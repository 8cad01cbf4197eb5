"""swift's micro-batches as rows of token ids, and log-probs back in its frame, padded or padding_free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .logprobs import trie_logprobs
from .reasons import MIN_RATIO, NotShared
from .trie import Ints, Trie, build_trie

KNOWN_INPUTS = {
    'input_ids',
    'attention_mask',
    'position_ids',
    'text_position_ids',
    'cu_seq_lens_q',
    'cu_seq_lens_k',
    'max_length_q',
    'max_length_k',
    'labels',
    'use_cache',
    'logits_to_keep',
}
"""What rows are made of, or what only says again how they are laid out."""
OUTSIDE = -1e10
"""What swift puts beside the rows of a padding_free batch."""
Result = tuple[torch.Tensor, torch.Tensor | None]
"""Log-probs and, where asked for, entropies in swift's frame ``[B, K]``."""
CACHE = '_treepo_rows'
"""Where a batch keeps its rows: old, reference and policy log-probs are of the same ones."""


@dataclass(frozen=True)
class Rows:
    """The rows of one micro-batch, their trie, and where their log-probs go."""

    trie: Trie
    asked: list[Ints]
    """For each row, the places of its trained tokens."""
    row_index: Ints
    columns: Ints
    """For each trained token, row after row, where swift's ``[B, K]`` holds it."""
    shape: tuple[int, int]
    outside: torch.Tensor | None
    """Of a padding_free batch, what of ``[B, K]`` is beside its rows."""
    computed_tokens: int
    """Tokens that the plain path computes, padding included."""

    @property
    def ids(self) -> list[Ints]:
        """The token ids of each row."""
        return [self.trie.tokens[path] for path in self.trie.paths]

    def logprobs(self, model: Any, *, temperature: float, entropies: bool) -> Result:
        """As swift's `_get_per_token_logps_and_entropies_single` gives them; 0 where no token is trained."""
        values, spread = trie_logprobs(model, self.trie, self.asked, temperature=temperature, entropies=entropies)
        return self.place(values), self.place(spread) if spread is not None else None

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each trained token, row after row -> swift's ``[B, K]``."""
        index = tuple(torch.from_numpy(array).to(values.device) for array in (self.row_index, self.columns))
        placed = values.new_zeros(self.shape).index_put(index, values)
        return placed if self.outside is None else placed.masked_fill(self.outside, OUTSIDE)


def read_rows(model_inputs: dict[str, Any], grpo_batch: Any, *, padding_free: bool) -> Rows:
    """The rows of a micro-batch. Raises `NotShared` where they are more than token ids, or none is trained."""
    rows = grpo_batch.__dict__.get(CACHE)
    if rows is None:
        unknown = sorted(k for k, v in model_inputs.items() if v is not None and k not in KNOWN_INPUTS)
        if unknown:
            raise NotShared(f'the model has inputs besides token ids: {", ".join(unknown)}')
        read = _read_padding_free if padding_free else _read_padded
        rows = read(model_inputs, grpo_batch)
        grpo_batch.__dict__[CACHE] = rows
    if not len(rows.columns):
        raise NotShared('a micro-batch has no token to train on')
    return rows


def refuse_too_little(trie: Trie) -> None:
    """Raise `NotShared` where rows share too little to be worth it."""
    if trie.ratio < MIN_RATIO:
        raise NotShared(f'a micro-batch shares too little ({trie.ratio:.2f} row tokens per token of its trie)')


def _read_padded(model_inputs: dict[str, Any], grpo_batch: Any) -> Rows:
    ids = model_inputs['input_ids'].cpu().numpy()
    mask = model_inputs.get('attention_mask')
    present = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)
    if present.shape != ids.shape:
        raise NotShared('a batch has an attention mask of its own')
    lengths = present.sum(1)
    starts = np.where(lengths > 0, present.argmax(1), 0)
    places = np.arange(ids.shape[1]) - starts[:, None]
    if ((places >= 0) & (places < lengths[:, None]) != present).any():
        raise NotShared('a row has padding inside')
    positions = model_inputs.get('position_ids')
    if positions is not None:
        if positions.shape != ids.shape or (positions.cpu().numpy() != places)[present].any():
            raise NotShared('a batch has positions of its own')
    trained = grpo_batch.completion_mask.cpu().numpy()
    kept = trained.shape[1]
    in_frame = places[:, ids.shape[1] - kept :]
    return _make([row[keep] for row, keep in zip(ids, present)], trained, in_frame, None, ids.size)


def _read_padding_free(model_inputs: dict[str, Any], grpo_batch: Any) -> Rows:
    ids = model_inputs['input_ids'].cpu().numpy()
    positions = model_inputs.get('text_position_ids')
    positions = model_inputs.get('position_ids') if positions is None else positions
    if positions is None or tuple(positions.shape) != ids.shape or len(ids) != 1:
        raise NotShared('a padding_free batch has positions of its own')
    positions = positions.cpu().numpy()[0]
    starts = np.flatnonzero(positions == 0)
    rows = np.split(ids[0], starts[1:])
    lengths = np.array([len(row) for row in rows])
    trained = grpo_batch.completion_mask.cpu().numpy()
    if len(rows) != len(trained) or (positions != np.concatenate([np.arange(n) for n in lengths])).any():
        raise NotShared('a padding_free batch has positions of its own')
    # swift's frame holds the end of each row, to the right.
    columns = np.arange(trained.shape[1]) - trained.shape[1]
    in_frame = lengths[:, None] + columns
    outside = columns < -grpo_batch.seq_lengths.cpu().numpy()[:, None]
    return _make(rows, trained, in_frame, torch.from_numpy(outside).to(grpo_batch.completion_mask.device), ids.size)


def _make(rows: list[Ints], trained: Any, in_frame: Ints, outside: torch.Tensor | None, computed: int) -> Rows:
    row_index, columns = np.nonzero(trained)
    places = in_frame[row_index, columns]
    if len(places) and (places < 1).any():
        raise NotShared('the first token of a row is trained')
    counts = np.bincount(row_index, minlength=len(rows))
    asked = np.split(places, np.cumsum(counts)[:-1])
    return Rows(build_trie(rows), asked, row_index, columns, trained.shape, outside, computed)
