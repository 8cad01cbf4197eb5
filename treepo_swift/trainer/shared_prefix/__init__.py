"""Log-probs of rows that share prefixes, each shared token computed once; see docs/training.md.

`trie` merges rows, `packing` says where each log-prob is, `attention` lets a token see its own path only, `head`
computes log-probs where they are asked for, `logprobs` runs a model so; `reasons` and `trust` say when not to;
`mixin` hooks it into swift's trainer.
"""
