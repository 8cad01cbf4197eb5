"""What an engine streams, cut into segments."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.core.tree import StopReason
from treepo_swift.server.vllm_engine import SegmentBuffer

chunks = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(chunks, st.integers(1, 7))
def test_segments_are_full_but_the_last_and_lose_nothing(sizes, segment_tokens):
    buffer, segments, sent = SegmentBuffer(segment_tokens), [], 0
    for index, size in enumerate(sizes):
        finished = index == len(sizes) - 1
        size = max(size, 1) if finished else size
        tokens = list(range(sent, sent + size))
        sent += size
        buffer.add(tokens, [-float(t) for t in tokens], [t / 2 for t in tokens])
        while buffer.full(finished=finished):
            segments.append(buffer.take(cached_tokens=0))
        if finished:
            segments.append(buffer.take(cached_tokens=0, stop=StopReason.EOS))
    assert [t for s in segments for t in s.token_ids] == list(range(sent))
    assert all(len(s.token_ids) == segment_tokens and s.stop is None for s in segments[:-1])
    assert 1 <= len(segments[-1].token_ids) <= segment_tokens and segments[-1].stop is StopReason.EOS
    assert segments[-1].ahead == 0
    for segment in segments:
        assert segment.logprobs == [-float(t) for t in segment.token_ids]
        assert segment.entropies == [t / 2 for t in segment.token_ids]


def test_tokens_past_a_segment_are_told():
    buffer = SegmentBuffer(2)
    buffer.add([1, 2, 3], [0.0] * 3, None)
    assert buffer.full(finished=False) and buffer.take(cached_tokens=5).ahead == 1
    assert not buffer.full(finished=False)
