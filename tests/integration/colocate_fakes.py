"""vLLM's two engines without a model: one is stepped, the other streams; both say the same to the same request."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from swift.template.utils import get_token_backed_response_ids
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.builders import EOS, decode, logprobs, sample
from tests.integration.fake_engine import SEPARATOR, FakeTokenizer


class Request:
    """One request, as far as it has come."""

    def __init__(self, request_id: str, inputs: dict[str, Any], sampling: SamplingParams, interval: int) -> None:
        """`interval` is the engine's; older versions of vLLM know no other."""
        self.id, self.sampling = request_id, sampling
        self.interval = max(getattr(sampling, 'stream_interval', None) or 1, interval)
        self.context = list(inputs['prompt_token_ids'])
        self.tokens: list[int] = []
        self.sent = 0

    @property
    def finished(self) -> bool:
        return self.tokens[-1:] == [EOS] or len(self.tokens) == self.sampling.max_tokens

    def speak(self) -> None:
        (token,) = sample(self.context + self.tokens, 1, self.sampling.seed).token_ids
        self.tokens.append(token)

    def output(self) -> Any:
        """What is to be told now, as vLLM does: the first token, then a chunk at a time; None for nothing."""
        delta = self.sampling.output_kind is RequestOutputKind.DELTA
        new = len(self.tokens) - self.sent
        if not (self.finished or (delta and (self.sent == 0 or new >= self.interval))):
            return None
        ids, self.sent = self.tokens[self.sent :], len(self.tokens)
        flat = FlatLogprobs()
        for token, value in zip(ids, logprobs(ids)):
            flat.append_fast([token], [value], [1], [None])
        reason = ('stop' if ids[-1:] == [EOS] else 'length') if self.finished else None
        completion = SimpleNamespace(token_ids=ids, logprobs=flat, finish_reason=reason, stop_reason=None)
        return SimpleNamespace(
            request_id=self.id,
            outputs=[completion],
            finished=self.finished,
            num_cached_tokens=0,
            prompt_logprobs=[None, *({token: SimpleNamespace(logprob=-float(token))} for token in self.context[1:])],
        )


def vllm_config() -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1000, max_logprobs=20, dtype='torch.float32'),
        cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=1000),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        scheduler_config=SimpleNamespace(policy='fcfs', stream_interval=1),
    )


class Llm:
    """`LLMEngine` as far as we use it. A step says one token of every request."""

    log_stats = False

    def __init__(self, *, ahead: bool = False, before_step: Callable[[int], bool] = lambda step: True) -> None:
        """`ahead`: a batch is computed while the one before it is read, as vLLM's asynchronous scheduling does.
        `before_step` gets the number of a step, and says whether anything is computed in it."""
        self.vllm_config, self.output_processor = vllm_config(), SimpleNamespace(stream_interval=1)
        self.ahead, self.before_step = ahead, before_step
        self.requests: dict[str, Request] = {}
        self.batch_queue: deque[list[Any]] | None = deque() if ahead else None
        self.added = self.steps = 0
        self.sleeps = False
        self.scheduler = SimpleNamespace(has_requests=lambda: bool(self.requests))
        self.engine_core = SimpleNamespace(engine_core=self)

    def add_request(self, request_id, inputs, sampling, *, lora_request=None, priority=0):
        assert request_id not in self.requests and not self.sleeps
        self.added += 1
        self.requests[request_id] = Request(request_id, inputs, sampling, self.output_processor.stream_interval)

    def abort_request(self, request_ids):
        for request_id in request_ids:
            del self.requests[request_id]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def is_sleeping(self):
        return self.sleeps

    def list_loras(self):
        return set()

    def step(self):
        self.steps += 1
        outputs = []
        if self.before_step(self.steps):
            for request in list(self.requests.values()):
                if not request.finished:
                    request.speak()
                    outputs.append(request.output())
        outputs = [output for output in outputs if output is not None]
        if self.batch_queue is not None:
            if self.requests:
                self.batch_queue.append(outputs)
            outputs = self.batch_queue.popleft() if len(self.batch_queue) > 1 or not self.requests else []
        for output in outputs:
            if output.finished:
                self.requests.pop(output.request_id, None)
        return outputs


class StreamingLlm:
    """`AsyncLLM` as far as we use it: every request goes on at a pace of its own."""

    log_stats = False

    def __init__(self, pace: random.Random) -> None:
        self.vllm_config, self.pace = vllm_config(), pace
        self.output_processor = SimpleNamespace(stream_interval=1)

    async def generate(self, inputs, sampling, request_id, *, lora_request, priority, data_parallel_rank):
        request = Request(request_id, inputs, sampling, self.output_processor.stream_interval)
        while not request.finished:
            request.speak()
            output = request.output()
            if output is not None:
                for _ in range(self.pace.randrange(4)):
                    await asyncio.sleep(0)
                yield output

    async def list_loras(self):
        return set()


class Template:
    """Bytes are tokens. Later turns would be cut, or refused, at `max_length`."""

    max_length: int | None = 20
    _get_response_prefix = staticmethod(lambda inputs: '')

    def set_mode(self, mode: str) -> None:
        assert mode == 'vllm'

    def encode(self, request: Any, return_template_inputs: bool) -> dict[str, Any]:
        ids: list[int] = []
        for before, message in zip([None, *request.messages], request.messages):
            reply = get_token_backed_response_ids(message['content'])
            ids += [SEPARATOR] if before and before['role'] == 'assistant' else []
            ids += list(message['content'].encode()) if reply is None else reply
        assert self.max_length is None or len(ids) <= self.max_length, 'cut'
        return {'input_ids': ids, 'template_inputs': None}

    def decode_generate_ids(self, ids: list[int], *, first_token: bool, template_inputs: Any) -> str:
        return decode(ids)


class Tokenizer(FakeTokenizer):
    all_special_ids = [EOS]


class SwiftEngine:
    """`GRPOVllmEngine` as far as we use it, over one of the engines above."""

    model_dir, enable_lora, default_adapter_request = 'model', False, None

    def __init__(self, engine: Any) -> None:
        self.engine, self.template, self.tokenizer = engine, Template(), Tokenizer()
        self.use_async_engine = isinstance(engine, StreamingLlm)

    def _add_request(self, inputs, generation_config, request_id):
        return self.engine.generate({'prompt_token_ids': inputs['input_ids']}, generation_config, request_id)

    def _prepare_generation_config(self, config):
        return SamplingParams(logprobs=0, temperature=config.temperature)

    def _add_stop_words(self, sampling, config):
        sampling.stop = list(config.stop or [])

    def _get_stop_token_ids(self, words):
        return []

    async def _get_grpo_lora_request_async(self):
        return None


class Ranks:
    """Runs the same function as several ranks, each in a thread, with a gather over all of them."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=30)
        self._slots: list[list[Any]] = [[] for _ in range(world)]

    def gather(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def gather(values: list[Any]) -> list[Any]:
            self._slots[rank] = values
            self._barrier.wait()
            everything = [value for slot in self._slots for value in slot]
            self._barrier.wait()
            return everything

        return gather

    def run(self, work: Callable[[int, Callable[[list[Any]], list[Any]]], Any]) -> list[Any]:
        """What `work(rank, gather)` returned on every rank; an exception where it raised."""
        results: list[Any] = [None] * len(self._slots)

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank, self.gather(rank))
            except Exception as e:
                results[rank] = e

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
