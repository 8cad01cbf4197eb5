"""What goes over the boundary to vLLM, and what is made of what comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.sampling_params import RequestOutputKind, SamplingParams

from treepo_swift.compat.capabilities import VllmFeatures, vllm_features
from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.tree import StopReason
from treepo_swift.server.engine import EngineError, EngineGone, Placement, Prompt
from treepo_swift.server.vllm_engine import ENCODE_THREADS, VllmSegmentEngine


class Tokenizer:
    all_special_ids = [1]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [1] if text == '<|im_end|>' else [ord(c) for c in text]


def features(**changes) -> VllmFeatures:
    """Those of the installed vLLM, with changes."""
    return dataclasses.replace(vllm_features(), **changes)


class Vllm:
    """`AsyncLLM` as far as we use it, of a version with these features: says 100, 101, ... in the chunks that it was
    asked for in a way that the version knows."""

    log_stats = False

    def __init__(
        self,
        has: VllmFeatures,
        *,
        ranks: int,
        policy: str,
        length: int = 10**6,
        gone_after: int = 10**6,
    ) -> None:
        self.has = has
        self.output_processor = SimpleNamespace(stream_interval=1)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=1000, max_logprobs=20, dtype='torch.bfloat16'),
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=100),
            parallel_config=SimpleNamespace(data_parallel_size=ranks),
            scheduler_config=SimpleNamespace(policy=policy, stream_interval=1),
        )
        self.length, self.gone_after = length, gone_after
        self.asked: list[tuple] = []
        self.closed = self.chunks = 0

    def interval(self, sampling) -> int:
        of_engine = self.output_processor.stream_interval
        if self.has.stream_interval == 'request':
            return max(sampling.stream_interval or 1, of_engine)
        return of_engine if self.has.stream_interval == 'engine' else 1

    async def generate(self, inputs, sampling, request_id, **options):
        self.asked.append((inputs, sampling, request_id, options))
        total = min(sampling.max_tokens, self.length)
        ends = [total]
        if sampling.output_kind is RequestOutputKind.DELTA:
            ends = [*range(1, total, self.interval(sampling)), total]
        try:
            for begin, end in zip([0, *ends], ends):
                if end > self.gone_after:
                    return
                tokens = list(range(100 + begin, 100 + end))
                logprobs = FlatLogprobs() if self.has.flat_logprobs else []
                for token in tokens:
                    # The sampled token, then the likeliest ones: it may be one of them.
                    likeliest = [token, 7][: sampling.logprobs]
                    if self.has.flat_logprobs:
                        logprobs.append_fast([token, *likeliest], [-1.0, -1.0, -2.0], [1, 1, 2], [None] * 3)
                    else:
                        known = zip([token, *likeliest], [-1.0, -1.0, -2.0])
                        logprobs.append({t: Logprob(value) for t, value in known})
                self.chunks += 1
                finished = end == total
                reason = ('length' if total == sampling.max_tokens else 'stop') if finished else None
                completion = SimpleNamespace(
                    token_ids=tokens, logprobs=logprobs, finish_reason=reason, stop_reason=None
                )
                yield SimpleNamespace(outputs=[completion], finished=finished, num_cached_tokens=32)
        finally:
            self.closed += 1


def engine(ranks: int = 1, policy: str = 'fcfs', has: VllmFeatures | None = None, **options) -> VllmSegmentEngine:
    async def no_lora():
        return None

    def prepare(config):
        return SamplingParams(logprobs=config.top_logprobs or 0, temperature=config.temperature)

    def add_stop_words(sampling, config):
        sampling.stop = [*(config.stop or []), '<|im_end|>']

    return VllmSegmentEngine(
        SimpleNamespace(
            use_async_engine=True,
            engine=Vllm(has or features(), ranks=ranks, policy=policy, **options),
            model_dir='m',
            tokenizer=Tokenizer(),
            default_adapter_request=None,
            _prepare_generation_config=prepare,
            _add_stop_words=add_stop_words,
            _get_stop_token_ids=lambda words: [],
            _get_grpo_lora_request_async=no_lora,
        ),
        has,
    )


def sample(
    target: VllmSegmentEngine,
    max_tokens: int,
    segment_tokens: int,
    *,
    take: int = 10**6,
    top: int = 0,
    stop: list[str] | None = None,
    placement: Placement | None = None,
):
    async def run():
        await target.begin_batch(RequestConfig(temperature=1.0, stop=stop), top_logprobs=top)
        segments = []
        stream = target.generate(
            Prompt([1, 2, 3], {}),
            [4, 5],
            max_tokens=max_tokens,
            segment_tokens=segment_tokens,
            seed=9,
            placement=placement or Placement(),
        )
        async for segment in stream:
            segments.append(segment)
            if len(segments) == take:
                break
        await stream.aclose()
        return segments

    return asyncio.run(run())


def test_a_stream_comes_in_chunks_of_a_segment_and_ends_as_the_model_ends_it():
    target = engine(length=70, has=features(stream_interval='request'))
    segments = sample(target, 96, 32)
    assert [len(s.token_ids) for s in segments] == [32, 32, 6]
    assert [t for s in segments for t in s.token_ids] == list(range(100, 170))
    assert [s.stop for s in segments] == [None, None, StopReason.EOS]
    assert [s.cached_tokens for s in segments] == [32, 0, 0] and [s.ahead for s in segments] == [1, 1, 0]
    ((inputs, sampling, _, _),) = target._vllm.asked
    assert inputs == {'prompt_token_ids': [1, 2, 3, 4, 5], 'type': 'token'}
    assert (sampling.output_kind, sampling.stream_interval) == (RequestOutputKind.DELTA, 32)
    assert (sampling.max_tokens, sampling.seed) == (96, 9)


@pytest.mark.parametrize(
    ('stream_interval', 'chunks', 'ahead'),
    [('request', 4, [1, 1, 0]), ('engine', 4, [1, 1, 0]), ('none', 70, [0, 0, 0])],
)
def test_versions_of_vllm_stream_the_same_segments(stream_interval, chunks, ahead):
    """Only the number of chunks differs, and what has come ahead of a boundary."""
    target = engine(length=70, has=features(stream_interval=stream_interval))
    segments = sample(target, 96, 32)
    assert [s.token_ids for s in segments] == [[*range(100, 132)], [*range(132, 164)], [*range(164, 170)]]
    assert [s.stop for s in segments] == [None, None, StopReason.EOS] and [s.cached_tokens for s in segments] == [
        32,
        0,
        0,
    ]
    assert target._vllm.chunks == chunks and [s.ahead for s in segments] == ahead
    sampling = target._vllm.asked[0][1]
    assert (getattr(sampling, 'stream_interval', None) == 32) == (stream_interval == 'request')


def test_a_users_larger_interval_of_the_engine_is_kept():
    target = engine(has=features(stream_interval='engine'))
    target._vllm.vllm_config.scheduler_config.stream_interval = 48
    assert [len(s.token_ids) for s in sample(target, 96, 32)] == [32, 32, 32] and target._vllm.chunks == 3


def test_without_its_features_vllm_is_asked_for_none_of_them():
    bare = features(flat_logprobs=False, skip_clone=False, token_inputs=False, metrics=False)
    target = engine(has=bare)
    (segment,) = sample(target, 32, 32)
    assert segment.logprobs == [-1.0] * 32
    inputs, sampling, *_ = target._vllm.asked[0]
    assert inputs == {'prompt_token_ids': [1, 2, 3, 4, 5]}
    assert not getattr(sampling, 'flat_logprobs', False) and not getattr(sampling, 'skip_clone', False)
    target._vllm.log_stats = True
    assert target.counters() is None


@pytest.mark.parametrize('length', [32, 64, 96])
def test_a_response_that_ends_with_a_segment_says_so_in_it(length):
    segments = sample(engine(length=length), 128, 32)
    assert [s.stop for s in segments] == [None] * (length // 32 - 1) + [StopReason.EOS]


def test_a_request_of_one_segment_comes_whole():
    target = engine()
    (segment,) = sample(target, 32, 32)
    assert segment.stop is None and len(segment.token_ids) == 32
    assert target._vllm.asked[0][1].output_kind is RequestOutputKind.FINAL_ONLY


def test_leaving_a_stream_ends_its_request():
    target = engine()
    assert len(sample(target, 96, 32, take=1)) == 1 and target._vllm.closed == 1


def test_no_text_is_decoded_where_nobody_reads_it():
    target = engine()
    sample(target, 32, 32)
    sampling = target._vllm.asked[0][1]
    assert (sampling.detokenize, sampling.stop) == (False, [])
    sample(target, 32, 32, stop=['END'])
    sampling = target._vllm.asked[1][1]
    assert (sampling.detokenize, sampling.stop) == (True, ['END'])


def test_a_tree_stays_on_its_rank_and_priority_is_given_where_the_engine_takes_it():
    for ranks, policy, options in [(1, 'fcfs', (0, None)), (2, 'fcfs', (0, 1)), (1, 'priority', (7, None))]:
        target = engine(ranks, policy)
        sample(target, 32, 32, placement=Placement(rank=1, priority=7))
        given = target._vllm.asked[0][3]
        assert (given['priority'], given['data_parallel_rank']) == options
        assert target.info.kv_tokens == 1600 // ranks


@pytest.mark.parametrize('flat', [True, False])
def test_entropies_count_each_outcome_once(flat):
    (segment,) = sample(engine(has=features(flat_logprobs=flat)), 2, 2, top=2)
    rest = 1 - math.exp(-1) - math.exp(-2)
    assert segment.entropies == pytest.approx([math.exp(-1) + 2 * math.exp(-2) - rest * math.log(rest)] * 2)


def test_a_request_that_breaks_off_is_an_error():
    with pytest.raises(EngineError, match='without an output'):
        sample(engine(gone_after=40), 96, 32)


@pytest.mark.parametrize('stream_interval, chunks', [('request', 3), ('engine', 3), ('none', 1)])
def test_a_long_response_that_comes_whole_shows_signs_of_life(stream_interval, chunks):
    """An engine that says nothing for long counts as hung, so that one that works has to say something."""
    target = engine(has=features(stream_interval=stream_interval))
    (segment,) = sample(target, 600, 600)
    assert len(segment.token_ids) == 600 and segment.stop is None
    assert target.answers == target._vllm.chunks == chunks


@pytest.mark.parametrize('length, interval', [(600, 300), (1024, 512), (1021, 1021), (512, 512), (32, 32)])
def test_long_segments_come_in_even_parts_and_are_the_same(length, interval):
    """A prime length has no even parts, and a short one needs none."""
    target = engine(has=features(stream_interval='request'))
    segments = sample(target, 2 * length, length)
    assert [s.token_ids for s in segments] == [[*range(100, 100 + length)], [*range(100 + length, 100 + 2 * length)]]
    assert [s.ahead for s in segments] == [1, 0]
    assert target._vllm.asked[0][1].stream_interval == interval


def test_a_dead_engine_is_gone_for_requests_and_for_scores():
    from vllm.v1.engine.exceptions import EngineDeadError

    target = engine()

    async def dead(*args, **options):
        raise EngineDeadError
        yield

    target._vllm.generate = dead
    with pytest.raises(EngineGone, match="vLLM's engine has died .*Restart `swift rollout`"):
        sample(target, 32, 32)
    with pytest.raises(EngineGone, match="vLLM's engine has died"):
        asyncio.run(target.score([1, 2]))


def test_prompts_that_never_encode_fail_by_themselves_and_the_next_are_encoded():
    target, over = engine(has=features()), threading.Event()

    def encode(request):
        if request == 'hangs':
            over.wait(60)
        return Prompt([1], {})

    target._encode = encode
    target._engine.template = SimpleNamespace(set_mode=lambda mode: None)

    async def run():
        await target.begin_batch(RequestConfig(temperature=1.0), encode_timeout=0.3)
        # More than there are threads.
        asked = ['hangs'] * 2 * ENCODE_THREADS + ['well'] * 10
        return await asyncio.gather(*map(target.encode, asked), return_exceptions=True)

    try:
        answers = asyncio.run(run())
    finally:
        over.set()
    late, well = answers[:-10], answers[-10:]
    assert all(isinstance(e, NodeFailure) and 'faults.hook_timeout=0.3 s' in str(e) for e in late), late
    assert [prompt.token_ids for prompt in well] == [[1]] * 10


def test_threads_that_encode_end_soon():
    target = engine(has=features())
    target._encode = lambda request: Prompt([1], {})
    target._engine.template = SimpleNamespace(set_mode=lambda mode: None)
    asyncio.run(target.encode('well'))
    until = time.monotonic() + 10
    while any(thread.name == 'treepo-encode' for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.05)
