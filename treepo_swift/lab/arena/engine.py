"""Samples segments for all paths of all trees at once, with a cache of keys and values that forks copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import Qwen2ForCausalLM

from .tasks import EOS

COMPACT_AT = 0.75
"""Rows that have ended are dropped from the batch once at most this share of it still grows."""


@dataclass(frozen=True)
class Sampled:
    """What one row said."""

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    """Of the whole distribution, in nats."""

    @property
    def ended(self) -> bool:
        return self.token_ids[-1] == EOS


class Engine:
    """A cache of `slots` rows of at most `length` tokens over a Qwen2 model, read anew each time the model changes.

    A slot holds the keys and values of every token of its row but the last: that is fed first when the row goes on.
    Shapes: B rows, H heads, T tokens, D of a head.
    """

    def __init__(self, model: Qwen2ForCausalLM, *, slots: int, length: int, stop_ids: Sequence[int] = (EOS,)) -> None:
        config = model.config
        self.model = model
        self._stop_ids = frozenset(stop_ids)
        self._heads = config.num_attention_heads
        self._eps = config.rms_norm_eps
        size = config.hidden_size // self._heads
        shape = (config.num_hidden_layers, slots, self._heads, length, size)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        angles = torch.arange(length)[:, None] / config.rope_parameters['rope_theta'] ** (
            torch.arange(0, size, 2) / size
        )
        angles = torch.cat([angles, angles], dim=-1)
        self._cos, self._sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def fill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Compute the prompts, each into a slot of its own."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        cache = self.model(input_ids=ids, use_cache=True).past_key_values
        for layer, found in enumerate(cache.layers):
            self._keys[layer, list(slots), :, :longest] = found.keys
            self._values[layer, list(slots), :, :longest] = found.values

    @torch.inference_mode()
    def read(self, slots: Sequence[int], lengths: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Append `tokens`, which nobody sampled, to rows of `lengths` tokens.

        Each begins with its row's last token, which no slot holds yet; all are equally long.
        """
        weights = _Weights.of(self.model)
        slot, position, ids = torch.tensor(slots), torch.tensor(lengths) - 1, torch.tensor(tokens)
        reach = max(lengths) + ids.shape[1]
        keys, values = self._keys[:, slot, :, :reach], self._values[:, slot, :, :reach]
        for place, token in enumerate(ids.T[:-1]):
            self._step(weights, token, position + place, keys, values)
        self._store(slot, keys, values, reach)

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """The first `length` tokens of rows, for those that fork from them."""
        if len(source):
            self._keys[:, list(target), :, :length] = self._keys[:, list(source), :, :length]
            self._values[:, list(target), :, :length] = self._values[:, list(source), :, :length]

    @torch.inference_mode()
    def sample(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        last: Sequence[int],
        limits: Sequence[int],
        *,
        generator: torch.Generator,
    ) -> list[Sampled]:
        """Go on from each slot's first `lengths` tokens, the last of which is `last`, to a stop id or `limits` tokens.

        Temperature 1. The same calls with the same generator give the same tokens.
        """
        weights = _Weights.of(self.model)
        rows = torch.arange(len(slots))
        slot, limit = torch.tensor(slots), torch.tensor(limits)
        position, token = torch.tensor(lengths) - 1, torch.tensor(last)
        reach = max(n + m for n, m in zip(lengths, limits))
        keys, values = self._keys[:, slot, :, :reach], self._values[:, slot, :, :reach]
        said: list[Sampled] = [Sampled([], [], []) for _ in slots]
        count = 0
        while True:
            logits = self._step(weights, token, position, keys, values)
            logprobs = logits.log_softmax(-1)
            chances = logprobs.exp()
            token = torch.multinomial(chances, 1, generator=generator)[:, 0]
            chosen = logprobs.gather(1, token[:, None])[:, 0].tolist()
            entropies = -(chances * logprobs).sum(-1)
            count += 1
            grew = rows >= 0
            open_ = []
            limits_now = limit.tolist()
            for index, (row, new, logprob, entropy) in enumerate(
                zip(rows.tolist(), token.tolist(), chosen, entropies.tolist(), strict=True)
            ):
                if row < 0:
                    continue
                said[row].token_ids.append(new)
                said[row].logprobs.append(logprob)
                said[row].entropies.append(entropy)
                if new in self._stop_ids or count >= limits_now[index]:
                    rows[index] = -1
                else:
                    open_.append(index)
            if not open_:
                break
            if len(open_) <= COMPACT_AT * len(rows):
                self._store(slot, keys, values, reach)
                kept = torch.tensor(open_)
                rows, slot, limit, position, token, grew = (x[kept] for x in (rows, slot, limit, position, token, grew))
                keys, values = keys[:, kept], values[:, kept]
            # A row that has ended runs along until it is dropped, at the place of its last token, which no slot holds.
            position = position + grew
        self._store(slot, keys, values, reach)
        return said

    def _store(self, slot: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reach: int) -> None:
        self._keys[:, slot, :, :reach] = keys
        self._values[:, slot, :, :reach] = values

    def _step(
        self, weights: _Weights, token: torch.Tensor, position: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] after one more token of each row; writes its keys and values at `position`."""
        batch = torch.arange(len(token))
        reach = int(position.max()) + 1
        hidden = weights.embedding[token]
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        unseen = (torch.arange(reach) > position[:, None])[:, None]
        mask = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, :, None]
        for layer, w in enumerate(weights.layers):
            normed = _rms(hidden, w.input_norm, self._eps)
            qkv = functional.linear(normed, w.qkv, w.qkv_bias).view(len(token), 3, self._heads, -1)
            query, key = _rotate(qkv[:, 0], cos, sin), _rotate(qkv[:, 1], cos, sin)
            keys[layer, batch, :, position] = key
            values[layer, batch, :, position] = qkv[:, 2]
            seen_keys, seen_values = keys[layer, :, :, :reach], values[layer, :, :, :reach]
            found = functional.scaled_dot_product_attention(query[:, :, None], seen_keys, seen_values, attn_mask=mask)
            hidden = hidden + functional.linear(found.reshape(len(token), -1), w.out)
            normed = _rms(hidden, w.output_norm, self._eps)
            gate, up = functional.linear(normed, w.gate_up).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, w.down)
        return functional.linear(_rms(hidden, weights.norm, self._eps), weights.head)


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    out: torch.Tensor
    output_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Weights:
    """A model's weights as a decoding step reads them."""

    embedding: torch.Tensor
    layers: list[_Layer]
    norm: torch.Tensor
    head: torch.Tensor

    @classmethod
    def of(cls, model: Qwen2ForCausalLM) -> _Weights:
        layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            layers.append(
                _Layer(
                    layer.input_layernorm.weight,
                    torch.cat([p.weight for p in projections]),
                    torch.cat([p.bias for p in projections]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )
        return cls(model.model.embed_tokens.weight, layers, model.model.norm.weight, model.lm_head.weight)


def _rms(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [B, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
