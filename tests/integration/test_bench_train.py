"""``treepo-swift bench --train``: what it measures is the same computation, and trees of the asked shape."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from treepo_swift.cli.main import main
from treepo_swift.config import TreeConfig
from treepo_swift.lab.bench import picture
from treepo_swift.lab.bench.fake import rollout
from treepo_swift.lab.bench.train import TrainBench, grow_rows
from treepo_swift.lab.lengths import LengthDistribution
from treepo_swift.trainer.shared_prefix.trie import build_trie

CONFIG = TreeConfig(segment_length=8, max_depth=4)
GROWN = dict(prompts=2, width=4, prompt_tokens=5, vocabulary=300)


def test_rows_are_trees_of_the_asked_shape():
    rows = grow_rows(CONFIG, lengths=LengthDistribution((3, 20, 40)), **GROWN)
    assert len(rows) == 8 and rows == grow_rows(CONFIG, lengths=LengthDistribution((3, 20, 40)), **GROWN)
    assert {len(row.ids) - row.prompt for row in rows} <= {3, 20, 21, 32} and len({tuple(r.ids[:5]) for r in rows}) == 2
    full = grow_rows(CONFIG, lengths=LengthDistribution.fixed(32), **GROWN)
    assert {len(row.ids) for row in full} == {37}
    # Two branches at the root, four from the first boundary on: 2 segments, then 4 a depth.
    assert len(build_trie([row.ids for row in full]).tokens) == 2 * (5 + 8 * (2 + 3 * 4))


def test_every_way_gives_the_same_log_probs():
    bench = TrainBench('quickstart', grow_rows(CONFIG, lengths=LengthDistribution((3, 20, 40)), **GROWN), device='cpu',
                       micro_batch=3, checkpointing=True)  # fmt: skip
    expected = bench.logprobs('padded')
    assert len(expected) == sum(len(row.ids) - row.prompt for row in bench.rows) and expected.std() > 0.1
    torch.testing.assert_close(bench.logprobs('shared'), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bench._padding_free(bench.rows[:1]), bench._padded(bench.rows[:1]), rtol=1e-5, atol=1e-5)


def test_one_command_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('TREEPO_SEGMENT_LENGTH', '8')
    monkeypatch.setenv('TREEPO_MAX_DEPTH', '4')
    lengths, out = tmp_path / 'lengths.json', tmp_path / 'out.json'
    lengths.write_text('[5, 20]')
    asked = ['--prompts', '1', '--width', '4', '--repeats', '1', '--json', str(out), '--device', 'cpu']
    drawn = tmp_path / 'out.png'
    assert main(['bench', '--train', '--lengths', str(lengths), '--picture', str(drawn), *asked]) == 0
    assert drawn.read_bytes().startswith(b'\x89PNG')
    found = json.loads(out.read_text())
    assert ' shared ' in capsys.readouterr().out and found['modes']['shared']['gap'] < 1e-4
    assert found['trie_tokens'] < found['row_tokens'] <= found['padded_tokens']
    rows = tmp_path / 'rows.json'
    rows.write_text(json.dumps([[2, [1, 2, 3, 4]], [2, [1, 2, 3, 5]]]))
    assert main(['bench', '--train', '--rows', str(rows), *asked]) == 0
    assert json.loads(out.read_text())['trie_tokens'] == 5
    rows.write_text('[[1, 2, 3]]')
    assert main(['bench', '--train', '--rows', str(rows), *asked]) == 1
    assert main(['bench', '--train', '--size', '2B', *asked]) == 1
    assert 'must be one of quickstart' in capsys.readouterr().err


def test_a_picture_of_rollouts_and_where_there_is_none(tmp_path, capsys, monkeypatch):
    modes = {
        mode: {'seconds': {'median': seconds}, 'decoded_tokens_per_trajectory': tokens}
        for mode, seconds, tokens in (('independent', 4.0, 300.0), ('stream', 2.5, 190.0))
    }
    picture.draw({'hardware': '2 cores', 'modes': modes}, tmp_path / 'rollouts.png')
    assert (tmp_path / 'rollouts.png').read_bytes().startswith(b'\x89PNG')
    assert main(['bench', '--fake', '--picture', 'x.png']) == 1
    assert '--picture draws rollouts' in capsys.readouterr().err
    monkeypatch.setattr(picture, 'can_draw', lambda: False)
    assert main(['bench', '--train', '--picture', 'x.png']) == 1
    assert 'pip install matplotlib' in capsys.readouterr().err


@pytest.mark.parametrize('position', ['boundary', 'min_logprob_token', 'max_entropy_token', 'first_token_entropy'])
def test_the_engine_that_costs_nothing_grows_trees_of_every_fork_position(position):
    """Policies that read entropies find some."""
    pytest.importorskip('swift')
    config = TreeConfig(
        segment_length=16,
        max_depth=4,
        fork_position=position,
        fallback='max_entropy_token',
        stop={'answer': 'none', 'repetition': 'none'},
    )
    engine, outputs = rollout(config, 2, 8, packed=False)
    stops = {output.rollout_infos['tree']['stop'] for output in outputs}
    assert len(outputs) == 16 and engine.segments > 8 and not stops & {'failed', 'absent'}
