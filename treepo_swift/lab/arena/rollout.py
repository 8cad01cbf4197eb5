"""A step's trees, grown together by the package's own `TreeSearch` over the engine of this process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from treepo_swift.config import TreeConfig
from treepo_swift.core.messages import Limits, NextTurn, Segment, SegmentRequest
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import StopReason, Tree, response_ids
from treepo_swift.wire.report import TreeReport

from .engine import Engine
from .tasks import CALL, Problem, Task, decode, encode, reward


@dataclass(frozen=True)
class Answer:
    """A row of the batch."""

    problem: Problem
    token_ids: list[int]
    """Of the answer, EOS and a tool's included."""
    sampled: list[bool]
    """Which of them are the model's."""
    reward: float
    report: TreeReport
    """What the advantage estimators read."""


@dataclass
class _Growing:
    """A tree, and which slot of the engine holds which of its rows."""

    problem: Problem
    search: TreeSearch
    first_slot: int
    slot_of: dict[int, int] = field(default_factory=dict)
    """By path id."""
    rows: dict[int, list[int]] = field(default_factory=dict)
    """Response tokens in a slot."""

    def slot(self, request: SegmentRequest, prefix: list[int]) -> tuple[int, int | None]:
        """The request's slot, and where its prefix is to be copied from; None: it is there."""
        known = self.slot_of.get(request.path_id)
        if known is not None:
            return known, None
        free = self.first_slot + len(self.slot_of)
        self.slot_of[request.path_id] = free
        sources = [slot for slot, row in self.rows.items() if row[: len(prefix)] == prefix]
        # Before the first path there is only the prompt, in the first slot.
        return free, None if free == self.first_slot else (sources or [self.first_slot])[0]


def grow(
    engine: Engine,
    task: Task,
    config: TreeConfig,
    problems: Sequence[Problem],
    *,
    width: int,
    seed: int,
    generator: torch.Generator,
    progress: float = 0.0,
) -> list[Tree]:
    """A tree of `width` answers for each problem, all trees a segment at a time.

    The engine needs ``len(problems) * width`` slots. Stops are EOS and the limits; where the task has a tool, a call
    ends the turn. A path's reward is known as soon as it has ended.
    """
    trees = []
    for number, problem in enumerate(problems):
        prompt = encode(problem.prompt)
        search = TreeSearch(
            config,
            tree_id=str(number),
            prompt_ids=prompt,
            width=width,
            limits=Limits(task.max_answer, len(prompt) + task.max_answer),
            rng=random.Random(f'{seed}-{number}'),
            progress=progress,
            by_segment=True,
        )
        trees.append(_Growing(problem, search, number * width))
    engine.fill([tree.search.tree.prompt_ids for tree in trees], [tree.first_slot for tree in trees])
    asked = [(tree, request) for tree in trees for request in tree.search.start()]
    while asked:
        asked = _round(engine, task, asked, generator)
    return [tree.search.tree for tree in trees]


def _round(
    engine: Engine, task: Task, asked: list[tuple[_Growing, SegmentRequest]], generator: torch.Generator
) -> list[tuple[_Growing, SegmentRequest]]:
    """A segment for every path that grows; returns the requests that follow."""
    slots, lengths, last, limits = [], [], [], []
    source, target, prefixes = [], [], []
    for tree, request in asked:
        prefix = response_ids(request.prefix)
        slot, found = tree.slot(request, prefix)
        if found is not None:
            source.append(found)
            target.append(slot)
        prefixes.append(prefix)
        row = tree.search.tree.prompt_ids + prefix
        slots.append(slot)
        lengths.append(len(row))
        last.append(row[-1])
        limits.append(min(request.max_tokens, request.segment_tokens))
    engine.copy(source, target, max(lengths))
    following: list[tuple[_Growing, SegmentRequest]] = []
    spoken: list[tuple[int, int, list[int]]] = []
    sampled = engine.sample(slots, lengths, last, limits, generator=generator)
    for (tree, request), slot, prefix, said in zip(asked, slots, prefixes, sampled, strict=True):
        # Only now: a row is a source for forks once its slot holds it.
        tree.rows[slot] = prefix + said.token_ids
        stop = StopReason.EOS if said.ended else None
        path = tree.search.extend(request.path_id, Segment(said.token_ids, said.logprobs, stop, said.entropies))
        called = task.tool and decode(said.token_ids[-1:]) == CALL
        reply = encode(task.reply(decode(tree.rows[slot]))) if called else []
        if reply and tree.search.has_room(path.leaf.length + len(reply)):
            spoken.append((slot, len(tree.search.tree.prompt_ids) + path.leaf.length, [said.token_ids[-1], *reply]))
            tree.rows[slot] += reply
            new = tree.search.begin_turn(request.path_id, NextTurn(path.leaf.length, reply))
        else:
            ended = tree.search.stop_of(request.path_id, None)
            if ended is not None:
                path.reward = reward(tree.problem, decode(tree.rows[slot]), ended=ended is StopReason.EOS)
            new = tree.search.settle(request.path_id)
        following += [(tree, asked_next) for asked_next in new]
    if spoken:
        engine.read(*zip(*spoken, strict=True))
    return following


def answers(trees: Sequence[Tree], problems: Sequence[Problem]) -> list[Answer]:
    """The trees' trajectories with their rewards, tree by tree."""
    found = []
    for tree, problem in zip(trees, problems, strict=True):
        for index, path in enumerate(tree.trajectories):
            ids = response_ids(path.leaf)
            sampled = [node.sampled for node in path.leaf.lineage() for _ in node.token_ids]
            # A budget or a placeholder ends a path that nobody has judged: it has no answer.
            found.append(Answer(problem, ids, sampled, path.reward or 0.0, TreeReport.of(tree, index)))
    return found
