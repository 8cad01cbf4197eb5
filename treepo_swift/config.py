"""`TreeConfig`: every knob of a tree rollout, validated before anything slow starts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treepo_swift.core.tree import StopReason

ENV_PREFIX = 'TREEPO_'
CONFIG_ENV = 'TREEPO_CONFIG'
"""Path of a YAML file with `TreeConfig` fields."""

KV_BLOCK = 16
"""Tokens of vLLM's usual KV block, which a segment should fill."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


Check = Callable[[Any], Any]
"""Returns a value in the field's own type, or raises `ValueError` with what is allowed."""


def _knob(default: Any, check: Check, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={'doc': doc, 'check': check})


def _is_number(value: Any, kind: type, low: float, high: float) -> bool:
    allowed = (int, float) if kind is float else int
    return isinstance(value, allowed) and not isinstance(value, bool) and low <= value <= high


def _number(kind: type, low: float, high: float = math.inf, *, pair: str = '') -> Check:
    """A number of `kind` within [low, high]; with `pair`, also two of them ('sorted' or 'any order')."""
    upper = '' if high == math.inf else f' and at most {high}'
    allowed = f'{"a number" if kind is float else "an integer"} of at least {low}{upper}'
    if pair:
        allowed += f', or a pair of them{" [lo, hi] with lo <= hi" if pair == "sorted" else ""}'

    def check(value: Any) -> Any:
        if pair and isinstance(value, (list, tuple)):
            fine = len(value) == 2 and all(_is_number(v, kind, low, high) for v in value)
            if fine and (pair != 'sorted' or value[0] <= value[1]):
                return tuple(map(kind, value))
        elif _is_number(value, kind, low, high):
            return kind(value)
        raise ValueError(allowed)

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError('true or false')
    return value


def _choice(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(' or '.join(map(repr, names)))
        return value

    return check


def _name(value: Any) -> str:
    """A name in a registry, which users may add to; looked up when the policies load."""
    if not isinstance(value, str) or not value:
        raise ValueError('a name')
    return value


def _tags(value: Any) -> tuple[str, str]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(v, str) and v for v in value):
        raise ValueError('a pair of non-empty strings [opening, closing]')
    return value[0], value[1]


def _stop_order(value: Any) -> tuple[str, ...]:
    reasons = [reason.value for reason in StopReason if not reason.is_placeholder]
    if (
        not isinstance(value, (list, tuple))
        or len(set(map(str, value))) != len(value)
        or not set(map(str, value)) <= set(reasons)
    ):
        raise ValueError(f'a list of different ones of {", ".join(reasons)}')
    return tuple(value)


def _pacing(value: Any) -> str | tuple[tuple[int, int], ...]:
    """A name, or {depth: width} as sorted pairs, so that the config stays hashable."""
    if value in ('eager', 'even'):
        return value
    pairs = value.items() if isinstance(value, dict) else value
    try:
        steps = sorted((int(depth), int(width)) for depth, width in pairs)
        fine = all(_is_number(n, int, 1, math.inf) for pair in (dict(pairs)).items() for n in pair)
    except (TypeError, ValueError):
        steps, fine = [], False
    widths = [width for _, width in steps]
    if not steps or not fine or widths != sorted(widths) or len(dict(steps)) != len(steps):
        raise ValueError("'eager' or 'even' or {depth: width} with positive integers and widths that never fall")
    return tuple(steps)


