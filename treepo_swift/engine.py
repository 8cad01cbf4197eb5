"""Tokens in, tokens out: what a tree needs of an inference engine, and vLLM's way of giving it.

Only this module talks to swift's `GRPOVllmEngine`. Segments go in as token ids and come back as token ids with the
log-probs that they were sampled with; swift's template is used once per prompt.
"""
from __future__ import annotations

import asyncio
import collections
import copy
import gc
import math
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, AsyncGenerator, Protocol, Sequence

from .segments import Segment
from .tree import StopReason

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine
    from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

ENCODE_THREADS = 4


class EngineError(RuntimeError):
    """The engine gave no usable answer to one request."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt: its token ids and whatever else (images, template inputs) swift's template made of it."""

    token_ids: list[int]
    inputs: dict[str, Any]
    """What the template made of it; `completion` reads it."""
    engine_inputs: dict[str, Any] = field(default_factory=dict)
    """What the engine takes beside token ids (images, ...)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how urgently a tree's requests run."""

    rank: int = 0
    """Data-parallel rank: one for the whole tree, whose prefixes are in that rank's KV cache."""
    priority: int = 0
    """Lower goes first, where the engine schedules by priority."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the trainer and the config checks want to know of a running engine."""

    model: str
    max_model_len: int
    block_size: int
    """Tokens of a KV block: prefixes are reused in whole blocks."""
    max_logprobs: int = 0
    """Most log-probs per token that can be asked for; 0 where the engine returns only the sampled token's."""
    ranks: int = 1
    """Data-parallel ranks."""
    kv_tokens: int = 0
    """Tokens that the KV cache of one rank holds; 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What the engine counted since it started."""

    prefix_queries: int
    """Tokens of requests that were looked up in the prefix cache."""
    prefix_hits: int
    preemptions: int
    """Requests that had to give up their KV blocks and start over."""
    generated_tokens: int

    def since(self, before: EngineCounters) -> EngineCounters:
        return EngineCounters(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class SegmentEngine(Protocol):
    """What `TreeRolloutScheduler` asks of an engine."""

    info: EngineInfo
    stop_strings: list[str]
    """The batch's stop strings, those that the user asked for."""
    async def encode(self, request: RolloutInferRequest) -> Prompt:
        """Turn messages (and images, tools) into token ids. Raises whatever the template raises."""

    async def begin_batch(self, request_config: RequestConfig, *, top_logprobs: int = 0) -> None:
        """Fix the sampling parameters of the segments to come; with `top_logprobs` they come with entropies."""

    def generate(self, prompt: Prompt, response_ids: Sequence[int], *, max_tokens: int, segment_tokens: int,
                 seed: int | None, place: Place) -> AsyncGenerator[Segment, None]:
        """Sample up to `max_tokens` after ``prompt.token_ids + response_ids``, as segments of `segment_tokens`.

        Only the last segment may be shorter or have a `stop`. Closing the generator ends the sampling. Raises
        `EngineError`.
        """

    def counters(self) -> EngineCounters | None:
        """None where the engine keeps no statistics."""

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probs of ``token_ids[1:]``, each given all ids before it, at temperature 1."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens included."""

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        """The assistant message that reward functions see, as swift's template writes it.

        Where it is not `first`, the tokens go on with a message that another turn began.
        """


def check_request_config(request_config: RequestConfig) -> None:
    """Refuse sampling options that can not hold when a response is sampled in pieces."""
    if request_config.n != 1:
        raise ValueError(f'request_config.n={request_config.n}: a tree answers every request once, n must be 1.')
    if request_config.structured_outputs_regex:
        raise ValueError('structured_outputs_regex (--structured_outputs_regex) can not be used with trees: its '
                         'automaton would start anew at every fork.')
    for name in ('presence_penalty', 'frequency_penalty'):
        if getattr(request_config, name):
            raise ValueError(f'{name}={getattr(request_config, name)} can not be used with trees: vLLM counts it over '
                             'the tokens of one request, which is only a part of a path. Set it to 0.')


class SegmentBuffer:
    """Cuts what an engine streams into segments."""
    def __init__(self, segment_tokens: int) -> None:
        self._size = segment_tokens
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] | None = None

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float], entropies: Sequence[float] | None) -> None:
        self._tokens += token_ids
        self._logprobs += logprobs
        if entropies is not None:
            self._entropies = [*(self._entropies or []), *entropies]

    def full(self, *, finished: bool) -> bool:
        """Whether a segment is complete that is not the last one."""
        return len(self._tokens) >= self._size + finished

    def take(self, *, cached_tokens: int, stop: StopReason | None = None) -> Segment:
        """Remove the first segment, or all that there is of it."""
        size, tokens, logprobs, entropies = self._size, self._tokens, self._logprobs, self._entropies
        self._tokens, self._logprobs = tokens[size:], logprobs[size:]
        self._entropies = entropies and entropies[size:]
        return Segment(tokens[:size], logprobs[:size], stop, entropies and entropies[:size], cached_tokens,
                       len(self._tokens))


