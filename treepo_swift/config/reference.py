"""The configuration reference as Markdown, and as a JSON Schema for editors: both from the sections themselves."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .errors import SELECTORS, models_of
from .tree_config import TreeConfig


def schema() -> dict[str, Any]:
    """JSON Schema of a tree config, for editors that complete and check YAML files by it."""
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'treepo_swift tree config',
        **_with_names(TreeConfig.model_json_schema()),
    }


def _with_names(node: Any) -> Any:
    """Let a plain string stand where a union of sections does, as `TreeConfig` does."""
    if isinstance(node, list):
        return [_with_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_names(value) for key, value in node.items()}
    if 'oneOf' in node:
        node['anyOf'] = [{'type': 'string'}, *node.pop('oneOf')]
    # What a section's selector is by default need not be written.
    if 'required' in node:
        node['required'] = [key for key in node['required'] if key not in SELECTORS]
    return node


def reference() -> str:
    """One table of the keys at the top, and one for each section."""
    parts = [_table(TreeConfig, '')]
    parts += _sections(TreeConfig, '')
    return '\n'.join(parts)


def _sections(model: type[BaseModel], prefix: str) -> list[str]:
    parts: list[str] = []
    for name, field in model.model_fields.items():
        members = models_of(model, name)
        if not members:
            continue
        path = f'{prefix}{name}'
        parts.append(f'## {path}\n\n{field.description}\n')
        if len(members) == 1 and not _selector(members[0]):
            parts += [_table(members[0], f'{path}.'), *_sections(members[0], f'{path}.')]
            continue
        parts.append(_choices(members, path, field.default))
    return parts


def _choices(members: list[type[BaseModel]], path: str, default: Any) -> str:
    """What may stand at `path`, and the keys that each choice has."""
    rows = ['| choice | meaning |', '| --- | --- |']
    keys: dict[tuple[str, str, str], list[str]] = {}
    for member in members:
        selector = _selector(member)
        names = [name for name in get_args(member.model_fields[selector].annotation) if isinstance(name, str)]
        shown = ', '.join(f'`{name}`' for name in names) or 'your own'
        chosen = ' (default)' if isinstance(default, member) else ''
        rows.append(f'| `{selector}:` {shown}{chosen} | {_line(member.__doc__)} |')
        for name, field in member.model_fields.items():
            if name != selector:
                keys.setdefault((name, _default(field), _line(field.description)), []).append(shown)
    if keys:
        rows += ['', '| key | of | default | meaning |', '| --- | --- | --- | --- |']
        rows += [f'| `{path}.{name}` | {", ".join(of)} | {value} | {doc} |' for (name, value, doc), of in keys.items()]
    return '\n'.join(rows) + '\n'


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ['| key | default | meaning |', '| --- | --- | --- |']
    for name, field in model.model_fields.items():
        if not models_of(model, name):
            rows.append(f'| `{prefix}{name}` | {_default(field)} | {_line(field.description)} |')
        elif not prefix:
            rows.append(f'| [`{name}`](#{name}) | {_default(field)} | {_line(field.description)} |')
    return '\n'.join(rows) + '\n'


def _selector(model: type[BaseModel]) -> str:
    return next((key for key in SELECTORS if key in model.model_fields), '')


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return 'none'
    if isinstance(field.default, BaseModel):
        selector = _selector(type(field.default))
        return f'`{getattr(field.default, selector)}`' if selector else 'see there'
    value = field.default
    return f'`{value}`' if isinstance(value, str) else f'`{json.dumps(value)}`'


def _line(text: str | None) -> str:
    return ' '.join((text or '').split()).replace('|', '\\|')
