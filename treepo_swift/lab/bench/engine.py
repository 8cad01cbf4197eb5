"""Independent sampling and trees on one real engine, in turns, so that both meet the machine in the same mood."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from treepo_swift.server.vllm_engine import VllmSegmentEngine
from treepo_swift.wire.note import RequestNote
from treepo_swift.wire.report import REPORT_KEY, EngineCounters

from .example import load_example
from .result import Run, result
from .workload import EndingEngine, Workload

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine
    from swift.infer_engine.protocol import RolloutInferRequest

MODES = ('independent', 'lockstep', 'stream', 'example')
SAMPLE_SECONDS = 0.1


class Bench:
    """One engine and a workload. `run` makes one rollout in a mode."""

    def __init__(self, engine: GRPOVllmEngine, workload: Workload, *, temperature: float, example: str | None) -> None:
        from treepo_swift.server.scheduler import TreeRolloutScheduler

        self._engine = engine
        self._workload = workload
        self._temperature = temperature
        self._requests_sent, self._example_tokens = 0, 0
        self._responses: list[list[int]] = []
        if workload.kind != 'natural':
            ignore_eos(engine)
        self._segments = VllmSegmentEngine(engine)
        ending: Any = self._segments
        if workload.lengths is not None:
            ending = EndingEngine(self._segments, workload.lengths, random.Random(0), workload.max_tokens)
        self._trees = TreeRolloutScheduler(segment_engine=ending, tokenizer=engine.tokenizer)
        self._example = load_example(example, engine, workload) if example else None
        if self._example:
            self._count_requests()

    @property
    def settings(self) -> dict[str, Any]:
        info, workload = self._segments.info, self._workload
        return {
            'model': info.model,
            'prompts': len(workload.messages),
            'width': workload.width,
            'workload': workload.kind,
            'max_tokens': workload.max_tokens,
            'config': workload.config.to_dict(),
            'temperature': self._temperature,
            'engine': {**asdict(info), 'max_num_seqs': self._engine.engine.vllm_config.scheduler_config.max_num_seqs},
        }

    async def warm_up(self, mode: str) -> None:
        """The same with the first prompt only."""
        whole = self._workload
        self._workload = replace(whole, messages=whole.messages[:1])
        await self.run(mode)
        self._workload = whole

    async def run(self, mode: str) -> Run:
        modes: dict[str, Callable[[], Awaitable[Run]]] = {
            'independent': self._independent,
            'lockstep': lambda: self._grow(by_segment=True),
            'stream': lambda: self._grow(by_segment=False),
            'example': self._run_example,
        }
        return await modes[mode]()

    async def prompt_tokens(self) -> float:
        """Mean tokens of a prompt."""
        prompts = [await self._segments.encode(request) for request in self._requests(1)]
        return sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)

    async def grown_rows(self) -> list[tuple[int, list[int]]]:
        """Of the last rollout of trees: how many tokens the prompt has, and the token ids of prompt and answer."""
        prompts = [await self._segments.encode(request) for request in self._requests(1)]
        ids = [prompt.token_ids for prompt in prompts for _ in range(self._workload.width)]
        return [(len(p), [*p, *response]) for p, response in zip(ids, self._responses, strict=True)]

    def _requests(self, copies: int) -> list[RolloutInferRequest]:
        from swift.infer_engine.protocol import RolloutInferRequest

        return [
            RolloutInferRequest(messages=[dict(m) for m in messages], uuid=f'bench-{i}-{k}-{time.monotonic_ns()}')
            for i, messages in enumerate(self._workload.messages)
            for k in range(copies)
        ]

    def _request_config(self, max_tokens: int) -> Any:
        from swift.infer_engine.protocol import RequestConfig

        # What swift's GRPO trainer asks for.
        return RequestConfig(max_tokens=max_tokens, temperature=self._temperature, return_details=True, logprobs=True)

    async def _independent(self) -> Run:
        requests = self._requests(self._workload.width)
        limits = [self._workload.max_tokens] * len(requests)
        if self._workload.lengths is not None:
            dice = random.Random(len(requests))
            limits = [min(limit, self._workload.lengths.draw(dice)) for limit in limits]
        async with self._measured() as seen:
            if len(set(limits)) == 1:
                outputs = await self._engine.async_infer(requests, self._request_config(limits[0]), use_tqdm=False)
                choices = [output.response.choices[0] for output in outputs]
            else:
                answers = (self._engine.infer_async(r, self._request_config(n)) for r, n in zip(requests, limits))
                choices = [answer.choices[0] for answer in await asyncio.gather(*answers)]
        lengths = tuple(len(choice.token_ids) for choice in choices)
        return seen.run(lengths=lengths, decoded_tokens=sum(lengths), requests=len(requests))

    async def _grow(self, *, by_segment: bool) -> Run:
        requests = self._requests(self._workload.width)
        note = RequestNote(config=self._workload.config.to_note()).to_dict()
        self._trees.by_segment = by_segment
        for request in requests:
            request.data_dict = {'treepo': note}
        async with self._measured() as seen:
            outputs: Any = await self._trees.rollout(
                requests, self._request_config(self._workload.max_tokens), use_tqdm=False
            )
        self._responses = [[token for turn in output.response_token_ids for token in turn] for output in outputs]
        reports = [output.rollout_infos[REPORT_KEY] for output in outputs]
        stats = [report['stats'] for report in reports if 'stats' in report]
        return seen.run(
            lengths=tuple(sum(report['tokens']) for report in reports),
            decoded_tokens=sum(s['decoded_tokens'] for s in stats),
            requests=sum(s['engine_requests'] for s in stats),
            scheduler_cpu_seconds=reports[0]['batch']['scheduler_cpu_seconds'],
            evicted_tokens=sum(s['evicted_tokens'] for s in stats),
            depths=tuple(report['depth'] for report in reports),
            fallback_depths=tuple(report['depth'] for report in reports if report['fallback_from'] is not None),
        )

    async def _run_example(self) -> Run:
        if self._example is None:
            raise ValueError('The mode "example" needs --example FILE: the plugin file of ms-swift\'s example.')
        # A turn of the example is a segment of ours.
        config = self._request_config(self._workload.config.segment_length)
        self._requests_sent, self._example_tokens = 0, 0
        async with self._measured() as seen:
            outputs = await self._example.async_infer(self._requests(1) * self._workload.width, config, use_tqdm=False)
        lengths = tuple(sum(map(len, output.response_token_ids)) for output in outputs)
        return seen.run(lengths=lengths, decoded_tokens=self._example_tokens, requests=self._requests_sent)

    def _count_requests(self) -> None:
        inner = self._engine.infer_async

        async def infer_async(*args: Any, **kwargs: Any) -> Any:
            self._requests_sent += 1
            response = await inner(*args, **kwargs)
            self._example_tokens += len(response.choices[0].token_ids)
            return response

        self._engine.infer_async = infer_async

    @asynccontextmanager
    async def _measured(self) -> AsyncIterator[_Seen]:
        await self._engine.engine.reset_prefix_cache()
        seen = _Seen(before=self._counters())
        watcher = asyncio.ensure_future(seen.watch())
        started = time.perf_counter()
        try:
            yield seen
        finally:
            seen.seconds = time.perf_counter() - started
            watcher.cancel()
        # vLLM counts a step after it has handed out the step's tokens.
        await asyncio.sleep(SAMPLE_SECONDS)
        seen.counted = self._counters().since(seen.before)

    def _counters(self) -> EngineCounters:
        counters = self._segments.counters()
        if counters is None:
            raise ValueError('The engine counts nothing: it needs disable_log_stats=False.')
        return counters


@dataclass
class _Seen:
    """What was watched while a rollout ran."""

    before: EngineCounters
    counted: EngineCounters = field(init=False)
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    peak_kv_usage: float = 0.0
    running: list[tuple[float, float]] = field(default_factory=list)
    """When how many sequences ran."""

    async def watch(self) -> None:
        import psutil
        from vllm.v1.metrics.reader import get_metrics_snapshot

        process, started = psutil.Process(), time.perf_counter()
        while True:
            self.peak_rss_mib = max(self.peak_rss_mib, process.memory_info().rss / 2**20)
            gauges: dict[str, list[float]] = {}
            for metric in get_metrics_snapshot():
                gauges.setdefault(metric.name, []).append(getattr(metric, 'value', 0.0))
            self.peak_kv_usage = max(self.peak_kv_usage, *gauges['vllm:kv_cache_usage_perc'])
            self.running.append((time.perf_counter() - started, sum(gauges['vllm:num_requests_running'])))
            await asyncio.sleep(SAMPLE_SECONDS)

    def tail_seconds(self) -> float:
        half = max(count for _, count in self.running) / 2
        return max(self.seconds - max(when for when, count in self.running if count >= half), 0.0)

    def run(self, *, lengths: tuple[int, ...], decoded_tokens: int, requests: int, **of_trees: Any) -> Run:
        """`of_trees`: fields of `Run` that only trees have."""
        counted = self.counted
        return Run(
            seconds=self.seconds,
            trajectory_tokens=sum(lengths),
            decoded_tokens=decoded_tokens,
            requests=requests,
            prefilled_tokens=counted.prefix_queries - counted.prefix_hits,
            prefix_hit_rate=counted.prefix_hits / max(counted.prefix_queries, 1),
            preemptions=counted.preemptions,
            peak_rss_mib=self.peak_rss_mib,
            peak_kv_usage=self.peak_kv_usage,
            tail_seconds=self.tail_seconds(),
            lengths=lengths,
            **of_trees,
        )


def open_engine(rollout_args: Sequence[str]) -> GRPOVllmEngine:
    """The engine that ``swift rollout`` would start with these options, with vLLM's statistics on."""
    from swift.arguments import RolloutArguments
    from swift.pipelines.infer.rollout import SwiftRolloutDeploy
    from swift.utils import parse_args

    from treepo_swift.compat import cpu

    cpu.apply()
    args, unknown = parse_args(RolloutArguments, [*rollout_args, '--vllm_use_async_engine', 'true'])
    if unknown:
        raise ValueError(f'options that `swift rollout` does not know: {" ".join(unknown)}')
    args.vllm_engine_kwargs = {**(args.vllm_engine_kwargs or {}), 'disable_log_stats': False}
    return SwiftRolloutDeploy.get_infer_engine(args, template=args.get_template())


