"""Log-probs and gradients of a policy pass, interleaved, medians. The ways:

padded        as swift computes rows by default
padding_free  as swift computes them with --padding_free, where flash-attn is installed
packed        rows without padding by this package's own attention and head, nothing merged
shared        the same over their trie: against `packed` it shows what merging alone gives
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Limits, Segment
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import StopReason, response_ids
from treepo_swift.lab.lengths import LengthDistribution
from treepo_swift.trainer.shared_prefix.attention import can_use_varlen
from treepo_swift.trainer.shared_prefix.logprobs import trie_logprobs
from treepo_swift.trainer.shared_prefix.reasons import why_not_model
from treepo_swift.trainer.shared_prefix.trie import Trie, build_trie, lay_out_rows

from .result import hardware

SIZES: dict[str, dict[str, Any]] = {
    'quickstart': dict(
        vocab_size=320, hidden_size=160, intermediate_size=448, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, tie_word_embeddings=True,
    ),
    '0.5B': dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    '1.5B': dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    '7B': dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Shapes of Qwen2 models. Weights are random: they cost what trained ones cost."""


@dataclass(frozen=True)
class TrainedRow:
    """Token ids of a trajectory; those from `prompt` on are trained."""

    prompt: int
    ids: list[int]


def read_rows(path: str | Path) -> list[TrainedRow]:
    """A JSON list of ``[prompt tokens, [token ids]]``: the rows of one micro-batch."""
    rows = json.loads(Path(path).read_text())
    try:
        return [TrainedRow(int(prompt), [int(token) for token in ids]) for prompt, ids in rows]
    except (TypeError, ValueError):
        raise ValueError(f'{path}: it must be a list of [prompt tokens, [token ids]], one for each row.') from None


def grow_rows(
    config: TreeConfig, *, prompts: int, width: int, prompt_tokens: int, lengths: LengthDistribution, vocabulary: int
) -> list[TrainedRow]:
    """Trees of `config` by the real search. Each path draws its length when it starts, given that it is longer than
    its prefix; its tokens are random."""
    rows = []
    for index in range(prompts):
        dice = random.Random(f'{config.seed} {index}')
        prompt = [dice.randrange(vocabulary) for _ in range(prompt_tokens)]
        limits = Limits(config.max_response_tokens, prompt_tokens + config.max_response_tokens)
        search = TreeSearch(
            config, tree_id=str(index), prompt_ids=prompt, width=width, limits=limits, rng=dice, by_segment=True
        )
        length_of: dict[int, int] = {}
        requests = search.start()
        while requests:
            ask = requests.pop()
            done = ask.prefix.length
            length = length_of.setdefault(ask.path_id, lengths.draw(dice, longer_than=done))
            count = min(ask.max_tokens, ask.segment_tokens, length - done)
            tokens = [dice.randrange(vocabulary) for _ in range(count)]
            ends = done + count >= length and length < config.max_response_tokens
            search.extend(ask.path_id, Segment(tokens, [0.0] * count, StopReason.EOS if ends else None, [0.0] * count))
            requests += search.settle(ask.path_id)
        rows += [TrainedRow(prompt_tokens, prompt + response_ids(p.leaf)) for p in search.tree.trajectories]
    return rows


