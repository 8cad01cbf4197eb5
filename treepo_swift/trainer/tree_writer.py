"""Trees on disk: ``--log_completions true`` keeps every tree that was trained on, one line of JSON each.

A rank writes the trees whose first trajectory it holds, to a file of its own: rewards and advantages are known on every
rank, so nothing travels for it, wherever a tree's trajectories lie. Texts and files are a thread's work. Whatever goes
wrong there ends the writing with one warning, never the training.
"""

from __future__ import annotations

import atexit
import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_swift.advantage.batch import SegmentAdvantages
from treepo_swift.config import TreeConfig
from treepo_swift.wire.pieces import PieceReader, write_texts
from treepo_swift.wire.record import Moment, Scored, record_of
from treepo_swift.wire.report import TreeReport
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace

FOLDER = 'trees'
WAITING = 4
"""Batches that may wait to be written; what comes on top is left out."""
FLUSH_SECONDS = 60.0
"""Longest wait for the last batches when the process ends."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A batch over all ranks, each list in the same order, and the traces that this rank's samples came with."""

    traces: list[dict[str, Any]]
    reports: Sequence[TreeReport]
    rewards: list[float]
    """Weighted sums."""
    rewards_per_function: list[list[float]]
    names: list[str]
    """Of the reward functions."""
    advantages: Sequence[SegmentAdvantages]
    step: int
    mode: str


class TreeWriter:
    """Appends trees to ``trees/rank-N.jsonl``. `add` takes no time and never raises."""

    def __init__(
        self, directory: Path, tokenizer: Any, config: TreeConfig, *, rank: int, warn: Callable[[str], None]
    ) -> None:
        self._path = directory / FOLDER / f'rank-{rank}.jsonl'
        # Its own: a fast tokenizer that decodes here while the trainer pads there raises "Already borrowed".
        self._tokenizer = copy.deepcopy(getattr(tokenizer, 'tokenizer', tokenizer))
        self._config = config
        self._warn = warn
        self._run = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
        self._batches: queue.Queue[ScoredBatch | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._dropped = 0
        self._skipped = 0

    @property
    def path(self) -> Path:
        return self._path

    def add(
        self,
        samples: Sequence[Any],
        reports: Sequence[TreeReport],
        *,
        rewards: list[float],
        rewards_per_function: list[list[float]],
        names: Sequence[str],
        advantages: Sequence[SegmentAdvantages],
        step: int,
        mode: str,
    ) -> None:
        """Take a batch. `samples` are this rank's, which lose their traces; all other lists are over all ranks."""
        infos = [sample.rollout_infos for sample in samples if sample.rollout_infos]
        traces = [info.pop(TRACE_KEY) for info in infos if TRACE_KEY in info]
        if not traces or self._stopped:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name='treepo-trees', daemon=True)
            self._thread.start()
            atexit.register(self.close)
        batch = ScoredBatch(traces, reports, rewards, rewards_per_function, list(names), advantages, step, mode)
        try:
            self._batches.put_nowait(batch)
        except queue.Full:
            self._dropped += len(traces)
            if self._dropped == len(traces):
                self._warn(
                    f'treepo: trees come faster than {self._path} is written; those of step {step} are left out, and '
                    'so will others be. Lower trace.rate of the tree config.'
                )

    def close(self) -> None:
        """Wait until everything is written."""
        atexit.unregister(self.close)
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._batches.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            pass
        thread.join(FLUSH_SECONDS)

    def _work(self) -> None:
        try:
            reader = self._reader()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open('a+b') as file:
                self._mend(file)
                while (batch := self._batches.get()) is not None:
                    for line in self._lines(batch, reader):
                        file.write(line.encode() + b'\n')
                    file.flush()
        except Exception as e:
            self._stopped = True
            self._warn(
                f'treepo: no more trees are written to {self._path}, and the training goes on: {type(e).__name__}: {e}'
            )
        # Nobody shall wait for a writer that has stopped.
        while self._stopped:
            if self._batches.get() is None:
                return

    def _skip(self, error: ValueError) -> None:
        if not self._skipped:
            self._warn(f'treepo: a tree is not written to {self._path}, nor are others of that kind: {error}')
        self._skipped += 1

    @staticmethod
    def _mend(file: Any) -> None:
        """A process that was killed may have left half a line: it shall not spoil the next one."""
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b'\n':
                file.write(b'\n')

    def _reader(self) -> PieceReader:
        def decode(ids: list[int]) -> str:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

        return PieceReader(decode, self._tokenizer.encode('a', add_special_tokens=False))

    def _lines(self, batch: ScoredBatch, reader: PieceReader) -> list[str]:
        members: dict[str, list[int]] = {}
        for index, report in enumerate(batch.reports):
            members.setdefault(report.id, []).append(index)
        settings = self._config.advantage
        moment = Moment(self._run, batch.step, batch.mode, settings.estimator, settings.normalisation)
        lines = []
        for values in batch.traces:
            trace = TreeTrace.from_dict(values)
            try:
                record = record_of(trace, [_scored(batch, index) for index in members.get(trace.id, [])], moment)
            except ValueError as e:
                # Somebody took a tree apart between the rollout and here. That says nothing of the next one.
                self._skip(e)
                continue
            write_texts(record, reader)
            lines.append(record.to_json())
        return lines


def _scored(batch: ScoredBatch, index: int) -> Scored:
    values = zip(batch.names, batch.rewards_per_function[index], strict=True)
    advantage = batch.advantages[index]
    return Scored(
        report=batch.reports[index],
        reward=batch.rewards[index],
        rewards={name: None if math.isnan(value) else value for name, value in values},
        advantage=advantage.mean,
        segments=advantage.values if len(advantage.values) > 1 else None,
    )
