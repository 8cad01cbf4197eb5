"""Trees over an engine in this process, without a trainer: prompts in, judged records out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treepo_swift.advantage import estimate
from treepo_swift.config import TreeConfig
from treepo_swift.lab.progress import progress
from treepo_swift.wire.note import REQUEST_KEY, RequestNote
from treepo_swift.wire.pieces import PieceReader, write_texts
from treepo_swift.wire.record import Moment, Scored, record_of
from treepo_swift.wire.report import REPORT_KEY, TreeReport
from treepo_swift.wire.trace import TRACE_KEY, TreeTrace

from .files import GrownTree, TreesFile
from .judging import Judge, boxed
from .prompts import PromptRow

if TYPE_CHECKING:
    from treepo_swift.server.engine import SegmentEngine

ESTIMATOR = 'treepo'
"""By which advantages are shown; nothing is trained, so they are not normalised."""


class SamplingError(ValueError):
    """A batch could not be grown."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one group of answers is sampled."""

    config: TreeConfig
    width: int
    max_tokens: int
    temperature: float
    seed: int | None
    """Of the engine's sampling; None: every run is another one."""

    def to_dict(self) -> dict[str, Any]:
        """What a file's trees have in common."""
        return {
            'width': self.width,
            'max_tokens': self.max_tokens,
            'temperature': self.temperature,
            'seed': self.seed,
            'config': self.config.to_note(),
        }


def independent(config: TreeConfig, width: int, max_tokens: int) -> TreeConfig:
    """The config of answers that share nothing: `width` paths of one segment that begin at the root.

    They go the way that trees go, so that tokens and seconds compare, and no text ends them but their own.
    """
    return TreeConfig(
        segment_length=max_tokens,
        max_depth=1,
        root_divergence=width,
        fallback='root',
        stop={'answer': 'none', 'repetition': 'none'},
        faults=config.faults,
        seed=config.seed,
    )


class Sampler:
    """Grows batches of trees on one engine, one batch at a time."""

    def __init__(
        self, engine: SegmentEngine, tokenizer: Any, *, reset: Callable[[], Coroutine[Any, Any, Any]] | None = None
    ) -> None:
        """`reset` empties the engine's prefix cache; None where it has none."""
        from treepo_swift.server.scheduler import TreeRolloutScheduler

        self._segments = engine
        self._scheduler = TreeRolloutScheduler(segment_engine=engine, tokenizer=tokenizer)
        self._reset = reset
        self._reader = _piece_reader(tokenizer)
        self._runner = asyncio.Runner()
        self._started = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())

    @property
    def model(self) -> str:
        return self._segments.info.model

    @property
    def block_size(self) -> int:
        return self._segments.info.block_size

    def grow(self, rows: Sequence[PromptRow], sampling: Sampling, judge: Judge | None) -> list[GrownTree]:
        """A tree of `sampling.width` answers for each row, in order. Without a judge rewards are 0 and say nothing.

        Raises:
            SamplingError: too many answers failed (`faults.max_failure_fraction`), or the engine is gone.
            ConfigError: the tree does not fit the engine.
        """
        from treepo_swift.server.engine import EngineGone
        from treepo_swift.server.failures import RolloutError

        if self._reset:
            self._runner.run(self._reset())
        began = time.perf_counter()
        try:
            outputs = self._runner.run(self._rollout(rows, sampling))
        except (EngineGone, RolloutError) as e:
            raise SamplingError(f'{e} What was grown before is kept: give the same command again.') from e
        share = (time.perf_counter() - began) / len(rows)
        width = sampling.width
        return [
            self._read(row, outputs[index * width : (index + 1) * width], judge, share)
            for index, row in enumerate(rows)
        ]

    async def _rollout(self, rows: Sequence[PromptRow], sampling: Sampling) -> list[Any]:
        from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

        config = sampling.config.replace(trace={'rate': 1.0})
        note = RequestNote(config=config.to_note(), num_generations=sampling.width, trace=True).to_dict()
        requests = [
            RolloutInferRequest(
                messages=[dict(message) for message in row.messages],
                uuid=uuid.uuid4().hex,
                data_dict={**row.columns, REQUEST_KEY: note},
            )
            for row in rows
            for _ in range(sampling.width)
        ]
        asked = RequestConfig(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed, logprobs=True
        )
        outputs: Any = await self._scheduler.rollout(requests, asked, use_tqdm=False)
        return list(outputs)

    def _read(self, row: PromptRow, outputs: Sequence[Any], judge: Judge | None, share: float) -> GrownTree:
        reports = [TreeReport.from_dict(output.rollout_infos[REPORT_KEY]) for output in outputs]
        trace = TreeTrace.from_dict(outputs[0].rollout_infos[TRACE_KEY])
        answers = [str(output.messages[-1]['content']) for output in outputs]
        there = [index for index, report in enumerate(reports) if not report.is_placeholder]
        rewards = [0.0] * len(outputs)
        if judge and there:
            for index, value in zip(there, judge(row, [answers[i] for i in there]), strict=True):
                rewards[index] = value
        paths = [[trace.id, *reports[index].nodes] for index in there]
        found = estimate(paths, [rewards[index] for index in there], estimator=ESTIMATOR) if there else []
        advantages = dict(zip(there, found, strict=True))
        scored = [
            Scored(
                report,
                rewards[index],
                {'reward': rewards[index]} if judge else {},
                advantages.get(index, 0.0),
                None,
            )
            for index, report in enumerate(reports)
        ]
        record = record_of(trace, scored, Moment(self._started, 0, 'eval', ESTIMATOR, 'none'))
        write_texts(record, self._reader)
        votes = [boxed(text) if index in advantages else None for index, text in enumerate(answers)]
        return GrownTree(record, row.key, votes, share, judge is not None)

    def close(self) -> None:
        self._runner.close()