class TrainBench:
    """A model and the rows of one micro-batch."""

    def __init__(
        self,
        model: str,
        rows: Sequence[TrainedRow],
        *,
        device: str,
        micro_batch: int,
        padded_micro_batch: int = 0,
        checkpointing: bool,
        ways: Sequence[str] = (),
    ) -> None:
        """`model` is one of `SIZES`, with random weights, or a model id or folder, as --model of swift takes it.
        `padded_micro_batch` rows at once where logits of whole rows are made, as swift does; 0: as the others."""
        self.rows, self.device, self.micro_batch = list(rows), torch.device(device), micro_batch or len(rows)
        self.padded_micro_batch = padded_micro_batch or self.micro_batch
        flash = self.device.type == 'cuda' and find_spec('flash_attn') is not None
        self.dtype = torch.bfloat16 if self.device.type == 'cuda' else torch.float32
        attention = 'flash_attention_2' if flash else 'sdpa'
        self.model = self._random(model, attention) if model in SIZES else self._trained(model, attention)
        vocabulary, has = max(token for row in rows for token in row.ids) + 1, self.model.config.vocab_size
        if vocabulary > has:
            raise ValueError(f'The rows have token ids up to {vocabulary - 1}, {model} {has} tokens.')
        if checkpointing:
            self.model.gradient_checkpointing_enable({'use_reentrant': False})
        known: dict[str, Callable[[list[TrainedRow]], torch.Tensor]] = {
            'padded': self._padded,
            'padding_free': self._padding_free,
            'packed': partial(self._without_padding, lay_out_rows),
            'shared': partial(self._without_padding, build_trie),
        }
        if not flash:
            del known['padding_free']
        if unknown := [way for way in ways if way not in known]:
            raise ValueError(f'--ways: {", ".join(unknown)} can not be run here; allowed are {", ".join(known)}.')
        self.ways = {way: known[way] for way in ways or known}

    def _random(self, size: str, attention: str) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            **SIZES[size], max_position_embeddings=32768, initializer_range=0.05, attn_implementation=attention
        )
        # Made where it is used: 7 billion weights are drawn slowly by a CPU.
        with self.device, _default_dtype(self.dtype):
            return Qwen2ForCausalLM(config).train()

    def _trained(self, name: str, attention: str) -> Any:
        from swift.utils import safe_snapshot_download
        from transformers import AutoModelForCausalLM

        folder = safe_snapshot_download(name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, attn_implementation=attention)
        if reason := why_not_model(model):
            raise ValueError(f'{name}: a training computes its rows one by one, without trees: {reason}.')
        return model.to(self.device).train()

    def _padded(self, rows: list[TrainedRow]) -> torch.Tensor:
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(r.ids) + [0] * (longest - len(r.ids)) for r in rows], device=self.device)
        kept = longest - min(row.prompt for row in rows)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept + 1).logits
        logprobs = _select(logits[:, :-1], ids[:, -kept:])
        places = torch.arange(longest - kept, longest, device=self.device)
        prompts = torch.tensor([row.prompt for row in rows], device=self.device)
        return logprobs[(places >= prompts[:, None]) & mask[:, -kept:].bool()]

    def _padding_free(self, rows: list[TrainedRow]) -> torch.Tensor:
        ids = torch.tensor([[token for row in rows for token in row.ids]], device=self.device)
        positions = torch.tensor([[i for row in rows for i in range(len(row.ids))]], device=self.device)
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        trained = torch.tensor([i >= row.prompt for row in rows for i in range(len(row.ids))], device=self.device)
        return _select(logits[:, :-1], ids[:, 1:])[0, trained[1:]]

    def _without_padding(self, lay_out: Callable[[list[list[int]]], Trie], rows: list[TrainedRow]) -> torch.Tensor:
        asked = [np.arange(row.prompt, len(row.ids)) for row in rows]
        return trie_logprobs(self.model, lay_out([row.ids for row in rows]), asked)[0]

    def logprobs(self, way: str) -> torch.Tensor:
        """Of all trained tokens, without gradients; every way gives them in the same order."""
        with torch.no_grad():
            return torch.cat([self.ways[way](rows) for rows in self._micro_batches(way)])

    def run(self, way: str) -> dict[str, float]:
        """One forward without gradients, then one with and its backward; seconds, and the most memory above rest."""
        self.model.zero_grad(set_to_none=False)
        rest = self._start_of_memory()
        seconds = {'no_grad': 0.0, 'forward': 0.0, 'backward': 0.0}
        for rows in self._micro_batches(way):
            with torch.no_grad():
                seconds['no_grad'] += self._timed(partial(self.ways[way], rows))[0]
            spent, logprobs = self._timed(partial(self.ways[way], rows))
            seconds['forward'] += spent
            weights = torch.linspace(-1, 1, len(logprobs), device=self.device)
            seconds['backward'] += self._timed((weights * logprobs).mean().backward)[0]
        return {**seconds, 'peak_mib': self._peak_of_memory() - rest}

    def _micro_batches(self, way: str = '') -> list[list[TrainedRow]]:
        size = self.padded_micro_batch if way in ('padded', 'padding_free') else self.micro_batch
        return [self.rows[i : i + size] for i in range(0, len(self.rows), size)]

    def uses_varlen(self) -> bool:
        """Whether `packed` and `shared` run by torch's variable-length attention."""
        config = self.model.config
        size = config.hidden_size // config.num_attention_heads
        heads = (config.num_attention_heads, config.num_key_value_heads)
        query, key = (torch.zeros(1, n, size, device=self.device, dtype=self.dtype) for n in heads)
        return can_use_varlen(query, key)

    def _timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = function()
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - began, result

    def _start_of_memory(self) -> float:
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        # Memory that was freed but not given back would hide what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
        return _status('VmRSS')

    def _peak_of_memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.device.type == 'cuda' else _status('VmHWM')


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _status(key: str) -> float:
    """MiB, from what Linux says of this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _select(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of `ids`, row by row, as swift takes them."""
    found = []
    for row, tokens in zip(logits, ids, strict=True):
        row = row.float()
        found.append(row.gather(-1, tokens[:, None])[:, 0] - row.logsumexp(-1))
    return torch.stack(found)


