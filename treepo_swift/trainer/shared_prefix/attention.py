"""Attention over a packed trie: each token sees its own path only, and only those pairs are computed.

A chain's tokens are consecutive queries; their keys are the chain's whole path, gathered. That is causal attention
with fewer queries than keys, aligned at the end. On CUDA it is one variable-length call; elsewhere chains of like
size go together into one padded call of torch's scaled dot-product attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from .reasons import NotShared
from .trie import Chain, Trie

LAYOUT = 'shared_prefix'
"""Name of the keyword argument that carries a `Layout` through the model to its attention."""
CALL_COST = 4096
"""Query-key pairs that take as long as one more call: a bucket is cut only where that saves more padding."""
VARLEN_DEVICES = ('cuda',)
VARLEN_DTYPES = (torch.float16, torch.bfloat16)
"""Where torch's variable-length attention has a kernel."""
MAX_MASK_BYTES = 2**30
"""Most memory for the masks of one pass; a few thousand tokens of long rows."""
UNKNOWN = ('softcap', 's_aux', 'position_bias', 'head_mask', 'cache')
"""Arguments of attention functions that change its result in ways that are not computed here."""


@dataclass(frozen=True)
class Bucket:
    """Chains of like size, padded: n chains of at most q queries and k keys."""

    queries: torch.Tensor
    """Positions [n * q]. Padding repeats the chain's first query, and nobody reads its result."""
    keys: torch.Tensor
    """Positions [n * k]. Padding is never seen."""
    depths: torch.Tensor
    """Depth of each query [n, q]: it sees the keys up to there."""
    num_keys: int


@dataclass
class Layout:
    """How the tokens of one packed row see each other. Travels with a forward, and with its recomputation."""

    chains: Sequence[Chain]
    device: torch.device
    pairs: int
    """`Trie.pairs`."""
    calls: int = 0
    """How often attention asked; one layer, one call, without recomputation."""
    _buckets: tuple[list[Bucket], torch.Tensor] | None = None
    _masks: dict[torch.dtype, list[torch.Tensor]] = field(default_factory=dict)
    _lengths: Any = None

    @classmethod
    def of(cls, trie: Trie, device: torch.device) -> Layout:
        return cls(trie.chains, device, trie.pairs)

    @property
    def longest(self) -> int:
        return max((len(chain.path) for chain in self.chains), default=0)

    def buckets(self) -> tuple[list[Bucket], torch.Tensor]:
        """All buckets, and for each position where in their results, one after the other, its own is."""
        if self._buckets is None:
            made, places, offset = [], [], 0
            groups = group_chains(self.chains)
            order = [chain for group in groups for chain in group]
            for group in groups:
                made.append(_make_bucket(group, self.device))
                width = len(made[-1].queries) // len(group)
                places += [np.arange(c.length) + offset + i * width for i, c in enumerate(group)]
                offset += len(made[-1].queries)
            where = np.empty(sum(c.length for c in order), np.int64)
            for chain, place in zip(order, places, strict=True):
                where[chain.start : chain.start + chain.length] = place
            self._buckets = made, torch.from_numpy(where).to(self.device)
        return self._buckets

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """For each bucket what is added to its scores [n, 1, q, k]; made once for all layers."""
        if dtype not in self._masks:
            made = []
            for bucket in self.buckets()[0]:
                keys = torch.arange(bucket.num_keys, device=self.device)
                hidden = keys > bucket.depths.unsqueeze(-1)
                made.append(torch.zeros(hidden.shape, dtype=dtype, device=self.device))
                made[-1].masked_fill_(hidden, -torch.inf)
            self._masks[dtype] = [mask.unsqueeze(1) for mask in made]
        return self._masks[dtype]

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """For variable-length attention: key positions, where chains' queries and keys begin, and the most of each."""
        if self._lengths is None:
            paths = np.concatenate([chain.path for chain in self.chains])
            queries = np.cumsum([0, *(chain.length for chain in self.chains)])
            keys = np.cumsum([0, *(len(chain.path) for chain in self.chains)])
            self._lengths = (
                torch.from_numpy(paths).to(self.device),
                torch.from_numpy(queries).to(self.device, torch.int32),
                torch.from_numpy(keys).to(self.device, torch.int32),
                max(chain.length for chain in self.chains),
                self.longest,
            )
        return self._lengths


