"""An arena's real loop: one short run by `swift rollout` and `swift rlhf`."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip('vllm')

from treepo_swift.cli.main import main
from treepo_swift.lab.arena.export import tokenizer
from treepo_swift.lab.arena.runs import ResultsFile
from treepo_swift.lab.arena.tasks import ALPHABET, EOS, encode

MATRIX = """
task: decisions
loop: swift
learning_rates: [3.0e-4]
seeds: [1]
training: {tokens: 6000, marks: 2, prompts: 4, width: 4, heldout: 16}
pretraining: {steps: 4, rows: 8}
methods:
  treepo: {}
"""


def test_the_tokenizer_is_the_arenas_own_alphabet():
    made = tokenizer()
    assert made(ALPHABET).input_ids == encode(ALPHABET)
    assert made.decode([*encode(ALPHABET), EOS], skip_special_tokens=True) == ALPHABET
    assert made.apply_chat_template([{'role': 'user', 'content': 'Ab|3>'}], return_dict=False) == encode('Ab|3>')


def test_a_run_of_the_real_loop_ends_at_its_tokens_with_a_point_at_each_mark(tmp_path):
    (tmp_path / 'm.yaml').write_text(MATRIX)
    assert main(['arena', str(tmp_path / 'm.yaml'), '--out', str(tmp_path), '--cache', str(tmp_path / 'models')]) == 0
    [run] = ResultsFile(tmp_path / 'results.jsonl').runs
    log = tmp_path / 'run' / 'train' / 'logging.jsonl'
    steps = [row for row in map(json.loads, log.read_text().splitlines()) if 'tree/decoded_tokens' in row]
    assert sum(row['tree/decoded_tokens'] for row in steps) == run.curve[-1].decoded >= 6000
    assert [point.decoded // 3000 for point in run.curve] == [0, 1, 2] and run.curve[-1].steps == len(steps)
    assert run.curve[-1].trained > run.curve[-1].decoded
    assert all(row['tree/trees'] == 4 and row['tree/failures'] == 0 for row in steps)
    # Prompts in the fast loop's order: what was asked is in the file that it made.
    problems = [json.loads(line) for line in (tmp_path / 'run' / 'problems.jsonl').read_text().splitlines()]
    assert len(problems) >= 4 * len(steps) and {'messages', 'solution'} == set(problems[0])
    assert not os.environ.get('ARENA_RUN')