def _piece_reader(tokenizer: Any) -> PieceReader:
    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return PieceReader(decode, tokenizer.encode('a', add_special_tokens=False))


def open_sampler(model: str, options: Sequence[str]) -> Sampler:
    """A sampler on the engine that ``swift rollout --model MODEL`` would start with these further options."""
    from treepo_swift.lab.bench.engine import open_engine
    from treepo_swift.server.vllm_engine import VllmSegmentEngine

    engine = open_engine(['--model', model, *options])
    return Sampler(VllmSegmentEngine(engine), engine.tokenizer, reset=engine.engine.reset_prefix_cache)


@dataclass(frozen=True, slots=True)
class Plan:
    """Trees that shall be in a file."""

    name: str
    sampling: Sampling
    file: TreesFile


def grow_missing(
    sampler: Sampler,
    rows: Sequence[PromptRow],
    plans: Sequence[Plan],
    judge: Judge | None,
    *,
    batch: int,
    warm_up: bool = False,
) -> None:
    """Grow the trees that the plans' files do not have yet, `batch` prompts at a time, with a progress bar.

    The plans take turns, a batch each, so that all of them meet the machine in the same mood. With `warm_up` each grows
    a tree before its first batch that does not count, so that this batch's time is like the others'.
    """
    done = {plan.name: plan.file.done for plan in plans}
    cold = {plan.name for plan in plans if warm_up}
    there = sum(row.key in done[plan.name] for row in rows for plan in plans)
    with progress(total=len(rows) * len(plans), initial=there, unit='tree') as bar:
        for part in _batches(rows, batch):
            for plan in plans:
                missing = [row for row in part if row.key not in done[plan.name]]
                if not missing:
                    continue
                bar.set_description(plan.name)
                if plan.name in cold:
                    cold.remove(plan.name)
                    sampler.grow(missing[:1], plan.sampling, None)
                plan.file.append(sampler.grow(missing, plan.sampling, judge))
                bar.update(len(missing))


def _batches(rows: Sequence[PromptRow], size: int) -> Iterator[Sequence[PromptRow]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]
