"""The small model, and its pre-training on demonstrations, kept on disk by a hash of all that it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from .settings import Pretraining
from .tasks import EOS, PAD, VOCABULARY, Task, encode

VERSION = 1
"""Of what the settings do not say: counted up where this file changes what comes of them."""


def make_model(settings: Pretraining) -> Qwen2ForCausalLM:
    """With random weights."""
    torch.manual_seed(settings.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=settings.hidden,
            intermediate_size=2 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
            initializer_range=0.05,
        )
    )


def pretrained(task: Task, settings: Pretraining, cache: Path, *, say: Any = print) -> Qwen2ForCausalLM:
    """The model that was trained on the task's demonstrations: from `cache` where it is there, or made now."""
    known = json.dumps([VERSION, dataclasses.asdict(task), settings.model_dump()], sort_keys=True)
    file = cache / f'{task.name}-{hashlib.blake2b(known.encode(), digest_size=6).hexdigest()}.safetensors'
    model = make_model(settings)
    if file.exists():
        load_model(model, file)
        return model
    pretrain(model, task, settings, say=say)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f'.{os.getpid()}')
    save_model(model, str(half))
    half.replace(file)  # nobody reads half a file
    return model


def pretrain(model: Qwen2ForCausalLM, task: Task, settings: Pretraining, *, say: Any) -> None:
    """Next-token loss over the answers of fresh demonstrations."""
    # Muon for the matrices: to copy from the prompt two layers must find each other, and AdamW alone is slow at that.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.lr, weight_decay=0.01, adjust_lr_fn='match_rms_adamw'),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rng = random.Random(f'demonstrations-{settings.seed}')
    problems = task.problems('pretrain', settings.seed)
    model.train()
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 20)
        rate = warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / settings.steps)) / 2)
        rows = []
        for _ in range(settings.rows):
            problem = next(problems)
            text = task.demonstrate(problem, rng)
            rows.append((encode(problem.prompt), [*encode(text), EOS], [*task.is_sampled(text), True]))
        ids, loss_mask = padded(rows)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')
        loss = (losses * loss_mask).sum() / loss_mask.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = settings.lr * rate
            optimizer.step()
        if (step + 1) % 100 == 0:
            say(f'pre-training {task.name}: step {step + 1} of {settings.steps}, loss {loss.item():.3f}')


Row = tuple[Sequence[int], Sequence[int], Sequence[bool]]
"""A prompt, an answer, and which of the answer's tokens were sampled: all but a tool's."""


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] of rows with padding behind, and which of ``ids[:, 1:]`` were sampled.

    Padding behind needs no attention mask: in a causal model nothing before it sees it.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest - 1)
    for row, (prompt, answer, sampled) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, len(prompt) - 1 : end - 1] = torch.tensor(sampled, dtype=mask.dtype)
    return ids, mask
