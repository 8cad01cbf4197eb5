"""Make a small chat model from nothing, in a few minutes on two CPU cores and without a download.

    python make_model.py --output models/base

It trains a byte-level BPE tokenizer and a Qwen2 of about 1.3 million parameters on the demonstrations of `task.py`. The
result solves about half of the held-out problems when it samples, because it goes step by step about half of the time:
what is left for GRPO to learn is to do so always. The same seed, steps and threads give the same model on one machine.
"""
from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from task import DRILL_PROMPT, STYLES, Problem, demonstrate, distinct_problems, drill, is_correct, problems, style_of
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

START, EOS, PAD = '<|im_start|>', '<|im_end|>', '<|endoftext|>'
VOCAB_SIZE = 320
MAX_RESPONSE = 256
P_DRILL = 0.2
ROW_TOKENS = 320
IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`(input_ids, position_ids, labels)`, each [rows, ROW_TOKENS]; only answers carry loss."""

# No default system message, as in ms-swift's `chatml` template: training and serving must see the same prompt.
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Byte-level BPE: ms-swift tokenizes a prompt piece by piece, and only bytes survive every way of cutting it.

    Qwen2's own rules for cutting text into words, because transformers 5 loads every tokenizer of a Qwen2 model with
    them. They keep each digit a token of its own, so that adding is the same task at every place.
    """
    rng = random.Random(f'tokenizer-{seed}')
    stream = problems('pretrain', seed)
    corpus = [
        f'user\n{problem.prompt}\nassistant\n{demonstrate(problem, rng)}' for problem, _ in zip(stream, range(2000))
    ]
    blank = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD, extra_special_tokens=[START])
    tokenizer = blank.train_new_from_iterator(corpus, VOCAB_SIZE, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    ids = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    # Heads of 32: the smallest that vLLM's CPU attention supports.
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            initializer_range=0.05,
            **ids))
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
    return model


def encode_prompt(tokenizer: Qwen2Tokenizer, question: str) -> list[int]:
    messages = [{'role': 'user', 'content': question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def make_batches(tokenizer: Qwen2Tokenizer, *, steps: int, rows: int, seed: int) -> list[Batch]:
    """All batches of the run. Each row packs whole demonstrations, so that long and short answers share every batch
    and each token weighs the same: were batches sorted by length instead, short guesses would outweigh long counts.
    """
    rng = random.Random(f'demonstrations-{seed}')
    stream = problems('pretrain', seed)
    packed: list[tuple[list[int], list[int], list[int]]] = []
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    while len(packed) < steps * rows:
        problem = next(stream)
        drilled = rng.random() < P_DRILL
        prompt = encode_prompt(tokenizer, DRILL_PROMPT if drilled else problem.prompt)
        text = drill(rng) if drilled else demonstrate(problem, rng)
        answer = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        length = len(prompt) + len(answer)
        if len(ids) + length > ROW_TOKENS:
            pad = ROW_TOKENS - len(ids)
            pads = [tokenizer.pad_token_id] * pad
            packed.append((ids + pads, positions + list(range(pad)), labels + [IGNORED] * pad))
            ids, positions, labels = [], [], []
        ids = ids + prompt + answer
        positions = positions + list(range(length))
        labels = labels + [IGNORED] * len(prompt) + answer
    tensors = [torch.tensor(column) for column in zip(*packed, strict=True)]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def pretrain(model: Qwen2ForCausalLM, batches: list[Batch], *, lr: float) -> None:
    # Muon for the matrices: with AdamW alone, copying digits (two attention layers that must find each other) appears
    # only after two to three times as many steps.
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn='match_rms_adamw'),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    warmup = max(1, len(batches) // 30)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / len(batches))) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    smooth: float | None = None
    with tqdm(batches, desc='pre-training', unit='step') as progress:
        for input_ids, position_ids, labels in progress:
            # Positions that start again at 0 tell transformers where a demonstration ends; it masks attention across.
            loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            smooth = loss.item() if smooth is None else 0.9 * smooth + 0.1 * loss.item()
            progress.set_postfix(loss=f'{smooth:.3f}')


@torch.inference_mode()
def sample(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, tasks: list[Problem]) -> list[list[int]]:
    """One answer a problem at temperature 1, as token ids up to and including EOS."""
    model.eval()
    tokenizer.padding_side = 'left'
    inputs = tokenizer.pad({'input_ids': [encode_prompt(tokenizer, task.prompt) for task in tasks]},
                           return_tensors='pt')
    output = model.generate(**inputs, max_new_tokens=MAX_RESPONSE, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    answers = []
    for row in output[:, inputs['input_ids'].shape[1]:].tolist():
        answers.append(row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    return answers


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, count: int, seed: int) -> None:
    tasks = distinct_problems('heldout', count, seed)
    answers = sample(model, tokenizer, tasks)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    lengths = [len(answer) for answer in answers]
    right = [is_correct(text, task.solution) for text, task in zip(texts, tasks, strict=True)]
    styles = [style_of(text) for text in texts]
    print(f'held-out accuracy, sampled at temperature 1: {sum(right) / count:.2f} ({count} problems)')
    print(f'response tokens: mean {sum(lengths) / count:.0f}, longest {max(lengths)}; '
          f'ended by EOS: {sum(answer[-1] == tokenizer.eos_token_id for answer in answers) / count:.0%}')
    counts = Counter(styles)
    for style in STYLES:
        hits = sum(ok for ok, given in zip(right, styles, strict=True) if given == style)
        share = f'{counts[style] / count:4.0%} of the answers'
        print(f'  {style:<20}{share}' + (f', {hits / counts[style]:4.0%} of them right' if counts[style] else ''))
    for text in texts[:3]:
        print(f'--- a sample\n{text}')


def main() -> None:
    parser = argparse.ArgumentParser(description='Pre-train the quickstart model.')
    parser.add_argument('--output', type=Path, required=True, help='folder for the model and its tokenizer')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--steps', type=int, default=900, help='optimizer steps; 900 take about 2.3 minutes on two cores')
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--lr', type=float, default=5e-3)
    parser.add_argument('--threads', type=int, default=2, help='part of what makes a run repeatable')
    parser.add_argument('--eval-problems', type=int, default=128)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    print(f'{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokenizer)} tokens')
    pretrain(model, make_batches(tokenizer, steps=args.steps, rows=args.rows, seed=args.seed), lr=args.lr)
    tokenizer.save_pretrained(args.output)
    model.save_pretrained(args.output)
    print(f'{args.output}: made in {(time.monotonic() - started) / 60:.1f} minutes')
    report(model, tokenizer, count=args.eval_problems, seed=args.seed)


if __name__ == '__main__':
    main()
