"""The family of curves of the paper's section 4.5: pass@k and majority vote against decoded tokens and wall time."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from treepo_swift.config import TreeConfig

from .estimates import majority_vote, pass_at_k, powers_of_two, union_tokens
from .files import GrownTree
from .growing import Sampling, independent
from .judging import RIGHT_FROM

PACINGS = ('eager', 'even')


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to sample answers, at one width."""

    divergence: int | None
    """None: independent answers."""
    pacing: str | None
    width: int

    @property
    def family(self) -> str:
        """Without the width: the points of a curve against time share it."""
        return 'independent' if self.divergence is None else f'd{self.divergence}-{self.pacing}'

    @property
    def name(self) -> str:
        return f'{self.family}-w{self.width}'

    def sampling(self, config: TreeConfig, *, max_tokens: int, temperature: float, seed: int | None) -> Sampling:
        """`config` with this divergence (at the root too, where nobody set `root_divergence`) and this pacing."""
        if self.divergence is None:
            grown = independent(config, self.width, max_tokens)
        else:
            root = {} if config.is_given('root_divergence') else {'root_divergence': self.divergence}
            grown = config.replace(divergence=self.divergence, pacing=self.pacing, **root)
        return Sampling(grown, self.width, max_tokens, temperature, seed)


def settings_of(divergences: Sequence[int], pacings: Sequence[str], widths: Sequence[int]) -> list[Setting]:
    """The matrix, independent sampling first, widths from narrow to wide."""
    ways: list[tuple[int | None, str | None]] = [(None, None), *((d, p) for d in divergences for p in pacings)]
    return [Setting(d, p, width) for d, p in ways for width in sorted(set(widths))]


@dataclass(frozen=True, slots=True)
class Point:
    """Subsets of k of the W answers to each prompt, means over prompts."""

    k: int
    prompts: int
    """With at least k answers that did not fail."""
    tokens: float
    """Of the union of the subset's nodes, a prompt."""
    pass_at_k: float
    pass_error: float | None
    """Standard error over prompts; None for a single prompt."""
    majority: float | None
    """Accuracy of the majority vote; None where no answer of any prompt says anything in a box."""
    seconds: float | None
    """Wall seconds a prompt. Only where k = W: a subset of a tree was never grown by itself."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a setting gave."""

    setting: str
    family: str
    width: int
    prompts: int
    failed: int
    """Answers that are placeholders: they are in no estimate."""
    decoded_tokens: float
    """A prompt, with those that were sampled past a path's end and thrown away."""
    seconds: float
    """Wall seconds a prompt: those of its batch, divided by the batch's prompts."""
    points: tuple[Point, ...]


def curve(setting: Setting, trees: Sequence[GrownTree], *, seed: int) -> Curve:
    """The estimates of a setting from its trees."""
    failed = sum(t.is_placeholder for tree in trees for t in tree.record.trajectories)
    seconds = fmean(tree.seconds for tree in trees)
    points = [_point(k, setting, trees, seed, seconds) for k in powers_of_two(setting.width)]
    return Curve(
        setting=setting.name,
        family=setting.family,
        width=setting.width,
        prompts=len(trees),
        failed=failed,
        decoded_tokens=fmean(tree.record.stats['decoded_tokens'] for tree in trees),
        seconds=seconds,
        points=tuple(point for point in points if point is not None),
    )


def _point(k: int, setting: Setting, trees: Sequence[GrownTree], seed: int, seconds: float) -> Point | None:
    passed, majorities, tokens, votes_seen = [], [], [], False
    for tree in trees:
        answers = [
            (vote, t.reward >= RIGHT_FROM)
            for vote, t in zip(tree.votes, tree.record.trajectories, strict=True)
            if t.reward is not None
        ]
        if len(answers) < k:
            continue
        votes, right = [vote for vote, _ in answers], [ok for _, ok in answers]
        nodes = [(len(node.tokens), node.size) for node in tree.record.nodes if node.kind == 'segment']
        passed.append(pass_at_k(len(right), sum(right), k))
        tokens.append(union_tokens(nodes, len(right), k))
        majorities.append(majority_vote(votes, right, k, seed=f'{seed} {setting.name} {tree.prompt}'))
        votes_seen = votes_seen or any(vote is not None for vote in votes)
    if not passed:
        return None
    return Point(
        k=k,
        prompts=len(passed),
        tokens=fmean(tokens),
        pass_at_k=fmean(passed),
        pass_error=stdev(passed) / sqrt(len(passed)) if len(passed) > 1 else None,
        majority=fmean(majorities) if votes_seen else None,
        seconds=seconds if k == setting.width else None,
    )


def summary_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """A line a setting for the terminal, figures at k = W."""
    rows = []
    for found in curves:
        first, last = found.points[0], found.points[-1]
        rows.append(
            {
                'setting': found.family,
                'W': found.width,
                'pass@1': f'{first.pass_at_k:.1%}',
                'pass@W': f'{last.pass_at_k:.1%}',
                'majority of W': '-' if last.majority is None else f'{last.majority:.1%}',
                'tokens a prompt': f'{last.tokens:.0f}',
                'decoded': f'{found.decoded_tokens:.0f}',
                's a prompt': f'{found.seconds:.3f}',
            }
        )
    return rows


def write_results(folder: Path, head: dict[str, Any], curves: Sequence[Curve]) -> list[Path]:
    """``results.json`` with everything, ``results.csv`` with a line a point."""
    as_json, as_csv = folder / 'results.json', folder / 'results.csv'
    as_json.write_text(json.dumps({**head, 'settings': [dataclasses.asdict(c) for c in curves]}, indent=1) + '\n')
    with as_csv.open('w', newline='', encoding='utf-8') as file:
        names = ['setting', 'family', 'width', *(f.name for f in dataclasses.fields(Point))]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for found in curves:
            for point in found.points:
                own = {'setting': found.setting, 'family': found.family, 'width': found.width}
                writer.writerow({**own, **dataclasses.asdict(point)})
    return [as_json, as_csv]
