"""Log-probs of rows by one forward over their trie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .attention import LAYOUT, Layout, install
from .head import Edges, SharedHead, replaced_head
from .packing import find_targets
from .reasons import NotShared, unwrap, why_not_model
from .trie import Ints, Trie, build_trie


def shared_logprobs(
    model: Any, rows: Sequence[Sequence[int] | torch.Tensor], *, temperature: float = 1.0
) -> list[torch.Tensor]:
    """For each row of token ids the log-probs of ``row[1:]``, with gradients, each shared token computed once.

    Rows need no padding, no order, and may share any prefixes. `model` is a causal language model of transformers, in
    any wrapper of DDP, DeepSpeed or PEFT. Raises `NotShared` for models where the result would not be exact.
    """
    reason = why_not_model(model)
    if reason is not None:
        raise NotShared(f'{type(unwrap(model)).__name__}: {reason}.')
    arrays = [np.asarray(torch.as_tensor(row).cpu(), dtype=np.int64).reshape(-1) for row in rows]
    asked = [np.arange(1, len(row)) for row in arrays]
    logprobs, _ = trie_logprobs(model, build_trie(arrays), asked, temperature=temperature)
    return list(logprobs.split([len(places) for places in asked]))


def trie_logprobs(
    model: Any, trie: Trie, asked: Sequence[Ints], *, temperature: float = 1.0, entropies: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The asked log-probs of all rows, one after the other, and where wanted the entropies (without gradients).

    `asked` holds for each row the places of the tokens that are wanted. Raises `NotShared` where the model turns out
    not to run as expected.
    """
    install()
    inner = unwrap(model)
    device = next(inner.parameters()).device
    targets = find_targets(trie, asked)
    if not len(targets.parents):
        raise NotShared('no log-prob is asked for')
    edges = Edges.of(targets, num_tokens=len(trie.tokens), vocabulary=inner.config.vocab_size, device=device)
    layout = Layout.of(trie, device)
    values = _forward(model, trie, layout, edges, temperature, entropies)
    found = values[0].index_select(0, torch.from_numpy(targets.gather).to(device))
    return found[:, 0], found[:, 1].detach() if entropies else None


def _forward(model: Any, trie: Trie, layout: Layout, edges: Edges, temperature: float, entropies: bool) -> torch.Tensor:
    inner = unwrap(model)
    shared = SharedHead(inner.get_output_embeddings(), edges, temperature, entropies)
    tensor = lambda array: torch.from_numpy(array).to(layout.device).unsqueeze(0)
    # A mask of four dimensions is taken as it is; without one, transformers would take the jumps of the positions for
    # starts of packed rows. Nobody reads it: attention goes by the layout.
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=layout.device)
    inputs = {'input_ids': tensor(trie.tokens), 'position_ids': tensor(trie.depths), 'attention_mask': mask}
    with replaced_head(inner, shared):
        logits = model(**inputs, use_cache=False, logits_to_keep=edges.parents, **{LAYOUT: layout}).logits
    layers = inner.config.num_hidden_layers
    if layout.calls != layers:
        raise NotShared(f'its {layers} layers asked {layout.calls} times for attention')
    if shared.result is None or not _same(logits, shared.result):
        raise NotShared('it changes its logits after the head')
    return logits


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
