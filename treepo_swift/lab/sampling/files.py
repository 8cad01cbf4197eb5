"""The file that trees go to: one line each as in docs/viewer.md, with what a resumed run and `eval` need beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treepo_swift.wire.record import TreeRecord

SAMPLING_KEY = 'sampling'


@dataclass(frozen=True, slots=True)
class GrownTree:
    """A tree, and what is known of it beside the record."""

    record: TreeRecord
    prompt: str
    """`PromptRow.key`."""
    votes: list[str | None]
    """What each answer says in its last box."""
    seconds: float
    """Its share of the wall time of the batch that it grew in."""
    judged: bool
    """Whether its rewards say something."""

    def to_json(self, settings: Mapping[str, Any]) -> str:
        beside = {
            'prompt': self.prompt,
            'votes': self.votes,
            'seconds': round(self.seconds, 6),
            'judged': self.judged,
            'settings': dict(settings),
        }
        # Readers of trees ignore keys that they do not know.
        return f'{self.record.to_json()[:-1]},"{SAMPLING_KEY}":{json.dumps(beside, separators=(",", ":"))}}}'

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GrownTree:
        beside = values[SAMPLING_KEY]
        record = TreeRecord.from_dict(values)
        return cls(record, beside['prompt'], list(beside['votes']), float(beside['seconds']), bool(beside['judged']))


@dataclass(slots=True)
class TreesFile:
    """Trees that were grown with the same settings; opened, it knows those that are there already.

    Opening it mends it: half a line at its end, which a killed process left, is cut off, and that tree is grown again.

    Raises:
        ValueError: a line is not of this kind of file, or was grown with other settings; it names them.
    """

    path: Path
    settings: dict[str, Any]
    trees: list[GrownTree] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        # As they come back from a file.
        self.settings = json.loads(json.dumps(self.settings))
        if self.path.exists():
            self._read(self.path.read_bytes())

    @property
    def done(self) -> set[str]:
        """Keys of the prompts whose trees are there."""
        return {tree.prompt for tree in self.trees}

    def append(self, trees: Iterable[GrownTree]) -> None:
        """Write trees, so that they are there even where the process is killed next."""
        added = list(trees)
        for tree in added:
            # To readers a resumed file is one run: what a later run writes would take the place of what was before.
            tree.record.run = (self.trees or added)[0].record.run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('ab') as file:
            file.write(''.join(f'{tree.to_json(self.settings)}\n' for tree in added).encode())
        self.trees += added

    def _read(self, content: bytes) -> None:
        whole, newline, half = content.rpartition(b'\n')
        for number, line in enumerate(whole.split(b'\n') if newline else [], 1):
            try:
                values = json.loads(line)
                tree = GrownTree.from_dict(values)
                given = values[SAMPLING_KEY]['settings']
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(
                    f'{self.path}, line {number} is no tree that this command wrote ({type(e).__name__}: {e}). '
                    'Choose another --output.'
                ) from None
            self._check(given, number)
            self.trees.append(tree)
        if half:
            if not newline and not content.startswith(b'{"version":'):
                raise ValueError(f'{self.path} holds no trees. Choose another --output.')
            with self.path.open('r+b') as file:
                file.truncate(len(content) - len(half))

    def _check(self, given: Mapping[str, Any], number: int) -> None:
        names = [name for name in {**given, **self.settings} if given.get(name) != self.settings.get(name)]
        if names:
            was = ', '.join(f'{name} was {given.get(name)!r} and is {self.settings.get(name)!r}' for name in names)
            raise ValueError(
                f'{self.path}, line {number} was grown with other settings: {was}. Give the same ones to go on, or '
                'choose another --output.'
            )
