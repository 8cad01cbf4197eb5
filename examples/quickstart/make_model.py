"""Make a small chat model from nothing, in a few minutes on two CPU cores and without a download.

    python make_model.py --output models/base
    python make_model.py --output models/other --task ../saved_calls/one_step_a_turn.py

It trains a byte-level BPE tokenizer and a Qwen2 of about 1.3 million parameters on the demonstrations of `task.py`. The
result solves about half of the held-out problems when it samples, because it goes step by step about half of the time:
what is left for GRPO to learn is to do so always. The same seed, steps and threads give the same model on one machine.
The other examples have tasks of their own, of several turns: class Task in `pretraining.py` says what a module needs.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from pretraining import (
    MAX_RESPONSE,
    Task,
    check_tokens,
    encode_prompt,
    generate,
    make_batches,
    make_model,
    make_tokenizer,
    play,
    pretrain,
)
from task import Problem
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


def sample(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, tasks: list[Problem]) -> list[list[int]]:
    """One answer to each of the quickstart's problems, as token ids up to and including EOS."""
    prompts = [encode_prompt(tokenizer, task.to_row()['messages'], None) for task in tasks]
    return generate(model, tokenizer, prompts, MAX_RESPONSE)


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, task: Task, *, count: int, seed: int) -> None:
    problems = task.module.distinct_problems('heldout', count, seed)
    conversations, answers = play(model, tokenizer, task, problems)
    turns = [turn for answer in answers for turn in answer]
    ended = sum(turn[-1] == tokenizer.eos_token_id for turn in turns) / len(turns)
    right = [task.succeeded(messages, problem) for messages, problem in zip(conversations, problems, strict=True)]
    styles = [task.style_of(messages) for messages in conversations]
    print(f'held-out accuracy, sampled at temperature 1: {sum(right) / count:.2f} ({count} problems)')
    print(
        f'response tokens: mean {sum(map(len, turns)) / count:.0f} in {len(turns) / count:.1f} turns, '
        f'longest turn {max(map(len, turns))}; ended by EOS: {ended:.0%}'
    )
    counts = Counter(styles)
    for style in task.styles:
        hits = sum(ok for ok, given in zip(right, styles, strict=True) if given == style)
        share = f'{counts[style] / count:4.0%} of the answers'
        print(f'  {style:<20}{share}' + (f', {hits / counts[style]:4.0%} of them right' if counts[style] else ''))
    for messages in conversations[:3]:
        texts = [messages[1]['content']] if len(messages) == 2 else [f'{m["role"]}: {m["content"]}' for m in messages]
        print('\n'.join(['--- a sample', *texts]))


def main() -> None:
    parser = argparse.ArgumentParser(description='Pre-train the model of the quickstart or of another example.')
    parser.add_argument('--output', type=Path, required=True, help='folder for the model and its tokenizer')
    parser.add_argument('--task', default='task', help="file or name of the task module; the quickstart's by default")
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--steps', type=int, help="optimizer steps; the quickstart's 900 take about 2.3 minutes on two cores"
    )
    parser.add_argument('--rows', type=int, help='rows of packed demonstrations in a step')
    parser.add_argument('--lr', type=float, default=5e-3)
    parser.add_argument('--threads', type=int, default=2, help='part of what makes a run repeatable')
    parser.add_argument('--eval-problems', type=int, default=128)
    args = parser.parse_args()

    task = Task.load(args.task)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    tokenizer = make_tokenizer(task, args.seed)
    model = make_model(tokenizer)
    print(f'{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokenizer)} tokens')
    tokenizer.save_pretrained(args.output)
    if task.is_multi_turn:
        # Before the minutes of training: the boundaries between turns are where two tokenizations part.
        model.config.save_pretrained(args.output)
        check_tokens(args.output, list(islice(task.conversations(args.seed), 200)))
    batches = make_batches(tokenizer, task, steps=args.steps or task.steps, rows=args.rows or task.rows, seed=args.seed)
    pretrain(model, batches, lr=args.lr)
    model.save_pretrained(args.output)
    print(f'{args.output}: made in {(time.monotonic() - started) / 60:.1f} minutes')
    report(model, tokenizer, task, count=args.eval_problems, seed=args.seed)


if __name__ == '__main__':
    main()
