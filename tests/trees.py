"""Records of trees for tests of files and viewers, without a trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from treepo_swift.core.tree import TreeStats
from treepo_swift.wire.record import NodeRecord, TrajectoryRecord, TreeRecord

WORDS = 'so we add the first number to what is left of it and carry one then check again'.split()


def words(dice: random.Random, count: int) -> list[str]:
    return [f' {dice.choice(WORDS)}' for _ in range(count)]


def node(
    id: int,
    parent: int,
    pieces: Sequence[str],
    *,
    depth: int = 1,
    size: int = 1,
    value: float = 0.0,
    said: bool = False,
) -> NodeRecord:
    return NodeRecord(
        id=id,
        parent=parent,
        depth=depth,
        kind='environment' if said else 'segment',
        tokens=[100 + i for i in range(len(pieces))],
        text=''.join(pieces),
        pieces=[len(piece) for piece in pieces],
        size=size,
        value=value,
        logprobs=None if said else [round(-0.37 * (i % 5), 4) for i in range(len(pieces))],
    )


def answer(leaf: int, reward: float | None, *, stop: str = 'eos', **fields) -> TrajectoryRecord:
    rewards = {} if reward is None else {'right': reward}
    return TrajectoryRecord(leaf, stop, 5, reward, rewards, 0.0 if reward is None else reward - 0.5, **fields)


def tree(
    id: str,
    nodes: list[NodeRecord],
    trajectories: list[TrajectoryRecord],
    *,
    step: int = 1,
    prompt: str = '<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n',
    run: str = '2026-01-02T03:04:05Z',
) -> TreeRecord:
    rewards = [t.reward for t in trajectories if t.reward is not None]
    return TreeRecord(
        run=run,
        step=step,
        mode='train',
        tree=id,
        prompt=prompt,
        prompt_tokens=[1, 2, 3],
        nodes=nodes,
        trajectories=trajectories,
        value=sum(rewards) / len(rewards) if rewards else None,
        estimator='treepo',
        normalisation='whiten',
        stats=dict.fromkeys(TreeStats.__dataclass_fields__, 0),
    )


def small(
    id: str = 'small', *, step: int = 1, rewards: Sequence[float] = (1.0, 0.0, 0.0), text: str = ' twelve'
) -> TreeRecord:
    """A trunk that forks in two; one branch calls a tool; a fallback from the first answer; one path that failed."""
    a, b, c = rewards
    nodes = [
        node(1, 0, ['We', ' count', ':'], size=3, value=sum(rewards) / 3),
        node(2, 1, [text, '.'], depth=2, value=a),
        node(3, 1, [' maybe', ' eleven'], depth=2, value=b),
        node(4, 3, ['<tool>', '11', '</tool>'], depth=2, value=b, said=True),
        node(5, 4, [' eleven', '.'], depth=3, value=b),
        node(6, 1, [' ten', '.'], depth=2, value=c),
    ]
    ends = [
        answer(2, a, stop='answer'),
        answer(5, b),
        answer(6, c, stop='token_limit', fallback_from=0, fallback_at=6),
        answer(0, None, stop='failed', error='step of MyScheduler raised KeyError on path 4'),
    ]
    return tree(id, nodes, ends, step=step)


def large(id: str, *, seed: int, width: int = 16, depth: int = 14, tokens: int = 16, step: int = 1) -> TreeRecord:
    """`width` paths of `depth` segments, forked at the prompt: the most nodes that such a tree can have."""
    dice = random.Random(seed)
    nodes: list[NodeRecord] = []
    level = [0]
    for at in range(1, depth + 1):
        parents = level * width if at == 1 else level
        level = []
        for parent in parents:
            nodes.append(node(len(nodes) + 1, parent, words(dice, tokens), depth=at, size=1))
            level.append(len(nodes))
    ends = [answer(leaf, float(dice.random() < 0.4), stop='answer') for leaf in level]
    # Parents first, and each with an id below its children's: as written.
    return tree(id, nodes, ends, step=step, prompt=f'<|im_start|>user\nProblem {seed}<|im_end|>\n')
