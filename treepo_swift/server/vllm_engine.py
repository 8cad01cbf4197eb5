"""`VllmSegmentEngine`: segments from vLLM, by way of swift's engine.

Only this module talks to swift's `GRPOVllmEngine`. Segments go in as token ids and come back as token ids with the
log-probs that they were sampled with; swift's template is used once per prompt.
"""

from __future__ import annotations

import collections
import copy
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from treepo_swift.compat.capabilities import VllmFeatures, vllm_features
from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.messages import Segment
from treepo_swift.core.tree import StopReason
from treepo_swift.wire.report import EngineCounters

from .engine import ENCODE_SECONDS, EngineError, EngineGone, EngineInfo, Placement, Prompt, check_request_config
from .hooks import DeadlinePassed, HookThreads

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine
    from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest

ENCODE_THREADS = 4
SIGN_OF_LIFE_TOKENS = 512
"""A long segment, or a response that comes whole, says nothing while it is sampled. The engine is asked for a word
after so many tokens, so that a slow one is not taken for one that hangs."""
DEAD = ('EngineDeadError',)
"""What vLLM raises when there is nobody to ask again, by name: modules and base classes differ between versions."""


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
        return Segment(
            tokens[:size], logprobs[:size], stop, entropies and entropies[:size], cached_tokens, len(self._tokens)
        )


