"""Prompts, each with a name that a resumed run knows it by; those of a JSON lines file are read here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

QUESTIONS = ('messages', 'prompt', 'query')
NOT_TAKEN = ('images', 'videos', 'audios', 'tools')
"""What a dataset of swift may have and these commands do not pass on."""
ALLOWED = 'a JSON object with "messages" (a list of {"role", "content"}), or with "prompt" or "query" (a text)'


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt."""

    place: str
    """Where it stands, for messages: `line 3`."""
    key: str
    """Hash of its messages and solution, and which of its equals it is: another order changes nothing."""
    messages: list[dict[str, Any]]
    """Up to the question: answers at the end of a training dataset are left out."""
    columns: dict[str, Any]
    """What else the row says, for reward functions."""


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow]:
    """The prompts of a JSON lines file, the first `limit` of them. Empty lines are skipped.

    Raises:
        ValueError: a line is no prompt, or there is none at all; it names the line and what is allowed.
        OSError: the file can not be read.
    """
    lines = enumerate(path.read_text(encoding='utf-8').split('\n'), 1)
    values = ((f'line {at}', _object(line, f'{path}, line {at}')) for at, line in lines if line.strip())
    if rows := prompt_rows(str(path), values, limit):
        return rows
    raise ValueError(f'{path} has no prompts. Each line must be {ALLOWED}.')


def prompt_rows(source: str, values: Iterable[tuple[str, dict[str, Any]]], limit: int | None) -> list[PromptRow]:
    """The first `limit` of (place, what stands there).

    Raises:
        ValueError: something is no prompt; it names `source`, the place and what is allowed.
    """
    return list(islice(_rows(source, values), limit))


def _rows(source: str, values: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[PromptRow]:
    seen: Counter[str] = Counter()
    for at, row in values:
        messages = _messages(row, f'{source}, {at}')
        if other := [name for name in NOT_TAKEN if row.get(name)]:
            raise ValueError(f'{source}, {at} has {" and ".join(map(repr, other))}: only texts are sampled here.')
        content = json.dumps([messages, row.get('solution')], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        columns = {name: value for name, value in row.items() if name not in QUESTIONS}
        yield PromptRow(at, f'{digest}-{seen[digest]}', messages, columns)
        seen[digest] += 1


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise ValueError(f'{place}: not JSON ({e}). It must be {ALLOWED}.') from None
    if not isinstance(values, dict):
        raise ValueError(f'{place}: it must be {ALLOWED}.')
    return values


def _messages(values: dict[str, Any], place: str) -> list[dict[str, Any]]:
    given = [name for name in QUESTIONS if name in values]
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