def measure(bench: Bench, modes: Sequence[str], repeats: int, *, keep_rows: str | Path | None = None) -> dict[str, Any]:
    """`repeats` runs of every mode, interleaved, after a warm-up of each that does not count; see `result`. What trees
    of the last run hold goes to the file `keep_rows`, for ``--train --rows``."""

    async def all_runs() -> dict[str, Any]:
        runs: dict[str, list[Run]] = {mode: [] for mode in modes}
        for mode in modes:
            await bench.warm_up(mode)
        with tqdm(total=repeats * len(modes), desc='rollouts', dynamic_ncols=True) as bar:
            for _ in range(repeats):
                for mode in modes:
                    bar.set_postfix_str(mode)
                    runs[mode].append(await bench.run(mode))
                    bar.update()
        if keep_rows:
            Path(keep_rows).write_text(json.dumps(await bench.grown_rows()))
        return result({**bench.settings, 'prompt_tokens': await bench.prompt_tokens()}, runs)

    return asyncio.run(all_runs())


def ignore_eos(engine: GRPOVllmEngine) -> None:
    """Let every answer run to its limit, on swift's own path as on ours."""
    inner = engine._prepare_generation_config

    def prepare(request_config: Any) -> Any:
        sampling = inner(request_config)
        sampling.ignore_eos = True
        return sampling

    engine._prepare_generation_config = prepare
    engine._add_stop_words = lambda *args: None
