"""`TreeConfig`: every knob of a tree rollout, in sections, validated before anything slow starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator

from .errors import ConfigError, explained
from .kinds import Count, Flag, NotNegative, Positive, Section
from .sections import (
    Advantage,
    BoundaryPosition,
    Branching,
    Budget,
    Checks,
    EvenBranching,
    Fallback,
    Faults,
    ForkPosition,
    SegmentFallback,
    SharedPrefix,
    Stop,
    Trace,
    TreepoAdvantage,
    WidthBudget,
)
from .sources import merged, place_of, read_sources, selector_first

KV_BLOCK = 16
"""Tokens of vLLM's usual KV block, which a segment should fill."""
LEAST_DEPTH = 4
"""Segments of a full path where the engine's KV block is longer than a whole response, and so says nothing of S."""
SHAPE = ('segment_length', 'max_depth', 'divergence', 'root_divergence')
"""The keys that say what a tree looks like. Where none of them is given, all are chosen to fit the run."""
INSIDE_TURNS = ('random_token', 'random_block', 'min_logprob_token', 'max_entropy_token', 'logprob_block')
"""Fallbacks that cut inside turns."""


def _pacing_steps(value: Any) -> Any:
    """{depth: width}, as YAML or JSON write it, with integers for keys."""
    if not isinstance(value, Mapping):
        return value
    try:
        steps = {int(depth): width for depth, width in value.items()}
    except (TypeError, ValueError):
        raise ValueError('{depth: width} must have positive integers') from None
    widths = [width for _, width in sorted(steps.items())]
    if not steps or min(steps) < 1 or not all(type(w) is int and w >= 1 for w in widths) or widths != sorted(widths):
        raise ValueError('{depth: width} must have positive integers, and widths that never fall')
    return dict(sorted(steps.items()))


def fitting_branches(width: int, max_depth: int) -> int:
    """First branches with which binary forks give `width` paths before the last segment of `max_depth` begins.

    Two where they are enough (the paper's), and one for trees of two or three, which else would share nothing. A tree
    of one segment has no boundary: all of its paths begin at the root.
    """
    needed = math.ceil(width / (1 << (max_depth - 1)))
    return max(needed, 2 if width >= 4 else 1)


