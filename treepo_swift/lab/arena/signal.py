"""Signal and noise of each method's gradient on a fixed batch of prompts, before any training.

The true gradient g* is that of the expected reward, from very many independent answers with leave-one-out baselines,
summed over tokens. For a method's gradients g over resampled trees, with u = g* / |g*|:

    signal = E<g, u>^2        noise = E|g|^2 - signal

so that what points elsewhere counts as noise, whether it is scatter or bias. The mean of k batches has k times the
ratio of one, so ratios are given per 1,000 decoded tokens. The scale of a method's advantages cancels out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from treepo_swift.config import TreeConfig

from .engine import Engine
from .learn import advantages, make_engine, policy_loss
from .model import pretrained
from .rollout import answers, grow
from .settings import Matrix, Method
from .tasks import Problem, Task

TRUTH_WIDTH = 64
"""Answers a prompt in a batch of the true gradient."""
TRUTH = Method(independent=True, tree={'advantage': {'estimator': 'rloo', 'normalisation': 'none'}})


@dataclass(frozen=True)
class Batch:
    """What one resampled batch says."""

    along: float
    """<g, u>"""
    square: float
    """|g|^2"""
    tokens: int
    """Decoded."""


@dataclass(frozen=True)
class Signal:
    """Of one method."""

    method: str
    ratio: float
    """Signal over noise, per 1,000 decoded tokens."""
    error: float
    """Standard error of `ratio` (jackknife over batches)."""
    cosine: float
    """Between the method's mean gradient and the true one, the noise of the former taken out: below 1 it is biased."""
    tokens: float
    """Decoded, a batch."""


def ratio_of(batches: Sequence[Batch]) -> float:
    """Signal over noise per 1,000 decoded tokens; not a number for a method whose gradients are all 0."""
    signal = fmean(batch.along for batch in batches) ** 2
    noise = fmean(batch.square for batch in batches) - signal
    return 1000 * signal / noise / fmean(batch.tokens for batch in batches) if noise else float('nan')


def signal_of(method: str, batches: Sequence[Batch], mean_square: float) -> Signal:
    """`mean_square` is |mean g|^2. Raises ``ValueError`` for less than two batches, which show no noise."""
    count = len(batches)
    if count < 2:
        raise ValueError(f'{count} batches show no noise: at least 2 are needed.')
    left_out = [ratio_of([b for j, b in enumerate(batches) if j != i]) for i in range(count)] if count > 2 else []
    middle = fmean(left_out) if left_out else 0.0
    error = sqrt((count - 1) / count * sum((value - middle) ** 2 for value in left_out)) if left_out else float('nan')
    scatter = (fmean(batch.square for batch in batches) - mean_square) / (count - 1)
    length = sqrt(max(mean_square - scatter, 0.0))
    cosine = fmean(batch.along for batch in batches) / length if length else float('nan')
    return Signal(method, ratio_of(batches), error, cosine, fmean(batch.tokens for batch in batches))


def measure(matrix: Matrix, count: int, cache: Path, *, threads: int, say: Callable[[str], Any]) -> list[Signal]:
    """Every method's signal and noise over `count` batches; as many of 64 answers a prompt give the true gradient."""
    if count < 2:
        raise ValueError(f'--snr {count}: one batch shows no noise.')
    torch.set_num_threads(threads)
    task, training = matrix.the_task, matrix.training
    model = pretrained(task, matrix.pretraining, cache, say=say).eval()
    problems = list(itertools.islice(task.problems('train', 0), training.prompts))
    widest = max(TRUTH_WIDTH, *(matrix.training_of(name).width for name in matrix.methods))
    engine = make_engine(model, task, slots=len(problems) * widest)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    truth = TRUTH.config(task, TRUTH_WIDTH)
    for number in range(count):
        total += _gradient(model, engine, task, truth, problems, TRUTH_WIDTH, 10_000 + number, 'dapo')[0]
    if not total.norm():
        raise ValueError('no prompt had answers of different rewards, so that there is no gradient to measure.')
    direction = total / total.norm()
    say(f'the true gradient: {count * len(problems) * TRUTH_WIDTH:,} answers')
    found = []
    for name in matrix.methods:
        width, config = matrix.training_of(name).width, matrix.config_of(name)
        batches, total = [], torch.zeros_like(total)
        for number in range(count):
            gradient, tokens = _gradient(model, engine, task, config, problems, width, number, training.loss_type)
            total += gradient
            batches.append(Batch(float(gradient @ direction), float(gradient @ gradient), tokens))
        found.append(signal_of(name, batches, float((total / count) @ (total / count))))
        say(f'{name}: {found[-1].ratio:.4f} ± {found[-1].error:.4f}')
    return found


def _gradient(
    model: Qwen2ForCausalLM,
    engine: Engine,
    task: Task,
    config: TreeConfig,
    problems: Sequence[Problem],
    width: int,
    seed: int,
    loss_type: str,
) -> tuple[torch.Tensor, int]:
    """The gradient of one freshly sampled batch as one vector, and the tokens that it took."""
    generator = torch.Generator().manual_seed(seed)
    trees = grow(engine, task, config, problems, width=width, seed=seed, generator=generator)
    batch = answers(trees, problems)
    model.zero_grad(set_to_none=True)
    policy_loss(model, batch, advantages(batch, config), loss_type).backward()
    # Down the loss is up the reward.
    parts = [-p.grad.flatten() for p in model.parameters()]
    return torch.cat(parts).double(), sum(tree.stats.decoded_tokens for tree in trees)


def rows(found: Sequence[Signal]) -> list[dict[str, str]]:
    """For a table."""
    base = found[0]
    return [
        {
            'method': one.method,
            'signal / noise per 1,000 tokens': f'{one.ratio:.4f} ± {one.error:.4f}',
            f'over {base.method}': f'{one.ratio / base.ratio:.2f}',
            'cosine to the true gradient': f'{one.cosine:.2f}',
            'tokens a batch': f'{one.tokens:,.0f}',
        }
        for one in found
    ]