def entropy(logprobs: Sequence[float]) -> float:
    """Entropy in nats of a distribution of which only these outcomes are known; the rest counts as one more."""
    known = [(math.exp(value), value) for value in logprobs if value > -math.inf]
    rest = 1 - math.fsum(p for p, _ in known)
    total = -math.fsum(p * value for p, value in known)
    return total - (rest * math.log(rest) if rest > 1e-12 else 0.0)


class VllmSegmentEngine:
    """`SegmentEngine` over swift's `GRPOVllmEngine` with vLLM's async engine below it."""
    def __init__(self, engine: GRPOVllmEngine) -> None:
        if not getattr(engine, 'use_async_engine', False):
            raise ValueError(
                'Trees need vLLM\'s async engine: start `swift rollout` with --vllm_use_async_engine true.')
        self._engine = engine
        self._vllm = engine.engine
        config = self._vllm.vllm_config
        ranks = int(config.parallel_config.data_parallel_size)
        block_size = int(config.cache_config.block_size)
        self.info = EngineInfo(
            model=str(engine.model_dir),
            max_model_len=int(config.model_config.max_model_len),
            block_size=block_size,
            max_logprobs=int(config.model_config.max_logprobs),
            ranks=ranks,
            kv_tokens=int(config.cache_config.num_gpu_blocks or 0) * block_size // ranks)
        self._by_priority = config.scheduler_config.policy == 'priority'
        # A full collection over what swift and vLLM have loaded stops the event loop for 0.4 s; none of it is garbage.
        gc.collect()
        gc.freeze()
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix='treepo-encode')
        self._sampling: Any = None
        self._with_entropies = False
        self.stop_strings: list[str] = []
        self._stop_ids: set[int] = set()
        self._lora: Any = None

    async def encode(self, request: RolloutInferRequest) -> Prompt:
        template = self._engine.template
        template.set_mode('vllm')
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, self._encode, request)

    def _encode(self, request: RolloutInferRequest) -> Prompt:
        inputs = self._engine.template.encode(request, True)
        # swift knows how to hand its template's images and videos to vLLM; what it would send is all we want of it.
        kept = copy.copy(self._engine)
        kept.engine = SimpleNamespace(generate=lambda llm_inputs, *args, **kwargs: llm_inputs)
        kept.default_adapter_request = None
        engine_inputs = kept._add_request(inputs, None, '')
        return Prompt(
            list(inputs['input_ids']), inputs, {
                k: v
                for k, v in engine_inputs.items() if k != 'prompt_token_ids'
            })

    async def begin_batch(self, request_config: RequestConfig, *, top_logprobs: int = 0) -> None:
        check_request_config(request_config)
        config = copy.copy(request_config)
        config.logprobs, config.seed = True, None
        config.top_logprobs = top_logprobs or None
        sampling = self._engine._prepare_generation_config(config)
        self._engine._add_stop_words(sampling, config)
        self.stop_strings = list(request_config.stop or [])
        # vLLM knows a special token by its id, and never by text: it does not decode special tokens. Without other
        # stop strings there is nothing to decode for.
        sampling.stop = [word for word in sampling.stop if word in self.stop_strings or not self._is_special(word)]
        sampling.detokenize = bool(sampling.stop)
        sampling.flat_logprobs, sampling.skip_clone = True, True
        self._with_entropies = top_logprobs > 0
        self._sampling = sampling
        self._stop_ids = set(self._engine._get_stop_token_ids(self.stop_strings))
        self._lora = await self._engine._get_grpo_lora_request_async()

    async def generate(self, prompt: Prompt, response_ids: Sequence[int], *, max_tokens: int, segment_tokens: int,
                       seed: int | None, place: Place) -> AsyncGenerator[Segment, None]:
        from vllm.sampling_params import RequestOutputKind
        sampling = copy.copy(self._sampling)
        sampling.max_tokens, sampling.seed = max_tokens, seed
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        if max_tokens > segment_tokens:
            # vLLM hands out the first token and then one chunk a segment: each tells that the one before is complete,
            # and that its last KV block is in the cache for forks.
            sampling.output_kind, sampling.stream_interval = RequestOutputKind.DELTA, segment_tokens
        buffer, cached, finished, sampled = SegmentBuffer(segment_tokens), None, False, 0
        async with aclosing(self._request(prompt, response_ids, sampling, self._lora, place)) as outputs:
            async for output in outputs:
                completion, finished = output.outputs[0], output.finished
                buffer.add(*self._sampled(completion))
                sampled += len(completion.token_ids)
                cached = (output.num_cached_tokens or 0) if cached is None else cached
                while buffer.full(finished=finished):
                    yield buffer.take(cached_tokens=cached)
                    cached = 0
                if finished:
                    stop = self._stop_reason(completion.finish_reason, completion.stop_reason)
                    if stop is None and sampled < max_tokens:
                        # Images are more tokens in the engine than in its input.
                        stop = StopReason.CONTEXT_LIMIT
                    yield buffer.take(cached_tokens=cached, stop=stop)
        if not finished:
            raise EngineError('the engine ended a request without an output')

    def counters(self) -> EngineCounters | None:
        if not self._vllm.log_stats:
            return None
        from vllm.v1.metrics.reader import Counter, get_metrics_snapshot
        totals: collections.Counter[str] = collections.Counter()
        for metric in get_metrics_snapshot():
            if isinstance(metric, Counter):
                totals[metric.name] += metric.value
        return EngineCounters(totals['vllm:prefix_cache_queries'], totals['vllm:prefix_cache_hits'],
                              totals['vllm:num_preemptions'], totals['vllm:generation_tokens'])

    async def score(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams
        lora = await self._engine._get_grpo_lora_request_async()
        sampling = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        async with aclosing(self._request(Prompt(token_ids, {}), [], sampling, lora, Place())) as outputs:
            steps = [output.prompt_logprobs async for output in outputs][-1][1:]
        return [float(step[token].logprob) for step, token in zip(steps, token_ids[1:], strict=True)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        return self._engine.template.decode_generate_ids(
            list(response_ids), first_token=first, template_inputs=prompt.inputs['template_inputs'])

    def _request(self, prompt: Prompt, response_ids: Sequence[int], sampling: Any, lora: Any,
                 place: Place) -> AsyncGenerator[Any, None]:
        inputs = {**prompt.engine_inputs, 'prompt_token_ids': prompt.token_ids + list(response_ids)}
        if not prompt.engine_inputs:
            # Nothing to render: vLLM takes the request without a detour through its renderer's threads.
            inputs['type'] = 'token'
        lora = lora or self._engine.default_adapter_request
        return self._vllm.generate(
            inputs,
            sampling,
            # An id of our own for every request: vLLM aborts by id, and one id must never mean two requests.
            f'treepo-{uuid.uuid4().hex}',
            lora_request=self._engine._add_adapter(lora) if lora else None,
            priority=place.priority if self._by_priority else 0,
            data_parallel_rank=place.rank if self.info.ranks > 1 else None)

    def _sampled(self, completion: Any) -> tuple[Sequence[int], list[float], list[float] | None]:
        """Tokens, their log-probs, and entropies where those were asked for."""
        token_ids, flat = completion.token_ids, completion.logprobs
        if len(flat) != len(token_ids):
            raise EngineError(f'the engine returned {len(token_ids)} tokens with {len(flat)} log-probs')
        # The sampled token comes first at each position.
        logprobs = [flat.logprobs[start] for start in flat.start_indices]
        if not all(map(math.isfinite, logprobs)):
            raise EngineError('the engine returned a log-prob that is not finite')
        if not self._with_entropies:
            return token_ids, logprobs, None
        known = ({
            flat.token_ids[i]: flat.logprobs[i]
            for i in range(start, end)
        } for start, end in zip(flat.start_indices, flat.end_indices, strict=True))
        return token_ids, logprobs, [entropy(list(values.values())) for values in known]

    def _is_special(self, word: str) -> bool:
        tokenizer = self._engine.tokenizer
        ids = tokenizer.encode(word, add_special_tokens=False)
        return len(ids) == 1 and ids[0] in tokenizer.all_special_ids

    def _stop_reason(self, finish_reason: str | None, stop_reason: int | str | None) -> StopReason | None:
        if finish_reason == 'length':
            return None
        if finish_reason == 'stop':
            asked = stop_reason in self._stop_ids or stop_reason in self.stop_strings
            return StopReason.STOP_STRING if asked else StopReason.EOS
        raise EngineError(f'the engine ended a request with finish_reason={finish_reason!r}')
