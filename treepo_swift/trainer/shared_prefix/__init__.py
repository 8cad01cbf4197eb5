"""Log-probs of rows that share prefixes, each shared token computed once; see docs/training.md.

`shared_logprobs` is for everybody. `trie` merges rows, `packing` says where each log-prob is, `attention` lets a token
see its own path only, `head` computes log-probs where they are asked for, `logprobs` runs a model so. `batch` reads
swift's micro-batches, `reasons` and `trust` say when not to, `old_policy` which pass is not needed; `mixin` hooks it
into swift's trainer.
"""

from __future__ import annotations

from typing import Any

__all__ = ['NotShared', 'shared_logprobs']


def __getattr__(name: str) -> Any:
    # The trie needs no torch, so importing it loads none.
    if name == 'shared_logprobs':
        from .logprobs import shared_logprobs

        return shared_logprobs
    if name == 'NotShared':
        from .reasons import NotShared

        return NotShared
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
