from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_swift.lab.lengths import LengthDistribution


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(0, 60), st.integers(0, 100))
def test_a_response_that_goes_on_has_a_length_that_was_seen_and_is_longer(lengths, so_far, seed):
    drawn = LengthDistribution(lengths).draw(random.Random(seed), longer_than=so_far)
    longer = [length for length in lengths if length > so_far]
    assert drawn in (longer or [so_far + 1])


def test_longer_lengths_keep_their_proportions():
    lengths, dice = LengthDistribution([9, 3, 5, 5, 1]), random.Random(0)
    drawn = Counter(lengths.draw(dice, longer_than=3) for _ in range(3000))
    assert drawn.keys() == {5, 9}
    assert drawn[5] / drawn[9] == pytest.approx(2, abs=0.3)


def test_drawing_segment_by_segment_is_drawing_once():
    lengths, dice = LengthDistribution(range_list := list(range(1, 41))), random.Random(0)

    def by_segments() -> int:
        done = 0
        while True:
            length = lengths.draw(dice, longer_than=done)
            if length <= done + 10:
                return length
            done += 10

    mean = sum(by_segments() for _ in range(4000)) / 4000
    assert mean == pytest.approx(sum(range_list) / 40, abs=0.8)


def test_mean_max_and_fixed_lengths():
    assert (LengthDistribution([1, 2, 6]).mean, LengthDistribution([6, 2]).max) == (3, 6)
    assert LengthDistribution.fixed(7) == LengthDistribution([7])
    assert LengthDistribution.fixed(7).draw(random.Random(0)) == 7


def test_lengths_come_from_json(tmp_path):
    file = tmp_path / 'lengths.json'
    file.write_text('[3, 1, 2]')
    assert LengthDistribution.from_json(file) == LengthDistribution([1, 2, 3])


@pytest.mark.parametrize('text', ['[]', '{"a": 1}', '[1, 0]', '[1.5]', '[true]', '["3"]', 'null', '[1,'])
def test_other_json_is_refused(tmp_path, text):
    file = tmp_path / 'lengths.json'
    file.write_text(text)
    with pytest.raises(ValueError, match=r'lengths\.json.*non-empty list of positive integers'):
        LengthDistribution.from_json(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match='nowhere.json: No such file'):
        LengthDistribution.from_json(tmp_path / 'nowhere.json')
