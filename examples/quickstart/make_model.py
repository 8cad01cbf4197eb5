"""Make a small chat model from nothing, in a few minutes on two CPU cores and without a download.

    python make_model.py --output models/base

It trains a byte-level BPE tokenizer and a Qwen2 of about 1.3 million parameters on the demonstrations of `task.py`. The result
solves about half of the held-out problems when it samples, because it goes step by step about half of the time: what is
left for GRPO to learn is to do so always. The same seed and steps give the same model on the same machine.
"""
from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from task import STYLES, Problem, demonstrate, distinct_problems, is_correct, problems, style_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EOS, PAD = '<|im_end|>', '<|endoftext|>'
SPECIAL_TOKENS = [PAD, '<|im_start|>', EOS]
VOCAB_SIZE = 320
MAX_RESPONSE = 256
ROW_TOKENS = 320
IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`(input_ids, position_ids, labels)`, each [rows, ROW_TOKENS]; only answers carry loss."""

# No default system message, as in ms-swift's `chatml` template: training and serving must see the same prompt.
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: ms-swift tokenizes a prompt piece by piece, and only bytes survive every way of cutting it.

    Digits stay single tokens, so that adding is the same task at every place.
    """
    rng = random.Random(f'tokenizer-{seed}')
    stream = problems('pretrain', seed)
    corpus = [f'user\n{problem.prompt}\nassistant\n{demonstrate(problem, rng)}' for problem, _ in zip(stream, range(2000))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, additional_special_tokens=SPECIAL_TOKENS[1:2])
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
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


def encode_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    text = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def make_batches(tokenizer: PreTrainedTokenizerFast, *, steps: int, rows: int, seed: int) -> list[Batch]:
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
        prompt = encode_prompt(tokenizer, problem.prompt)
        answer = tokenizer.encode(demonstrate(problem, rng), add_special_tokens=False) + [tokenizer.eos_token_id]
        length = len(prompt) + len(answer)
        if len(ids) + length > ROW_TOKENS:
            pad = ROW_TOKENS - len(ids)
            packed.append((ids + [tokenizer.pad_token_id] * pad, positions + list(range(pad)), labels + [IGNORED] * pad))
            ids, positions, labels = [], [], []
        ids = ids + prompt + answer
        positions = positions + list(range(length))
        labels = labels + [IGNORED] * len(prompt) + answer
    tensors = [torch.tensor(column) for column in zip(*packed, strict=True)]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def pretrain(model: Qwen2ForCausalLM, batches: list[Batch], *, lr: float) -> None:
    # Muon for the matrices: with AdamW alone, copying digits (two attention layers that must find each other) takes longer to
    # appear than the whole run.
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
            # Positions that start again at 0 tell transformers where one demonstration ends, and it masks attention across.
            loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            progress.set_postfix(loss=f'{smooth:.3f}')


@torch.inference_mode()
def sample(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: list[Problem]) -> list[list[int]]:
    """One answer a problem at temperature 1, as token ids up to and including EOS."""
    model.eval()
    tokenizer.padding_side = 'left'
    inputs = tokenizer.pad({'input_ids': [encode_prompt(tokenizer, task.prompt) for task in tasks]}, return_tensors='pt')
    output = model.generate(**inputs, max_new_tokens=MAX_RESPONSE, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    answers = []
    for row in output[:, inputs['input_ids'].shape[1]:].tolist():
        answers.append(row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    return answers


def report(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, count: int, seed: int) -> None:
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
    parser.add_argument('--steps', type=int, default=600, help='optimizer steps; the default takes about 2.5 minutes on two cores')
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--lr', type=float, default=3e-3)
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