def measure(bench: TrainBench, repeats: int) -> dict[str, Any]:
    """Medians of interleaved runs, and how far the ways' log-probs are from the first way's."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in bench.ways}
    logprobs: dict[str, torch.Tensor] = {}
    too_large = []
    # The first run is a warm-up.
    for repeat in range(repeats + 1):
        for way in list(runs):
            try:
                if not repeat:
                    logprobs[way] = bench.logprobs(way).cpu()
                done = bench.run(way)
            except torch.OutOfMemoryError:
                del runs[way]
                too_large.append(way)
                torch.cuda.empty_cache()
                continue
            if repeat:
                runs[way].append(done)
    if not runs:
        raise ValueError('No way of computing these rows fits into memory: give a smaller --micro-batch.')
    first = next(iter(runs))
    modes = {}
    for way, counted in runs.items():
        found = {key: median(run[key] for run in counted) for key in counted[0]}
        found['policy'] = median(run['forward'] + run['backward'] for run in counted)
        gaps = (logprobs[way] - logprobs[first]).abs()
        modes[way] = {**found, 'gap': gaps.max().item(), 'mean_gap': gaps.mean().item()}
    for way in modes:
        modes[way]['speed_up'] = modes[first]['policy'] / modes[way]['policy']
        modes[way]['no_grad_speed_up'] = modes[first]['no_grad'] / modes[way]['no_grad']
    batches = bench._micro_batches()
    return {
        'hardware': hardware(),
        'threads': torch.get_num_threads(),
        'dtype': str(bench.dtype).removeprefix('torch.'),
        'attention': bench.model.config._attn_implementation,
        'varlen': bench.uses_varlen(),
        'rows': len(bench.rows),
        'micro_batches': {way: len(bench._micro_batches(way)) for way in modes},
        'row_tokens': sum(len(row.ids) for row in bench.rows),
        'padded_tokens': sum(len(rows) * max(len(row.ids) for row in rows) for rows in bench._micro_batches('padded')),
        'trie_tokens': sum(len(build_trie([row.ids for row in rows]).tokens) for rows in batches),
        'repeats': repeats,
        'too_large': too_large,
        'modes': modes,
    }