class TreeConfig(Section):
    """How trees grow, stop and turn into advantages.

    Defaults are the paper's (arXiv 2508.17445) but for `root_divergence`, which its main setting draws from [2, 8].
    The width W is not here: it is the number of generations per prompt, which the trainer already knows.
    """

    segment_length: Positive = 512
    """S: most tokens of a segment. A multiple of the KV block size lets forks reuse the whole prefix. Where it is not
    given, D segments of whole KV blocks fill `--max_completion_length`."""
    max_depth: Positive = 14
    """D: most segments on a path; with several turns, in each of them. Where only `segment_length` is given, as many as
    fill `--max_completion_length`."""
    divergence: Count = 2
    """d: branching factor, branches per live path at a segment boundary. A pair `[m, n]` draws one a boundary."""
    root_divergence: Count = 2
    """First branches at the root. A pair `[lo, hi]` draws one per tree; the paper's "more init divergence" is
    `[2, 8]`. Where none of S, D, d and this is given, as many as forks need to reach W."""
    fork_at: Literal['both', 'segment', 'turn'] = 'both'
    """With several turns, where paths fork: at segment boundaries within a turn (`segment`), where a turn begins
    (`turn`, after a tool or an environment has spoken), or at `both`. The root always forks."""
    fork_state: Literal['copy', 'replay'] = 'copy'
    """How the state of an environment forks with its path: by `TreeRolloutScheduler.fork_state` (`copy`, a deep copy
    of what the scheduler registered), or by playing the turns of a path again on a fresh one (`replay`)."""
    pacing: Annotated[Literal['eager', 'even'] | dict[int, int], BeforeValidator(_pacing_steps)] = 'eager'
    """When forks may happen: `eager` (as soon as the budget allows, the paper), `even` (spread over all depths, which
    saves most tokens), or `{depth: width}`: at most so many paths from that depth on. With `fork_at: turn` a depth is
    a turn, and the last is `--max_turns` of `swift rollout`."""
    branching: Branching = EvenBranching(policy='even')
    """How a boundary's branches are spread over its live paths. Every one gets at least one."""
    fork_position: ForkPosition = BoundaryPosition(policy='boundary')
    """Where the forks of a boundary start: at the end of the segment that has just ended, or inside it."""
    budget: Budget = WidthBudget(policy='by_width')
    """What bounds the forks besides W."""
    fallback: Fallback = SegmentFallback(policy='random_segment')
    """Where finished paths are cut to branch again when no path lives and trajectories are missing."""
    stop: Stop = Stop()
    """When a path stops by its text."""
    advantage: Advantage = TreepoAdvantage(estimator='treepo')
    """How rewards become advantages."""
    shared_prefix: SharedPrefix = SharedPrefix()
    """What training computes once."""
    trace: Trace = Trace()
    """Which trees `--log_completions true` keeps on disk ([viewer.md](viewer.md))."""
    eval_trees: Flag = False
    """Evaluate on trees too. `false` samples the answers to an evaluation prompt independently."""
    faults: Faults = Faults()
    """How much may go wrong."""
    checks: Checks = Checks()
    """What is refused, and proven."""
    seed: NotNegative = 0
    """Seed of every random choice of the search. One seed, one tree."""

    def __init__(self, **values: Any) -> None:
        """Raises `ConfigError`, which names every value that is wrong and what is allowed."""
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise explained(e, type(self), values) from None

    @model_validator(mode='after')
    def _check_turns(self) -> TreeConfig:
        if self.fork_at == 'turn' and self.fallback.policy in INSIDE_TURNS:
            raise ValueError(
                f"fork_at='turn' with fallback.policy={self.fallback.policy!r}: it cuts inside turns. Use "
                'random_segment (with fork_at: turn, where a turn begins), root or none.'
            )
        if self.fork_at == 'turn' and self.fork_position.policy != 'boundary':
            raise ValueError(
                f"fork_at='turn' with fork_position.policy={self.fork_position.policy!r}: paths fork only where a turn "
                'begins, so no fork is inside a segment. Use boundary, or fork_at: both.'
            )
        return self

    # From files, environments and requests.

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = 'TreeConfig') -> TreeConfig:
        """Build from plain values. Wrong ones raise `ConfigError`, which names `where` they were given."""
        try:
            return cls(**values)
        except ConfigError as e:
            raise ConfigError(f'{where}: {e}', e.problems) from None

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> TreeConfig:
        """Read the YAML file named by ``TREEPO_CONFIG``, then ``TREEPO_<KEY>`` and ``TREEPO_<SECTION>__<KEY>``."""
        sources = list(read_sources(os.environ if environ is None else environ))
        values: dict[str, Any] = {}
        for _, given in sources:
            values = merged(values, given)
        try:
            return cls(**values)
        except ConfigError as e:
            sentences = [f'{place_of(keys, sources)}: {sentence}' for keys, sentence in e.problems.items()]
            raise ConfigError('\n'.join(sentences), e.problems) from None

    @classmethod
    def load_for(
        cls,
        max_response: int,
        environ: Mapping[str, str] | None = None,
        *,
        width: int | None = None,
        block_size: int = KV_BLOCK,
    ) -> TreeConfig:
        """Like `load`, with what was not given chosen to fit the run; `is_given` stays False for it.

        Args:
            max_response: most tokens of a turn. What of S and D was not given is chosen so that D segments fill it.
                S then is whole KV blocks, and the last segment of a full path may be shorter.
            environ: instead of the process's environment.
            width: W. Where nothing of the tree's shape was given, first branches are chosen so that forks reach it.
            block_size: tokens of the engine's KV block.
        """
        config = cls.load(environ)
        chosen: dict[str, Any] = {}
        length = config.segment_length
        if not config.is_given('segment_length'):
            block, depth = block_size, config.max_depth
            if block > max_response:
                block, depth = KV_BLOCK, depth if config.is_given('max_depth') else LEAST_DEPTH
            chosen['segment_length'] = length = block * math.ceil(max_response / depth / block)
        if not (config.is_given('segment_length') and config.is_given('max_depth')):
            chosen['max_depth'] = math.ceil(max_response / length)
        if width is not None and not any(config.is_given(key) for key in SHAPE):
            chosen['root_divergence'] = fitting_branches(width, chosen['max_depth'])
        filled = config.replace(**chosen)
        # Chosen, not given.
        filled.__pydantic_fields_set__.difference_update(set(chosen) - config.model_fields_set)
        return filled

    def is_given(self, key: str) -> bool:
        """Whether somebody set this top-level `key`; False where it is the default."""
        return key in self.model_fields_set

    def replace(self, **changes: Any) -> TreeConfig:
        """A checked copy with other top-level values; what was given stays known. Raises `ConfigError`."""
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self)(**{**given, **changes})

    # To requests, files and checks.

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them and JSON can carry them."""
        return selector_first(self.model_dump(mode='json'))

    def to_note(self) -> dict[str, Any]:
        """Like `to_dict`, without what is as it is by default."""
        return selector_first(self.model_dump(mode='json', exclude_defaults=True))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def max_response_tokens(self) -> int:
        """D x S: most tokens that a path can have."""
        return self.max_depth * self.segment_length

    @property
    def entropy_logprobs(self) -> dict[str, int]:
        """From how many log-probs per token entropies are estimated, by the keys that say so; empty where none are."""
        sections = {'branching': self.branching, 'fork_position': self.fork_position, 'fallback': self.fallback}
        asked = {f'{name}.top_k': getattr(section, 'top_k', 0) for name, section in sections.items()}
        return {key: count for key, count in asked.items() if count}

    def check_fits(self, limit: int, name: str) -> None:
        """Raise `ConfigError` where the last segment of a path would begin past `limit` tokens; `name` is the option
        that sets it."""
        if self.max_response_tokens - self.segment_length >= limit:
            raise ConfigError(
                f'max_depth x segment_length = {self.max_depth} x {self.segment_length} = {self.max_response_tokens} '
                f'tokens is over {name} = {limit}. Lower max_depth or segment_length, or raise {name}.'
            )
