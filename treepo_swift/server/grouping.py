"""Which requests of a batch grow in one tree."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that share a tree: positions in the batch, and what makes the tree's seed its own."""

    members: tuple[int, ...]
    key: str
    copy: int
    """0 for the first tree of this prompt in the batch, 1 for the second, ..."""


def prompt_key(**parts: Any) -> str:
    """One string for everything that makes two requests the same prompt (messages, media, tools, data)."""
    return json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)


def group_requests(keys: Sequence[str], num_generations: Sequence[int | None]) -> list[Group]:
    """Gather equal keys into groups of `num_generations` (None: all of them), in order of first appearance.

    A prompt that occurs twice in a batch makes two trees, not one of double width. A group may be smaller than
    asked for, where the batch was split between servers.
    """
    positions: dict[Hashable, list[int]] = {}
    for index, (key, size) in enumerate(zip(keys, num_generations, strict=True)):
        positions.setdefault((key, size), []).append(index)
    groups = []
    for (key, size), members in positions.items():
        step = size or len(members)
        for copy, begin in enumerate(range(0, len(members), step)):
            groups.append(Group(tuple(members[begin : begin + step]), key, copy))
    return groups
