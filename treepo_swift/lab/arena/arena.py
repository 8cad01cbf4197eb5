"""A whole arena: the pre-trained model, the runs, the report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runs import RESULTS, Cell, Point, ResultsFile, run_matrix
from .settings import Matrix


def run_arena(
    matrix: Matrix, folder: Path, *, cache: Path, threads: int = 1, say: Callable[[str], Any] = print
) -> None:
    """Make the runs that `folder` does not have yet. Loads torch only where one is missing.

    Raises:
        ValueError: ``results.jsonl`` in `folder` is not an arena's.
        ServiceFailed: with ``loop: swift``, what swift said when it ended too early.
    """
    file = ResultsFile(folder / RESULTS)
    file.path.parent.mkdir(parents=True, exist_ok=True)

    def train_cell(cell: Cell) -> list[Point]:
        # More threads would share sums otherwise, and a run would not be the same again.
        os.environ.setdefault('OMP_NUM_THREADS', str(threads))
        import torch

        from .learn import train
        from .model import pretrained

        torch.set_num_threads(threads)
        if matrix.loop == 'swift':
            from .swift_loop import train_by_swift

            # One folder for all: that of a run that failed stays, and so does the last one's.
            return train_by_swift(matrix, cell, folder / 'run', cache=cache, threads=threads)
        model = pretrained(matrix.the_task, matrix.pretraining, cache, say=say)
        return train(
            model,
            matrix.the_task,
            matrix.config_of(cell.method),
            matrix.training_of(cell.method),
            lr=cell.lr,
            seed=cell.seed,
        )

    run_matrix(matrix, file, train_cell, say=say)