@dataclass(frozen=True)
class TreeConfig:
    """How trees grow, stop and turn into advantages. Defaults are the paper's main setting (arXiv 2508.17445).

    The width W is not here: it is the number of generations per prompt, which the trainer already knows.
    """

    segment_length: int = _knob(
        512,
        _number(int, 1),
        'S: most tokens of a segment. A multiple of the KV block size lets forks reuse the whole prefix.',
    )
    max_depth: int = _knob(14, _number(int, 1), 'D: most segments on a path; with several turns, in each of them.')

    schedule: str = _knob(
        'stream',
        _choice('stream', 'lockstep'),
        'How the engine is asked: `stream` (a path is one request that runs on through its boundaries, and forks start '
        'beside it) or `lockstep` (a request a segment). Both grow the same tree; `budget: by_trajectory_tokens` is '
        'always in lockstep.',
    )

    tree_order: str = _knob(
        'arrival',
        _choice('arrival', 'longest_first'),
        'Which trees of a batch start first: in the order of the requests, or those whose prompt had the longest '
        'trajectories at its last visit (from the second epoch on), which shortens the tail of a batch.',
    )

    divergence: int | tuple[int, int] = _knob(
        2,
        _number(int, 1, pair='sorted'),
        'd: branching factor, branches per live path at a segment boundary. A pair `[m, n]` draws one a boundary.',
    )
    root_divergence: int | tuple[int, int] = _knob(
        2,
        _number(int, 1, pair='sorted'),
        'First branches at the root. A pair `[lo, hi]` draws one per tree; the paper\'s "more init divergence" is '
        '`[2, 8]`.',
    )
    fork_at: str = _knob(
        'both',
        _choice('both', 'segment', 'turn'),
        'With several turns, where paths fork: at segment boundaries within a turn (`segment`), where a turn begins '
        '(`turn`, after a tool or an environment has spoken), or at `both`. The root always forks.',
    )
    branching: str = _knob(
        'even',
        _name,
        "How a boundary's branches are shared out: `even`, `logprob` (by the score of each path), "
        '`entropy` (by the mean entropy of its last segment), or a policy that you registered. Every live path gets '
        'at least one.',
    )
    branch_score: str = _knob(
        'last_segment',
        _choice('sum', 'mean', 'last_segment'),
        "What `logprob` scores: the sum or the mean of a path's log-probs, or the mean over its last segment.",
    )
    branch_favour: str = _knob(
        'low',
        _choice('low', 'high'),
        'Whether `logprob` and `entropy` give more branches to the less (`low`) or the more probable paths.',
    )
    branch_temperature: float | tuple[float, float] = _knob(
        2.0,
        _number(float, 1e-6, 1e6, pair='any order'),
        'Softmax temperature over the scores. A pair `[start, end]` moves over training (the paper: `[5, 1]`).',
    )
    branch_schedule: str = _knob(
        'linear', _choice('linear', 'cosine', 'sinusoid'), 'How a pair of temperatures moves from start to end.'
    )
    entropy_top_k: int = _knob(20, _number(int, 1), 'Log-probs per token from which `entropy` estimates.')
    pacing: str | tuple[tuple[int, int], ...] = _knob(
        'eager',
        _pacing,
        'When forks may happen: `eager` (as soon as the budget allows, the paper), `even` (spread '
        'over all depths, which saves most tokens), or `{depth: width}`: at most so many paths from that depth on. '
        'With `fork_at: turn` a depth is a turn, and the last is `--max_turns` of `swift rollout`.',
    )

    budget: str = _knob(
        'by_width',
        _choice('by_width', 'by_segment_tokens', 'by_trajectory_tokens'),
        'What bounds the forks besides W: nothing more; `budget_tokens` per depth, shared evenly by the prompts that '
        'still grow (they wait for each other at each depth); or `budget_tokens` per prompt, the sum of its '
        "trajectories' lengths: paths that use it up stop, and what does not fit becomes masked placeholders.",
    )
    budget_tokens: int = _knob(0, _number(int, 0), 'Tokens of the budget; 0 with `by_width`.')

    fallback: str = _knob(
        'random_segment',
        _name,
        'Where finished paths are cut to branch again when no path lives and trajectories are missing: '
        '`random_segment` (a segment boundary), `random_token`, `random_block` (a multiple of `fallback_block` tokens; '
        'the paper\'s "misaligned" ablation), `min_logprob_token`, `logprob_block` (blocks weighted by their mean '
        'log-prob), `root`, or `none`.',
    )
    fallback_candidates: str = _knob(
        'answer_or_eos',
        _choice('answer_or_eos', 'finished', 'best_reason_first', 'any'),
        'Paths that may be cut: those that ended with an answer or EOS; that ended by themselves in any way; all, best '
        'stop reason first; or all in random order. Without a candidate the root branches.',
    )
    fallback_window: int = _knob(0, _number(int, 0), "Cut at most so many segments before a path's end; 0: anywhere.")
    fallback_block: int = _knob(128, _number(int, 1), 'Tokens of a block in `random_block` and `logprob_block`.')
    fallback_favour: str = _knob(
        'low', _choice('low', 'high'), 'Whether `logprob_block` prefers blocks of low or of high mean log-prob.'
    )
    fallback_start: str = _knob(
        'idle',
        _choice('idle', 'early'),
        'When fallback starts: when no path lives (the paper), or as soon as the '
        'live paths can not make the missing trajectories any more, which shortens the tail of a batch.',
    )
    fallback_fill: str = _knob(
        'placeholder',
        _choice('placeholder', 'root'),
        'What fills a tree with `fallback: none`: masked placeholders, or fresh branches from the root.',
    )

    answer: str = _knob(
        'boxed',
        _name,
        'The early stop: a complete, non-empty `\\boxed{...}` (`boxed`), text between `answer_tags` '
        '(`tags`), `none`, or a detector that you registered.',
    )
    answer_tags: tuple[str, str] = _knob(('<answer>', '</answer>'), _tags, 'Opening and closing tag of `answer: tags`.')
    answer_needs_eos: bool = _knob(
        False, _flag, 'An answer does not stop a path; EOS after it does, and then counts as an answer.'
    )
    after_answer: str = _knob(
        'keep',
        _choice('keep', 'cut'),
        'Whether a path that stopped at an answer keeps the rest of that segment, or '
        'is cut after the token that completes the answer.',
    )
    stop_at_repetition: bool = _knob(True, _flag, 'Stop a path that repeats itself.')
    repetition_length: int = _knob(
        32, _number(int, 2), 'Characters of the shortest substring that counts as a repetition.'
    )
    repetition_count: int = _knob(
        8, _number(int, 2), 'Occurrences (overlaps included) at which a path counts as repeating.'
    )
    stop_order: tuple[str, ...] = _knob(
        (),
        _stop_order,
        'Stop reasons that win, in this order, where several hold at once. Those not named follow as '
        'answer, eos, stop_string, hook, repetition, token_limit, context_limit, depth_limit.',
    )

    seed: int = _knob(0, _number(int, 0), 'Seed of every random choice of the search. One seed, one tree.')
    eval_trees: bool = _knob(
        False, _flag, 'Evaluate on trees too. `false` samples the answers to an evaluation prompt independently.'
    )

    estimator: str = _knob('treepo', _name, 'Advantage estimator, by its registered name.')
    weighting: str = _knob(
        'average',
        _choice('average', 'size'),
        'How subgroups combine: `average` (Eq. 5) or weighted by their `size` (Eq. 6).',
    )
    reject_flat_subgroups: bool = _knob(
        False, _flag, 'Leave out subgroups below the root whose rewards are all alike (Eq. 7).'
    )
    include_root: bool = _knob(
        True, _flag, 'Compare with the whole tree too. `false` does so only where no deeper subgroup exists.'
    )
    count_chains: str = _knob(
        'per_depth',
        _choice('per_depth', 'per_fork'),
        'A chain that does not fork counts once per segment (`per_depth`, the official code) or once (`per_fork`).',
    )
    normalisation: str = _knob(
        'whiten',
        _choice('whiten', 'group', 'none'),
        "Advantages over the whole batch by loss tokens (`whiten`), divided by each tree's own standard deviation "
        '(`group`), or as they are.',
    )
    whiten_shift_mean: bool = _knob(True, _flag, 'Whitening subtracts the batch mean; `false` only scales.')

    max_retries: int = _knob(
        2, _number(int, 0), 'How often a segment is asked of the engine again after an engine error.'
    )
    max_failure_fraction: float = _knob(
        0.5, _number(float, 0, 1), 'Share of failed trajectories in a batch above which the rollout raises.'
    )
    fork_state: str = _knob(
        'copy',
        _choice('copy', 'replay'),
        'How the state of an environment forks with its path: by `TreeRolloutScheduler.fork_state` (`copy`, a deep '
        'copy of what the scheduler registered), or by playing the turns of a path again on a fresh one (`replay`).',
    )
    hook_timeout: float = _knob(
        60.0, _number(float, 0.001), 'Seconds that an overridden hook may take before its path counts as failed.'
    )
    require_trainer: bool = _knob(
        True,
        _flag,
        'The server refuses requests that were not sent by TreeGRPOTrainer, so that nobody trains on '
        'trees with flat advantages unknowingly.',
    )
    verify_weight_sync: bool = _knob(
        True,
        _flag,
        'Compare log-probs of a fixed text between trainer and server after every weight sync, and stop '
        'the run where the server does not follow.',
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if (self.budget == 'by_width') != (self.budget_tokens == 0):
            raise ConfigError(
                f'budget={self.budget!r} with budget_tokens={self.budget_tokens}: budget_tokens must be '
                'positive with the token budgets, and 0 with by_width.'
            )
        if self.fallback_start == 'early' and self.budget != 'by_width':
            raise ConfigError(
                f"fallback_start='early' with budget={self.budget!r}: its branches start beside live "
                'paths and would take their tokens. Use budget: by_width, or fallback_start: idle.'
            )

        if self.fork_at == 'turn' and self.fallback_start == 'early':
            raise ConfigError(
                "fork_at='turn' with fallback_start='early': how many trajectories live paths can "
                'still make is known for segments only. Use fallback_start: idle.'
            )
        inside = ('random_token', 'random_block', 'min_logprob_token', 'logprob_block')
        if self.fork_at == 'turn' and self.fallback in inside:
            raise ConfigError(
                f"fork_at='turn' with fallback={self.fallback!r}: it cuts inside turns. Use fallback: "
                'random_segment (with fork_at: turn, where a turn begins), root or none.'
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = 'TreeConfig') -> TreeConfig:
        """Build from plain values. Unknown keys raise `ConfigError`, which names `where` they were given."""
        cls._check(values, where=where)
        try:
            return cls(**values)
        except ConfigError as e:
            raise ConfigError(f'{where}: {e}') from None

    @classmethod
    def _check(cls, values: Mapping[str, Any], *, where: str) -> None:
        """Check each value by itself, so that the error names the place it came from."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f'{where}: unknown key {key!r}. Allowed are: {", ".join(known)}.')
            try:
                _checked(known[key], value)
            except ConfigError as e:
                raise ConfigError(f'{where}: {e}') from None

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> TreeConfig:
        """Read the YAML file named by ``TREEPO_CONFIG``, then apply ``TREEPO_<FIELD>`` variables over it."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        path = environ.get(CONFIG_ENV)
        if path:
            values.update(_read_yaml(path))
            cls._check(values, where=f'{path} (named by {CONFIG_ENV})')
        for name, text in sorted(environ.items()):
            if not name.startswith(ENV_PREFIX) or name == CONFIG_ENV:
                continue
            key, value = name[len(ENV_PREFIX) :].lower(), _parse_scalar(name, text)
            cls._check({key: value}, where=f'environment variable {name}')
            values[key] = value
        return cls.from_dict(values)

    @classmethod
    def load_for(cls, max_response: int, environ: Mapping[str, str] | None = None) -> TreeConfig:
        """Like `load`, for turns of at most `max_response` tokens: where nothing says how long segments are and how
        many, D segments share that length out."""
        config = cls.load(environ)
        default = cls()
        if (
            (config.segment_length, config.max_depth) != (default.segment_length, default.max_depth)
            or config.max_response_tokens <= max_response
            or max_response < config.max_depth
        ):
            return config
        length = max_response // config.max_depth
        return dataclasses.replace(config, segment_length=length // KV_BLOCK * KV_BLOCK or length)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them and JSON can carry them."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    def to_note(self) -> dict[str, Any]:
        """Like `to_dict`, without what is as it is by default."""
        default = TreeConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default[key]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def max_response_tokens(self) -> int:
        """D x S: most tokens that a path can have."""
        return self.max_depth * self.segment_length

    def check_fits(self, limit: int, name: str) -> None:
        """Raise `ConfigError` where a path could grow past `limit` tokens; `name` is the option that sets it."""
        if self.max_response_tokens > limit:
            raise ConfigError(
                f'max_depth x segment_length = {self.max_depth} x {self.segment_length} = {self.max_response_tokens} '
                f'tokens is over {name} = {limit}. Lower max_depth or segment_length, or raise {name}.'
            )


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """Return `value` in the field's own type, or raise `ConfigError` naming what was given and what is allowed."""
    try:
        return field.metadata['check'](value)
    except ValueError as e:
        raise ConfigError(f'{field.name}={value!r}: must be {e}.') from None


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f'{CONFIG_ENV} names {path!r}, which is not a file.')
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as e:
        raise ConfigError(f'{path} (named by {CONFIG_ENV}) is not valid YAML: {e}') from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f'{path} (named by {CONFIG_ENV}) must hold "key: value" lines, not a {type(values).__name__}.'
        )
    return values


def _parse_scalar(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'environment variable {name}={text!r} can not be read as a YAML value.') from None


def reference() -> str:
    """The configuration reference (docs/configuration.md holds it) as a Markdown table."""
    rows = ['| key | default | meaning |', '| --- | --- | --- |']
    for field in dataclasses.fields(TreeConfig):
        default = json.dumps(field.default) if not isinstance(field.default, str) else field.default
        rows.append(f'| `{field.name}` | `{default}` | {field.metadata["doc"]} |')
    return '\n'.join(rows) + '\n'
