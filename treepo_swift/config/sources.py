"""Where a config comes from: a YAML file, and the environment over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import SELECTORS, ConfigError

ENV_PREFIX = 'TREEPO_'
CONFIG_ENV = 'TREEPO_CONFIG'
"""Path of a YAML file with `TreeConfig` keys."""
SEPARATOR = '__'
"""Between the names of a section and its key in the environment."""


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What `yaml.safe_load` raises: also for dates that do not exist, bytes that are no text, and depths beyond reason."""
NAMED_BY = {
    'branching': 'policy',
    'budget': 'policy',
    'fallback': 'policy',
    'advantage': 'estimator',
    'answer': 'detector',
    'repetition': 'rule',
}
"""What a plain string says where it stands for a section."""


def read_sources(environ: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, what was given there), nested, one after the other; later ones win."""
    path = environ.get(CONFIG_ENV)
    if path:
        yield f'{path} (named by {CONFIG_ENV})', _read_yaml(path)
    for name, text in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and name != CONFIG_ENV:
            value = _parse(name, text)
            for key in reversed(name[len(ENV_PREFIX) :].lower().split(SEPARATOR)):
                value = {key: value}
            yield f'environment variable {name}', value


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `more` over them, section by section."""
    result = dict(values)
    for key, value in more.items():
        old, new = (_section(key, v) for v in (result.get(key), value))
        result[key] = merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else value
    return result


def _section(key: str, value: Any) -> Any:
    return {NAMED_BY[key]: value} if isinstance(value, str) and key in NAMED_BY else value


def place_of(keys: tuple[str, ...], sources: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Which of `sources` gave what stands at `keys`; where that is none of them alone, all that come near."""
    depths = []
    for where, given in sources:
        depth, value = 0, given
        while depth < len(keys) and isinstance(value, Mapping) and keys[depth] in value:
            value, depth = value[keys[depth]], depth + 1
        depths.append((depth, where))
    deepest = max(depth for depth, _ in depths)
    near = [where for depth, where in depths if depth == deepest]
    return near[-1] if deepest == len(keys) and keys else ', '.join(near)


def selector_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with what chooses a section's other keys before them."""
    first = {key: values[key] for key in SELECTORS if key in values}
    rest = {key: selector_first(v) if isinstance(v, Mapping) else v for key, v in values.items() if key not in first}
    return {**first, **rest}


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f'{CONFIG_ENV} names {path!r}, which is not a file.')
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except OSError as e:
        raise ConfigError(f'{path} (named by {CONFIG_ENV}) can not be read: {e}') from None
    except NOT_YAML as e:
        raise ConfigError(f'{path} (named by {CONFIG_ENV}) is not valid YAML: {e}') from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f'{path} (named by {CONFIG_ENV}) must hold "key: value" lines, not a {type(values).__name__}.'
        )
    if not all(isinstance(key, str) for key in values):
        raise ConfigError(f'{path} (named by {CONFIG_ENV}): keys must be names, not {list(values)}.')
    return values


def _parse(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except NOT_YAML:
        raise ConfigError(f'environment variable {name}={text!r} can not be read as a YAML value.') from None
