"""`load`: the trees of a file or of a run, for notebooks and for the viewer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from treepo_swift.wire.record import TreeRecord

FOLDER = 'trees'


class TreesError(ValueError):
    """There are no trees to read; the message says where they were looked for."""


def load(path: str | Path, *, superseded: bool = False) -> list[TreeRecord]:
    """The trees of a ``.jsonl`` file, of a ``trees`` folder, or of the output folder of a run, by step.

    A folder above that of a run does too, where it holds one run.

    A run that was resumed from a checkpoint writes some steps again. What it wrote before of these is left out, unless
    `superseded` is True.

    Lines that can't be read (a process was killed while it wrote) are skipped with a warning. Raises `TreesError` where
    nothing is found, or where lines are of a version that this package does not know.
    """
    files = _files(Path(path))
    records: list[TreeRecord] = []
    for file in files:
        found = list(_read(file))
        records += found if superseded else _last(found)
    # Stable: within a step the order of the files.
    records.sort(key=lambda record: record.step)
    return records


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise TreesError(f'{path} does not exist.')
    below = [folder for pattern in (f'*/{FOLDER}', f'*/*/{FOLDER}') for folder in sorted(path.glob(pattern))]
    for folders in ([path], [path / FOLDER], below):
        found = [files for folder in folders if (files := _ranks(folder))]
        if len(found) > 1:
            runs = '\n'.join(f'  {files[0].parent.parent}' for files in found)
            raise TreesError(f'{path} has the trees of {len(found)} runs. Name one of them:\n{runs}')
        if found:
            return found[0]
    raise TreesError(
        f'No trees in {path}: neither rank-*.jsonl nor a folder `{FOLDER}` with them. `swift rlhf` writes them with '
        '--log_completions true where a rollout grows trees.'
    )


def _ranks(folder: Path) -> list[Path]:
    return sorted(folder.glob('rank-*.jsonl'), key=lambda file: (len(file.name), file.name))


def _read(file: Path) -> Iterator[TreeRecord]:
    broken = 0
    with file.open(encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                known = isinstance(values, dict) and 'version' in values
                record = TreeRecord.from_dict(values) if known else None
            except json.JSONDecodeError:
                broken += 1
                continue
            except (ValueError, TypeError, KeyError) as e:
                what = f'it has no {e}' if isinstance(e, KeyError) else e
                raise TreesError(f'{file}, line {number}: {what}') from None
            if record is None:
                raise TreesError(f'{file}, line {number} is not a tree: it has no `version`.')
            yield record
    if broken:
        warnings.warn(f'{file}: {broken} lines are not whole and were skipped', stacklevel=3)


def _last(records: list[TreeRecord]) -> list[TreeRecord]:
    """Without the steps that a later run of the same file wrote again."""
    starts: dict[str, int] = {}
    for record in records:
        starts[record.run] = min(record.step, starts.get(record.run, record.step))
    runs = list(starts)
    # A run's steps end where one that came after it began.
    ends = {run: min((starts[later] for later in runs[i + 1 :]), default=None) for i, run in enumerate(runs)}
    return [record for record in records if (end := ends[record.run]) is None or record.step < end]
