"""Why a model or a batch is computed row by row, as ever."""

from __future__ import annotations

from typing import Any

import torch

MIN_RATIO = 1.1
"""Row tokens per token of the trie below which sharing is not worth its own cost."""
FIXED_ROPE = ('default', 'linear', 'yarn', 'llama3', 'proportional')
"""Kinds of rotary tables that do not depend on how long a batch is."""


class NotShared(Exception):
    """This batch can not be computed over its trie; the message says why."""


def unwrap(model: Any) -> Any:
    """The model inside DDP and DeepSpeed."""
    while isinstance(getattr(model, 'module', None), torch.nn.Module):
        model = model.module
    return model


def why_not_model(model: Any) -> str | None:
    """What about `model` (as it is now) forbids sharing; None where nothing is known to."""
    inner = unwrap(model)
    config = getattr(inner, 'config', None)
    if config is None or not callable(getattr(inner, 'get_output_embeddings', None)):
        return 'it is not a causal language model of transformers'
    if inner.get_output_embeddings() is None:
        return 'it has no output embeddings'
    if getattr(config, 'vision_config', None) is not None or getattr(config, 'audio_config', None) is not None:
        return 'it is multimodal'
    if len(set((getattr(inner, 'hf_device_map', None) or {}).values())) > 1:
        return 'its layers are on several devices'
    return (
        _why_not_layers(config) or _why_not_rope(config) or _why_not_logits(config) or _why_not_dropout(inner, config)
    )


def _why_not_layers(config: Any) -> str | None:
    if not isinstance(getattr(config, 'num_hidden_layers', None), int):
        return 'its config has no num_hidden_layers'
    kinds = set(getattr(config, 'layer_types', None) or ()) - {'full_attention', 'sliding_attention'}
    if kinds:
        return f'it has layers of other kinds ({", ".join(sorted(kinds))})'
    if getattr(config, 'attn_logit_softcapping', None):
        return 'its attention has a soft cap'
    return None


def _why_not_rope(config: Any) -> str | None:
    parameters = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None)
    if not parameters:
        return None if getattr(config, 'rope_theta', None) else 'it has no rotary positions'
    tables = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for table in tables:
        if 'mrope_section' in table:
            return 'its positions have several dimensions'
        kind = table.get('rope_type', table.get('type', 'default'))
        if kind not in FIXED_ROPE:
            return f'its rotary table may depend on the length of a batch (rope_type {kind})'
    return None


def _why_not_logits(config: Any) -> str | None:
    if getattr(config, 'final_logit_softcapping', None):
        return 'its logits have a soft cap'
    if getattr(config, 'output_router_logits', False):
        return 'it has a router loss'
    return None


def _why_not_dropout(model: Any, config: Any) -> str | None:
    if not model.training:
        return None
    if getattr(config, 'attention_dropout', None):
        return 'attention dropout is active'
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0 and module.training:
            hint = '; for LoRA set --lora_dropout 0' if 'lora' in name else ''
            return f'dropout is active ({name}{hint})'
    return None