def chunk_tokens(segment_tokens: int) -> int:
    """Tokens of the chunks in which a segment is handed out: all of it, or where it is long an even part."""
    parts = [n for n in range(SIGN_OF_LIFE_TOKENS // 8, SIGN_OF_LIFE_TOKENS + 1) if segment_tokens % n == 0]
    return max(parts) if parts and segment_tokens > SIGN_OF_LIFE_TOKENS else segment_tokens


def entropy(logprobs: Sequence[float]) -> float:
    """Entropy in nats of a distribution of which only these outcomes are known; the rest counts as one more."""
    known = [(math.exp(value), value) for value in logprobs if value > -math.inf]
    rest = 1 - math.fsum(p for p, _ in known)
    total = -math.fsum(p * value for p, value in known)
    return total - (rest * math.log(rest) if rest > 1e-12 else 0.0)


class VllmSegmentEngine:
    """`SegmentEngine` over swift's `GRPOVllmEngine`, with vLLM's async engine below it or a `SteppedEngine`."""

    def __init__(self, engine: GRPOVllmEngine, features: VllmFeatures | None = None) -> None:
        """`features` are those of the installed vLLM, unless given."""
        if not getattr(engine, 'use_async_engine', False):
            raise ValueError("Trees need vLLM's async engine: start `swift rollout` with --vllm_use_async_engine true.")
        self._engine = engine
        self._vllm = engine.engine
        self._features = features or vllm_features()
        config = self._vllm.vllm_config
        ranks = int(config.parallel_config.data_parallel_size)
        block_size = int(config.cache_config.block_size)
        self.info = EngineInfo(
            model=str(engine.model_dir),
            max_model_len=int(config.model_config.max_model_len),
            block_size=block_size,
            max_logprobs=int(config.model_config.max_logprobs),
            ranks=ranks,
            kv_tokens=int(config.cache_config.num_gpu_blocks or 0) * block_size // ranks,
            dtype=str(config.model_config.dtype).removeprefix('torch.'),
        )
        self._by_priority = config.scheduler_config.policy == 'priority'
        # In colocate mode the trainer may fork data loaders afterwards: threads without work end soon.
        self._encoders = HookThreads(ENCODE_THREADS, 'treepo-encode', idle_seconds=0.5)
        self._encode_timeout = ENCODE_SECONDS
        self.answers = 0
        """Outputs of all requests so far, also parts of segments: what tells an engine that works from a hung one."""
        self._sampling: Any = None
        self._with_entropies = False
        self.stop_strings: list[str] = []
        self._stop_ids: set[int] = set()
        self._lora: Any = None

    async def encode(self, request: RolloutInferRequest) -> Prompt:
        template = self._engine.template
        template.set_mode('vllm')
        limit = self._encode_timeout
        try:
            return await self._encoders.run('encode', lambda: self._encode(request), limit)
        except DeadlinePassed:
            raise NodeFailure(
                f'the template has been encoding it for more than faults.hook_timeout={limit:g} s',
                kind='a prompt took more than faults.hook_timeout to encode',
                remedy='Look at what this sample names: an image or a video that has to be fetched? Raise '
                'faults.hook_timeout where it only is that slow.',
            ) from None

    def _encode(self, request: RolloutInferRequest) -> Prompt:
        inputs = self._engine.template.encode(request, True)
        # swift knows how to hand its template's images and videos to vLLM; what it would send is all we want of it.
        kept = copy.copy(self._engine)
        kept.engine = SimpleNamespace(generate=lambda llm_inputs, *args, **kwargs: llm_inputs)
        kept.default_adapter_request = None
        engine_inputs = kept._add_request(inputs, None, '')
        return Prompt(
            list(inputs['input_ids']), inputs, {k: v for k, v in engine_inputs.items() if k != 'prompt_token_ids'}
        )

    async def begin_batch(
        self, request_config: RequestConfig, *, top_logprobs: int = 0, encode_timeout: float = ENCODE_SECONDS
    ) -> None:
        self._encode_timeout = encode_timeout
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
        # vLLM takes an attribute that it does not know, and never reads it.
        if self._features.flat_logprobs:
            sampling.flat_logprobs = True
        if self._features.skip_clone:
            sampling.skip_clone = True
        self._with_entropies = top_logprobs > 0
        self._sampling = sampling
        self._stop_ids = set(self._engine._get_stop_token_ids(self.stop_strings))
        self._lora = await self._engine._get_grpo_lora_request_async()

    async def generate(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        *,
        max_tokens: int,
        segment_tokens: int,
        seed: int | None,
        placement: Placement,
    ) -> AsyncGenerator[Segment, None]:
        from vllm.sampling_params import RequestOutputKind

        sampling = copy.copy(self._sampling)
        sampling.max_tokens, sampling.seed = max_tokens, seed
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        if max_tokens > segment_tokens:
            # vLLM hands out the first token and then one chunk a segment: each tells that the one before is complete,
            # and that its last KV block is in the cache for forks.
            sampling.output_kind = RequestOutputKind.DELTA
            self._stream_by(chunk_tokens(segment_tokens), sampling)
        elif max_tokens > SIGN_OF_LIFE_TOKENS and self._features.stream_interval != 'none':
            sampling.output_kind = RequestOutputKind.DELTA
            self._stream_by(SIGN_OF_LIFE_TOKENS, sampling)
        buffer, cached, finished, sampled = SegmentBuffer(segment_tokens), None, False, 0
        async with aclosing(self._request(prompt, response_ids, sampling, self._lora, placement)) as outputs:
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

    def _stream_by(self, tokens: int, sampling: Any) -> None:
        """Ask for chunks of `tokens`; where vLLM can't, it hands out every token, and `SegmentBuffer` collects them."""
        if self._features.stream_interval == 'request':
            sampling.stream_interval = tokens
        elif self._features.stream_interval == 'engine':
            # Its output processor reads this when it takes a request. What has been taken keeps its own; a user's
            # larger interval stays, as newer versions of vLLM let it.
            asked = self._vllm.vllm_config.scheduler_config.stream_interval
            self._vllm.output_processor.stream_interval = max(asked, tokens)

    def counters(self) -> EngineCounters | None:
        if not (self._features.metrics and self._vllm.log_stats):
            return None
        from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

        totals: collections.Counter[str] = collections.Counter()
        for metric in get_metrics_snapshot():
            if isinstance(metric, Counter):
                totals[metric.name] += metric.value
        return EngineCounters(
            totals['vllm:prefix_cache_queries'],
            totals['vllm:prefix_cache_hits'],
            totals['vllm:num_preemptions'],
            totals['vllm:generation_tokens'],
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        lora = await self._engine._get_grpo_lora_request_async()
        sampling = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        async with aclosing(self._request(Prompt(token_ids, {}), [], sampling, lora, Placement())) as outputs:
            steps = [output.prompt_logprobs async for output in outputs][-1][1:]
        return [float(step[token].logprob) for step, token in zip(steps, token_ids[1:], strict=True)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        return self._engine.template.decode_generate_ids(
            list(response_ids), first_token=first, template_inputs=prompt.inputs['template_inputs']
        )

    async def _request(
        self, prompt: Prompt, response_ids: Sequence[int], sampling: Any, lora: Any, placement: Placement
    ) -> AsyncGenerator[Any, None]:
        inputs = {**prompt.engine_inputs, 'prompt_token_ids': prompt.token_ids + list(response_ids)}
        if self._features.token_inputs and not prompt.engine_inputs:
            # Nothing to render: vLLM takes the request without a detour through its renderer's threads.
            inputs['type'] = 'token'
        lora = lora or self._engine.default_adapter_request
        outputs = self._vllm.generate(
            inputs,
            sampling,
            # An id of our own for every request: vLLM aborts by id, and one id must never mean two requests.
            f'treepo-{uuid.uuid4().hex}',
            lora_request=self._engine._add_adapter(lora) if lora else None,
            priority=placement.priority if self._by_priority else 0,
            data_parallel_rank=placement.rank if self.info.ranks > 1 else None,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    self.answers += 1
                    yield output
        except Exception as e:
            if type(e).__name__ not in DEAD:
                raise
            raise EngineGone(
                f"vLLM's engine has died ({type(e).__name__}: {e}). Its own log, above, has the cause, often memory. "
                'Restart `swift rollout`, then resume the training from its last checkpoint.'
            ) from e

    def _sampled(self, completion: Any) -> tuple[Sequence[int], list[float], list[float] | None]:
        """Tokens, their log-probs, and entropies where those were asked for."""
        token_ids, flat = completion.token_ids, completion.logprobs
        if len(flat) != len(token_ids):
            raise EngineError(f'the engine returned {len(token_ids)} tokens with {len(flat)} log-probs')
        if not self._features.flat_logprobs:
            return self._sampled_of_steps(token_ids, flat)
        # The sampled token comes first at each position.
        logprobs = [flat.logprobs[start] for start in flat.start_indices]
        if not self._with_entropies:
            return token_ids, logprobs, None
        known = (
            {flat.token_ids[i]: flat.logprobs[i] for i in range(start, end)}
            for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
        )
        return token_ids, logprobs, [entropy(list(values.values())) for values in known]

    def _sampled_of_steps(
        self, token_ids: Sequence[int], steps: Sequence[Any]
    ) -> tuple[Sequence[int], list[float], list[float] | None]:
        """The same where vLLM gives a dictionary a token."""
        logprobs = [float(step[token].logprob) for step, token in zip(steps, token_ids, strict=True)]
        if not self._with_entropies:
            return token_ids, logprobs, None
        return token_ids, logprobs, [entropy([known.logprob for known in step.values()]) for step in steps]

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
