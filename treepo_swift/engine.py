"""Tokens in, tokens out: what a tree needs of an inference engine, and vLLM's way of giving it.

Only this module talks to swift's `GRPOVllmEngine`. Segments go in as token ids and come back as token ids with the
log-probs that they were sampled with; swift's template is used once per prompt.
"""
from __future__ import annotations

import asyncio
import copy
import gc
import math
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Sequence

from .search import Segment
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


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the trainer and the config checks want to know of a running engine."""

    model: str
    max_model_len: int
    block_size: int
    """Tokens of a KV block: prefixes are reused in whole blocks."""
    max_logprobs: int = 0
    """Most log-probs per token that can be asked for; 0 where the engine returns only the sampled token's."""


class SegmentEngine(Protocol):
    """What `TreeRolloutScheduler` asks of an engine."""

    info: EngineInfo
    stop_strings: list[str]
    """The batch's stop strings, those that the user asked for."""
    async def encode(self, request: RolloutInferRequest) -> Prompt:
        """Turn messages (and images, tools) into token ids. Raises whatever the template raises."""

    async def begin_batch(self, request_config: RequestConfig, *, top_logprobs: int = 0) -> None:
        """Fix the sampling parameters of the segments to come; with `top_logprobs` they come with entropies."""

    async def generate(self, prompt: Prompt, response_ids: Sequence[int], *, max_tokens: int,
                       seed: int | None) -> Segment:
        """Sample up to `max_tokens` after ``prompt.token_ids + response_ids``; raises `EngineError`."""

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probs of ``token_ids[1:]``, each given all ids before it, at temperature 1."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens included."""

    def completion(self, prompt: Prompt, response_ids: list[int]) -> str:
        """The assistant message that reward functions see, as swift's template writes it."""


def check_request_config(request_config: RequestConfig) -> None:
    """Refuse sampling options that can not hold when a response is sampled in pieces."""
    if request_config.n != 1:
        raise ValueError(f'request_config.n={request_config.n}: a tree answers every request once, n must be 1.')
    if request_config.structured_outputs_regex:
        raise ValueError('structured_outputs_regex (--structured_outputs_regex) can not be used with trees: its '
                         'automaton would start anew at every segment.')
    for name in ('presence_penalty', 'frequency_penalty'):
        if getattr(request_config, name):
            raise ValueError(f'{name}={getattr(request_config, name)} can not be used with trees: vLLM counts it over '
                             'the tokens of one request, which is one segment. Set it to 0.')


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
        config = engine.engine.vllm_config
        self.info = EngineInfo(
            model=str(engine.model_dir),
            max_model_len=int(config.model_config.max_model_len),
            block_size=int(config.cache_config.block_size),
            max_logprobs=int(config.model_config.max_logprobs))
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
        inputs = await loop.run_in_executor(self._encoders, template.encode, request, True)
        return Prompt(list(inputs['input_ids']), inputs)

    async def begin_batch(self, request_config: RequestConfig, *, top_logprobs: int = 0) -> None:
        from vllm.sampling_params import RequestOutputKind
        check_request_config(request_config)
        config = copy.copy(request_config)
        config.logprobs, config.seed = True, None
        config.top_logprobs = top_logprobs or None
        sampling = self._engine._prepare_generation_config(config)
        self._engine._add_stop_words(sampling, config)
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        self._with_entropies = top_logprobs > 0
        self._sampling = sampling
        self.stop_strings = list(request_config.stop or [])
        self._stop_ids = set(self._engine._get_stop_token_ids(self.stop_strings))
        self._lora = await self._engine._get_grpo_lora_request_async()

    async def generate(self, prompt: Prompt, response_ids: Sequence[int], *, max_tokens: int,
                       seed: int | None) -> Segment:
        sampling = copy.copy(self._sampling)
        sampling.max_tokens, sampling.seed = max_tokens, seed
        output = await self._last_output({
            **prompt.inputs, 'input_ids': prompt.token_ids + list(response_ids)
        }, sampling)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
        if not all(map(math.isfinite, logprobs)):
            raise EngineError('the engine returned a log-prob that is not finite')
        entropies = None
        if self._with_entropies:
            entropies = [entropy([value.logprob for value in step.values()]) for step in completion.logprobs]
        stop = self._stop_reason(completion.finish_reason, completion.stop_reason)
        return Segment(token_ids, logprobs, stop, entropies, cached_tokens=output.num_cached_tokens or 0)

    async def score(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams
        lora = await self._engine._get_grpo_lora_request_async()
        output = await self._last_output({'input_ids': token_ids},
                                         SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0),
                                         lora=lora)
        steps = output.prompt_logprobs[1:]
        return [float(step[token].logprob) for step, token in zip(steps, token_ids[1:], strict=True)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def completion(self, prompt: Prompt, response_ids: list[int]) -> str:
        return self._engine.template.decode_generate_ids(
            list(response_ids), template_inputs=prompt.inputs['template_inputs'])

    async def _last_output(self, inputs: dict[str, Any], sampling: Any, lora: Any = None) -> Any:
        # A request id of our own for every request: vLLM aborts by id, and one id must never mean two segments.
        stream = self._engine._add_request(
            inputs, sampling, f'treepo-{uuid.uuid4().hex}', adapter_request=lora or self._lora)
        output = None
        async for output in stream:
            pass
        if output is None or not output.outputs:
            raise EngineError('the engine ended a request without an output')
        return output

    def _stop_reason(self, finish_reason: str | None, stop_reason: int | str | None) -> StopReason | None:
        if finish_reason == 'length':
            return None
        if finish_reason == 'stop':
            asked = stop_reason in self._stop_ids or stop_reason in self.stop_strings
            return StopReason.STOP_STRING if asked else StopReason.EOS
        raise EngineError(f'the engine ended a request with finish_reason={finish_reason!r}')