def group_chains(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Cut the chains, by number of queries, into groups whose padding and calls together cost least."""
    ordered = sorted(chains, key=lambda chain: (-chain.length, -len(chain.path)))
    queries = np.array([chain.length for chain in ordered], dtype=np.int64)
    keys = np.array([len(chain.path) for chain in ordered], dtype=np.int64)
    count = len(ordered)
    best, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        # Groups [begin, end): as wide as their first chain, as long as their longest path.
        longest = np.maximum.accumulate(keys[:end][::-1])[::-1]
        cost = best[:end] + CALL_COST + (end - np.arange(end)) * queries[:end] * longest
        cut[end] = cost.argmin()
        best[end] = cost[cut[end]]
    groups, end = [], count
    while end:
        groups.append(ordered[cut[end] : end])
        end = int(cut[end])
    return groups[::-1]


def _make_bucket(group: Sequence[Chain], device: torch.device) -> Bucket:
    num_queries, num_keys = group[0].length, max(len(chain.path) for chain in group)
    queries = np.empty((len(group), num_queries), np.int64)
    keys = np.empty((len(group), num_keys), np.int64)
    depths = np.empty((len(group), num_queries), np.int64)
    for i, chain in enumerate(group):
        offsets = np.arange(num_queries)
        offsets[chain.length :] = 0
        queries[i], depths[i] = chain.start + offsets, chain.depth + offsets
        keys[i] = chain.start
        keys[i, : len(chain.path)] = chain.path
    as_tensor = lambda array: torch.from_numpy(array).to(device)
    return Bucket(as_tensor(queries.reshape(-1)), as_tensor(keys.reshape(-1)), as_tensor(depths), num_keys)


# One layer.


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, layout: Layout
) -> torch.Tensor:
    """Queries, keys, values [1, heads, T, d], with fewer heads of keys where they are shared -> [1, T, heads, d]."""
    # Under autocast rotary positions leave queries and keys in float32; SDPA would convert them, others would not.
    rows = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
    function: Callable[..., torch.Tensor] = _varlen
    if not can_use_varlen(rows[0], rows[1]):
        refuse_large_masks(layout.pairs, rows[0].dtype)
        function = _padded
    return function(*rows, scaling, layout).unsqueeze(0)


def _padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, layout: Layout
) -> torch.Tensor:
    found = []
    buckets, where = layout.buckets()
    for bucket, mask in zip(buckets, layout.masks(query.dtype), strict=True):
        count = len(bucket.depths)
        result = scaled_dot_product_attention(
            _take(query, bucket.queries, count, query.shape[1]),
            _take(key, bucket.keys, count, query.shape[1]),
            _take(value, bucket.keys, count, query.shape[1]),
            attn_mask=mask,
            scale=scaling,
        )
        found.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, where)


def _take(tensor: torch.Tensor, positions: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """[T, heads, d] at positions [count * k] -> [count, heads, k, d], shared heads repeated."""
    taken = tensor.index_select(0, positions).view(count, -1, *tensor.shape[1:]).transpose(1, 2)
    return taken if tensor.shape[1] == heads else taken.repeat_interleave(heads // tensor.shape[1], dim=1)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, layout: Layout
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    positions, queries, keys, most_queries, most_keys = layout.lengths()
    options: dict[str, Any] = {'scale': scaling, 'window_size': (-1, 0)}
    if 'enable_gqa' in inspect.signature(varlen_attn).parameters:  # else fewer heads of keys are taken as they are
        options['enable_gqa'] = key.shape[1] != query.shape[1]
    return varlen_attn(
        query.contiguous(),
        key.index_select(0, positions),
        value.index_select(0, positions),
        queries,
        keys,
        most_queries,
        most_keys,
        **options,
    )


def needs_masks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is known to run in the padded form there."""
    known = [works for kind, works in _varlen_works.items() if (kind[0].type, kind[1]) == (device.type, dtype)]
    return device.type not in VARLEN_DEVICES or dtype not in VARLEN_DTYPES or (bool(known) and not all(known))


def refuse_large_masks(pairs: int, dtype: torch.dtype) -> None:
    """Raise `NotShared` where the masks of the padded form would need more memory than sharing saves."""
    size = pairs * dtype.itemsize
    if size > MAX_MASK_BYTES:
        raise NotShared(
            f'no variable-length attention runs in {dtype} here, and masks for {pairs:,} pairs of tokens would take '
            f'{size / 2**30:.1f} GiB'
        )


_varlen_works: dict[tuple[Any, ...], bool] = {}


def can_use_varlen(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether torch's variable-length attention runs here, and agrees with the padded form on a small trie, gradients
    too. It must align fewer queries than keys at the end; that is tried on the device, not looked up."""
    if query.device.type not in VARLEN_DEVICES or query.dtype not in VARLEN_DTYPES:
        return False
    kind = (query.device, query.dtype, *query.shape[1:], key.shape[1])
    if kind not in _varlen_works:
        # In a thread of its own, where autograd has no hooks: the first call may come from within a layer that is
        # checkpointed, and a backward there would compute the layer again.
        with ThreadPoolExecutor(1) as thread:
            _varlen_works[kind] = thread.submit(_try_varlen, query.detach(), key.detach()).result()
    return _varlen_works[kind]


def _try_varlen(query: torch.Tensor, key: torch.Tensor) -> bool:
    from .trie import build_trie

    layout = Layout.of(build_trie([[1, 2, 3, 4, 5], [1, 2, 6], [1, 2, 6, 7]]), query.device)
    length = sum(chain.length for chain in layout.chains)
    # Fixed numbers: the run's random state stays as it is.
    made = [torch.arange(length * like[0].numel()).view(length, *like.shape[1:]) for like in (query, key, key)]
    inputs = [(numbers * (i + 0.7)).sin().to(query).requires_grad_() for i, numbers in enumerate(made)]
    try:
        with torch.enable_grad():
            found = [_with_gradients(function(*inputs, None, layout), inputs) for function in (_varlen, _padded)]  # type: ignore[call-arg]
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return all(torch.allclose(ours, theirs, atol=3e-2, rtol=3e-2) for ours, theirs in zip(*found, strict=True))


def _with_gradients(result: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad((weights * result).sum(), inputs)]


# The model's own attention, wrapped.


def install() -> None:
    """Let every attention of transformers' models ask for a `Layout` first; without one it is what it was."""
    from transformers.modeling_utils import AttentionInterface

    found = getattr(AttentionInterface, 'get_interface', None)
    if found is None:
        raise NotShared('this version of transformers has no AttentionInterface.get_interface')
    if getattr(found, 'shares_prefixes', False):
        return

    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return _wrap(found(self, attn_implementation, default))

    get_interface.shares_prefixes = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layout = kwargs.pop(LAYOUT, None)
        if layout is None:
            return function(module, query, key, value, mask, *args, **kwargs)
        refuse_arguments(kwargs, layout)
        layout.calls += 1
        return attend(query, key, value, kwargs.get('scaling'), layout), None

    return attention


def refuse_arguments(kwargs: dict[str, Any], layout: Layout) -> None:
    """Raise `NotShared` where a layer asks for attention that is not causal over the whole path."""
    if kwargs.get('dropout'):
        raise NotShared('attention dropout is active')
    window = kwargs.get('sliding_window')
    if window is not None and window < layout.longest:
        raise NotShared(f'a layer sees a window of {window} tokens only')
    if kwargs.get('is_causal') is False:
        raise NotShared('a layer has attention that is not causal')
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise NotShared(f"a layer's attention has {name}")
