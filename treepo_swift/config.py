"""`TreeConfig`: every knob of a tree rollout, validated before anything slow starts."""
from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import yaml

ENV_PREFIX = 'TREEPO_'
CONFIG_ENV = 'TREEPO_CONFIG'
"""Path of a YAML file with `TreeConfig` fields."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


def _knob(default: Any,
          doc: str,
          *,
          low: float | None = None,
          high: float | None = None,
          choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its documentation and its allowed range (`low` and `high` are inclusive)."""
    return dataclasses.field(default=default, metadata={'doc': doc, 'low': low, 'high': high, 'choices': choices})


@dataclass(frozen=True)
class TreeConfig:
    """How trees grow, stop and turn into advantages. Defaults are the paper's main setting (arXiv 2508.17445).

    The width W is not here: it is the number of generations per prompt, which the trainer already knows.
    """

    segment_length: int = _knob(
        512, 'S: most tokens of a segment. A multiple of the KV block size lets forks reuse the whole prefix.', low=1)
    max_depth: int = _knob(14, 'D: most segments on a path.', low=1)
    divergence: int = _knob(2, 'd: branching factor, branches per live path at a segment boundary.', low=1)
    root_divergence: int | tuple[int, int] = _knob(
        2, 'First branches at the root. A pair `[lo, hi]` draws one number per tree; the paper\'s "more init '
        'divergence" is `[2, 8]`.',
        low=1)

    stop_at_answer: bool = _knob(True, 'Stop a path whose text holds a complete, non-empty `\\boxed{...}`.')
    stop_at_repetition: bool = _knob(True, 'Stop a path that repeats itself.')
    repetition_length: int = _knob(32, 'Characters of the shortest substring that counts as a repetition.', low=2)
    repetition_count: int = _knob(8, 'Occurrences (overlaps included) at which a path counts as repeating.', low=2)

    seed: int = _knob(0, 'Seed of every random choice of the search. One seed, one tree.', low=0)

    estimator: str = _knob('treepo', 'Advantage estimator, by its registered name.')
    weighting: str = _knob(
        'average',
        'How subgroups combine: `average` (Eq. 5) or weighted by their `size` (Eq. 6).',
        choices=('average', 'size'))
    reject_flat_subgroups: bool = _knob(False,
                                        'Leave out subgroups below the root whose rewards are all alike (Eq. 7).')
    include_root: bool = _knob(
        True, 'Compare with the whole tree too. `false` does so only where no deeper subgroup exists.')
    count_chains: str = _knob(
        'per_depth', 'A chain that does not fork counts once per segment (`per_depth`, the official code) or once '
        '(`per_fork`).',
        choices=('per_depth', 'per_fork'))
    whiten_shift_mean: bool = _knob(True, 'Whitening subtracts the batch mean; `false` only scales.')

    max_retries: int = _knob(2, 'How often a segment is asked of the engine again after an engine error.', low=0)
    max_failure_fraction: float = _knob(
        0.5,
        'Share of failed trajectories in a batch above which the rollout raises instead of going on.',
        low=0,
        high=1)
    hook_timeout: float = _knob(
        60.0, 'Seconds that an overridden hook may take before its path counts as failed.', low=0.001)
    require_trainer: bool = _knob(
        True, 'The server refuses requests that were not sent by TreeGRPOTrainer, so that nobody trains on trees '
        'with flat advantages unknowingly.')
    verify_weight_sync: bool = _knob(
        True, 'Compare log-probs of a fixed text between trainer and server after every weight sync, and stop the run '
        'where the server does not follow.')

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = 'TreeConfig') -> TreeConfig:
        """Build from plain values. Unknown keys raise `ConfigError`, which names `where` they were given."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f'{where}: unknown key {unknown[0]!r}. Allowed are: {", ".join(known)}.')
        try:
            return cls(**values)
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
            cls.from_dict(values, where=f'{path} (named by {CONFIG_ENV})')
        for name, text in sorted(environ.items()):
            if not name.startswith(ENV_PREFIX) or name == CONFIG_ENV:
                continue
            key = name[len(ENV_PREFIX):].lower()
            cls.from_dict({key: _parse_scalar(name, text)}, where=f'environment variable {name}')
            values[key] = _parse_scalar(name, text)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them and JSON can carry them."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

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
                f'tokens is over {name} = {limit}. Lower max_depth or segment_length, or raise {name}.')


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
            f'{path} (named by {CONFIG_ENV}) must hold "key: value" lines, not a {type(values).__name__}.')
    return values


def _parse_scalar(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'environment variable {name}={text!r} can not be read as a YAML value.') from None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """Return `value` in the field's own type, or raise `ConfigError` naming what was given and what is allowed."""
    default, meta = field.default, field.metadata

    def fail(allowed: str) -> ConfigError:
        return ConfigError(f'{field.name}={value!r}: must be {allowed}.')

    def number_in_range(number: Any, kind: type) -> bool:
        if isinstance(number, bool) or not isinstance(number, (int, float) if kind is float else int):
            return False
        return (meta['low'] is None or number >= meta['low']) and (meta['high'] is None or number <= meta['high'])

    if field.name == 'root_divergence' and isinstance(value, (list, tuple)):
        if len(value) == 2 and all(number_in_range(v, int) for v in value) and value[0] <= value[1]:
            return tuple(value)
        raise fail('an integer of at least 1, or a pair [lo, hi] with 1 <= lo <= hi')
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise fail('true or false')
        return value
    if isinstance(default, str):
        if not isinstance(value, str) or (meta['choices'] and value not in meta['choices']):
            raise fail(' or '.join(map(repr, meta['choices'])) if meta['choices'] else 'a name')
        return value
    kind = type(default)
    if not number_in_range(value, kind):
        upper = '' if meta['high'] is None else f' and at most {meta["high"]}'
        raise fail(f'{"a number" if kind is float else "an integer"} of at least {meta["low"]}{upper}')
    return kind(value)


def reference() -> str:
    """The configuration reference (docs/configuration.md holds it) as a Markdown table."""
    rows = ['| key | default | meaning |', '| --- | --- | --- |']
    for field in dataclasses.fields(TreeConfig):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        rows.append(f'| `{field.name}` | `{default}` | {field.metadata["doc"]} |')
    return '\n'.join(rows) + '\n'
