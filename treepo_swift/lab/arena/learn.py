"""One run: trees, rewards, advantages, one policy update a step, until its decoded tokens are spent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from transformers import Qwen2ForCausalLM

from treepo_swift.advantage.batch import SegmentAdvantages, tree_advantages
from treepo_swift.config import TreeConfig

from .engine import Engine
from .model import padded
from .rollout import Answer, answers, grow
from .runs import Marks, Point
from .settings import Method, Training
from .tasks import Problem, Task, encode

EPSILON = 0.2
"""Of the clipped loss: swift's default. With one update for each rollout the ratio is 1 and nothing is clipped."""
LONGEST_PROMPT = 32
ALONE = Method(independent=True)
"""One answer to a prompt, as held-out accuracy asks for."""


def train(
    model: Qwen2ForCausalLM, task: Task, config: TreeConfig, settings: Training, *, lr: float, seed: int
) -> list[Point]:
    """Train `model` in place and return its curve: a point before the first step, and one at each mark that a step
    reaches. The last step is the one that reaches ``settings.tokens``. The same arguments give the same curve."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    engine = make_engine(model, task, slots=max(settings.prompts * settings.width, settings.heldout))
    prompts = task.problems('train', seed)
    heldout = list(itertools.islice(task.problems('heldout', 0), settings.heldout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    decoded = trained = steps = 0
    seconds = 0.0
    points = [Point(0, 0, 0, 0.0, accuracy(engine, task, heldout, seed))]
    marks = Marks(settings.tokens, settings.marks)
    while decoded < settings.tokens:
        began = time.perf_counter()
        problems = list(itertools.islice(prompts, settings.prompts))
        model.eval()
        trees = grow(
            engine,
            task,
            config,
            problems,
            width=settings.width,
            seed=seed * 1_000_003 + steps,
            generator=generator,
            progress=decoded / settings.tokens,
        )
        batch = answers(trees, problems)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        policy_loss(model, batch, advantages(batch, config), settings.loss_type).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decoded += sum(tree.stats.decoded_tokens for tree in trees)
        trained += sum(sum(answer.sampled) for answer in batch)
        steps += 1
        seconds += time.perf_counter() - began
        if marks.passed(decoded):
            right = accuracy(engine, task, heldout, seed + steps)
            points.append(Point(decoded, trained, steps, round(seconds, 3), right, *reward_and_flat(batch)))
    return points


def reward_and_flat(batch: Sequence[Answer]) -> tuple[float, float]:
    """Mean reward, and the share of prompts whose answers all have the same. Placeholders are no answers."""
    by_tree: dict[str, list[float]] = {}
    for answer in batch:
        if not answer.report.is_placeholder:
            by_tree.setdefault(answer.report.id, []).append(answer.reward)
    rewards = [value for values in by_tree.values() for value in values]
    return fmean(rewards), sum(len(set(values)) == 1 for values in by_tree.values()) / len(by_tree)


def make_engine(model: Qwen2ForCausalLM, task: Task, *, slots: int) -> Engine:
    return Engine(model, slots=slots, length=LONGEST_PROMPT + task.max_answer, stop_ids=task.stop_ids)


def advantages(batch: Sequence[Answer], config: TreeConfig) -> list[SegmentAdvantages]:
    """By the package's own estimators and normalisation, of all answers of a step."""
    return tree_advantages(
        [answer.report for answer in batch],
        [answer.reward for answer in batch],
        [sum(answer.sampled) for answer in batch],
        config,
    )


def policy_loss(
    model: Qwen2ForCausalLM, batch: Sequence[Answer], advantage: Sequence[SegmentAdvantages], loss_type: str
) -> torch.Tensor:
    """swift's clipped loss of GRPO without a KL term, as a mean over answers (`grpo`) or over tokens (`dapo`).

    ``-min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)`` per token, with the ratio to the policy that sampled, which
    is the one that trains. `grpo` takes the mean over each answer's tokens and then over answers; `dapo` the mean over
    all tokens of the step.
    """
    ids, mask_BT = padded([(encode(answer.problem.prompt), answer.token_ids, answer.sampled) for answer in batch])
    advantage_BT = torch.zeros_like(mask_BT)
    for row, found in enumerate(advantage):
        each = [value for value, count in zip(found.values, found.tokens, strict=True) for _ in range(count)]
        advantage_BT[row, mask_BT[row].bool()] = torch.tensor(each)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logprob_BT = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')
    ratio_BT = (logprob_BT - logprob_BT.detach()).exp()
    clipped_BT = ratio_BT.clamp(1 - EPSILON, 1 + EPSILON)
    loss_BT = -torch.min(ratio_BT * advantage_BT, clipped_BT * advantage_BT) * mask_BT
    if loss_type == 'dapo':
        return loss_BT.sum() / mask_BT.sum()
    return (loss_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1.0)).mean()


def accuracy(engine: Engine, task: Task, problems: Sequence[Problem], seed: int) -> float:
    """Share of right answers, one sampled for each problem at temperature 1."""
    engine.model.eval()
    config = ALONE.config(task, 1)
    generator = torch.Generator().manual_seed(seed)
    trees = grow(engine, task, config, problems, width=1, seed=seed, generator=generator)
    return fmean(answer.reward for answer in answers(trees, problems))
