"""Where prompts come from: a file of JSON lines, a dataset as swift loads it, or a task of reasoning-gym."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .judging import Judge, load_judge
from .prompts import QUESTIONS, PromptRow, prompt_rows, read_prompts
from .puzzles import PREFIX, read_puzzles

FILES = ('.jsonl', '.json', '.csv', '.txt', '.parquet')
DATA_SEED = 42
"""swift's default of --data_seed."""


@dataclass(frozen=True, slots=True)
class Source:
    """What --prompts or --data says, and what belongs to it."""

    name: str
    """A file; a dataset of swift: ``ID[:SUBSET][#N]`` or a local folder; or ``reasoning-gym:TASK[#N]``."""
    use_hf: bool | None = None
    """From Hugging Face or from ModelScope; None: as USE_HF says."""
    columns: Mapping[str, str] | None = None
    """Names in the dataset, to those of swift: ``{'answer': 'solution'}``."""
    data_seed: int | None = None
    """Which puzzles are made, or which N rows of a dataset are drawn; None: the first N, as --val_dataset of swift."""
    plugins: Sequence[Path] = ()
    """Files that register datasets and reward functions with swift."""

    @property
    def is_file(self) -> bool:
        """One that is read here; what is none goes to swift."""
        return Path(self.name).is_file()

    @property
    def trees_path(self) -> Path:
        """Where its trees go: beside a file, else in the current folder."""
        if self.is_file:
            path = Path(self.name)
            return path.with_name(f'{path.stem}.trees.jsonl')
        return Path(re.sub(r'[^\w.-]+', '-', self.name).strip('-.') + '.trees.jsonl')

    def load(self, limit: int | None, reward: str | None) -> tuple[list[PromptRow], Judge | None]:
        """The first `limit` prompts, and who judges: the reward function `reward`, what the source comes with, or
        their solutions; None where no prompt has one.

        Raises:
            ValueError: it is no source, or some of it no prompt, or it can't be judged so; it names what is allowed.
        """
        _import_plugins(self.plugins)
        if self.name.startswith(PREFIX):
            self._refuse('--use_hf', '--columns')
            rows, own = read_puzzles(self.name, limit, self._seed)
            return rows, load_judge(reward, rows) if reward else own
        if self.is_file:
            self._refuse('--use_hf', '--columns', '--data_seed')
            rows = read_prompts(Path(self.name), limit)
        else:
            rows = self._dataset(limit)
        judged = reward is not None or any(row.columns.get('solution') is not None for row in rows)
        return rows, load_judge(reward, rows) if judged else None

    @property
    def _seed(self) -> int:
        return DATA_SEED if self.data_seed is None else self.data_seed

    def _refuse(self, *options: str) -> None:
        given = [name for name in options if getattr(self, name.removeprefix('--')) is not None]
        if given:
            raise ValueError(f'{" and ".join(given)} does nothing for {self.name}: leave it out.')

    def _dataset(self, limit: int | None) -> list[PromptRow]:
        """Rows as a GRPO training of swift sees them: through its preprocessors, with all columns."""
        bare = self.name.rpartition('#')[0] or self.name
        if not Path(bare).exists() and (bare.startswith(('.', '/', '~')) or bare.endswith(FILES)):
            raise ValueError(f'{bare}: there is no such file or folder.')
        from swift.dataset import load_dataset

        try:
            dataset, _ = load_dataset(
                self.name,
                # In this process: with workers, even one, `datasets` puts a copy in the place of os.environ.
                num_proc=None,
                seed=self._seed,
                shuffle=self.data_seed is not None,
                use_hf=self.use_hf,
                columns=None if self.columns is None else dict(self.columns),
                remove_unused_columns=False,
            )
        except Exception as e:
            # What swift, datasets and the hubs raise is of no common class.
            reason = str(e).strip().partition('\n')[0] or 'no reason given'
            raise ValueError(
                f'{self.name}: swift can not load this dataset ({type(e).__name__}: {reason}). Allowed are a file of '
                'JSON lines, a dataset id or a folder as --dataset of swift takes it (ID:SUBSET#N; --use_hf true for '
                f'Hugging Face), and {PREFIX}TASK#N.'
            ) from e
        values = ((f'row {at}', _without_none(row)) for at, row in enumerate(dataset, 1))
        if rows := prompt_rows(self.name, values, limit):
            return rows
        raise ValueError(f'{self.name} has no rows that swift makes "messages" of: --columns renames columns.')


def _without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table has a value in each column, and each message one for each key that any message has."""
    values = {name: value for name, value in row.items() if value is not None}
    if 'messages' in values:
        values = {name: value for name, value in values.items() if name not in QUESTIONS}
        values['messages'] = [{k: v for k, v in message.items() if v is not None} for message in row['messages']]
    return values


def _import_plugins(files: Sequence[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise ValueError(f'--external_plugins {file}: there is no such file.')
    if files:
        from swift.utils import import_external_file

        for file in files:
            import_external_file(str(file))
