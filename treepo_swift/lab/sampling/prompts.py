"""Prompts of a JSON lines file, each with a name that a resumed run knows it by."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_TAKEN = ('images', 'videos', 'audios', 'tools')
"""What a dataset of swift may have and these commands do not pass on."""
ALLOWED = 'a JSON object with "messages" (a list of {"role", "content"}), or with "prompt" or "query" (a text)'


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One line of the file."""

    line: int
    key: str
    """Hash of the whole line's content, and which of its equals it is: another line order changes nothing."""
    messages: list[dict[str, Any]]
    """Up to the question: answers at the end of a training dataset are left out."""
    columns: dict[str, Any]
    """What else the line says, for reward functions."""


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow]:
    """The prompts of a JSON lines file, the first `limit` of them. Empty lines are skipped.

    Raises:
        ValueError: a line is no prompt, or there is none at all; it names the line and what is allowed.
        OSError: the file can not be read.
    """
    rows: list[PromptRow] = []
    seen: Counter[str] = Counter()
    for number, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        values = _object(line, f'{path}, line {number}')
        messages = _messages(values, f'{path}, line {number}')
        if other := [name for name in NOT_TAKEN if values.get(name)]:
            raise ValueError(
                f'{path}, line {number} has {" and ".join(map(repr, other))}: only texts are sampled here.'
            )
        content = json.dumps([messages, values.get('solution')], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        columns = {name: value for name, value in values.items() if name not in ('messages', 'prompt', 'query')}
        rows.append(PromptRow(number, f'{digest}-{seen[digest]}', messages, columns))
        seen[digest] += 1
    if not rows:
        raise ValueError(f'{path} has no prompts. Each line must be {ALLOWED}.')
    return rows


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise ValueError(f'{place}: not JSON ({e}). It must be {ALLOWED}.') from None
    if not isinstance(values, dict):
        raise ValueError(f'{place}: it must be {ALLOWED}.')
    return values


def _messages(values: dict[str, Any], place: str) -> list[dict[str, Any]]:
    given = [name for name in ('messages', 'prompt', 'query') if name in values]
    if len(given) != 1:
        found = f'it has {" and ".join(map(repr, given))}' if given else f'its keys are {", ".join(values) or "none"}'
        raise ValueError(f'{place}: {found}. It must be {ALLOWED}, one of them.')
    value = values[given[0]]
    if given[0] != 'messages':
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'{place}: {given[0]!r} must be a text that is not empty.')
        return [{'role': 'user', 'content': value}]
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and isinstance(message.get('role'), str) and 'content' in message for message in value
    ):
        raise ValueError(f'{place}: "messages" must be a list of {{"role": ..., "content": ...}}.')
    messages = list(value)
    while messages and messages[-1]['role'] == 'assistant':
        messages.pop()
    if not messages:
        raise ValueError(f'{place}: "messages" asks nothing.')
    return messages
