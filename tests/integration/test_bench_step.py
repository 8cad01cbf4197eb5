"""``treepo-swift bench --train -- --model M``: what is made of the two parts, with weights from a folder.

The rollouts are made up here, and their rows grown without an engine; tests/e2e/test_bench.py has a real one.
"""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from transformers import Qwen2Config, Qwen2ForCausalLM

from treepo_swift.cli.main import main
from treepo_swift.config import TreeConfig
from treepo_swift.lab.bench import step
from treepo_swift.lab.bench.train import TrainBench, grow_rows
from treepo_swift.lab.lengths import LengthDistribution

ROWS = grow_rows(
    TreeConfig(segment_length=8, max_depth=4),
    prompts=2,
    width=4,
    prompt_tokens=5,
    lengths=LengthDistribution((3, 20, 40)),
    vocabulary=64,
)
ROLLOUTS = {'modes': {'independent': {'seconds': {'median': 4.0}}, 'stream': {'seconds': {'median': 2.5}}}}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config)
    made.save_pretrained(tmp_path / 'model')
    return made, str(tmp_path / 'model')


def test_the_pass_has_the_weights_of_the_model(model):
    made, folder = model
    bench = TrainBench(folder, ROWS, device='cpu', micro_batch=4, checkpointing=False)
    expected = torch.cat(
        [
            made(torch.tensor([row.ids])).logits[0, row.prompt - 1 : -1].log_softmax(-1)
            .gather(-1, torch.tensor(row.ids[row.prompt :])[:, None])[:, 0]
            for row in ROWS
        ]
    )  # fmt: skip
    assert expected.std() > 0.1
    for way in ('padded', 'shared'):
        torch.testing.assert_close(bench.logprobs(way), expected.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='token ids up to'):
        rows = grow_rows(TreeConfig(segment_length=8, max_depth=4), prompts=1, width=2, prompt_tokens=300,
                         lengths=LengthDistribution((3,)), vocabulary=900)  # fmt: skip
        TrainBench(folder, rows, device='cpu', micro_batch=4, checkpointing=False)


def test_one_table_one_picture_one_file(model, tmp_path, capsys, monkeypatch):
    asked = []

    def run_rollouts(options, engine):
        asked.append((list(options), list(engine)))
        return ROLLOUTS, ROWS

    monkeypatch.setattr(step, 'run_rollouts', run_rollouts)
    out, drawn = tmp_path / 'out.json', tmp_path / 'out.png'
    command = ['bench', '--train', '--prompts', '2', '--width', '4', '--repeats', '1', '--device', 'cpu']
    files = ['--json', str(out), '--picture', str(drawn)]
    assert main([*command, *files, '--', '--model', model[1], '--torch_dtype', 'float32']) == 0
    ((options, engine),) = asked
    assert engine == ['--model', model[1], '--torch_dtype', 'float32']
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    assert pairs == {'--prompts': '2', '--width': '4', '--workload': 'fixed', '--temperature': '1.0', '--repeats': '1'}
    found = json.loads(out.read_text())
    plain, trees = found['steps']['without trees'], found['steps']['with trees']
    assert (plain['rollout'], trees['rollout']) == (4.0, 2.5) and found['speed_up']['rollout'] == 1.6
    modes = found['training']['modes']
    assert set(modes) == {'padded', 'shared'} and modes['shared']['gap'] < 1e-3
    # A tree is a micro-batch.
    assert found['training']['micro_batches'] == {'padded': 2, 'shared': 2}
    assert (plain['pass'], trees['pass']) == (modes['padded']['policy'], modes['shared']['policy'])
    assert found['speed_up']['step'] == pytest.approx((4 + plain['pass']) / (2.5 + trees['pass']))
    assert drawn.read_bytes().startswith(b'\x89PNG')
    # The table is the last thing on the screen.
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith('| times as fast') and lines[-3].startswith('| without trees')
    assert not any(line.startswith('written') for line in lines[-5:])


@pytest.mark.parametrize(
    'more, engine, message',
    [
        ([], ['--torch_dtype', 'float32'], 'name it there by --model'),
        ([], ['--model'], 'name it there by --model'),
        (['--size', '7B'], ['--model', 'M'], 'do nothing where a model stands behind --'),
        (['--rows', 'rows.json'], ['--model', 'M'], 'do nothing where a model stands behind --'),
        (['--workload', 'lengths'], ['--model', 'M'], '--lengths FILE belongs to --workload lengths'),
    ],
)
def test_what_can_not_work_is_refused_before_an_engine_starts(monkeypatch, capsys, more, engine, message):
    monkeypatch.setattr(step, 'run_rollouts', lambda *args: pytest.fail('an engine was started'))
    assert main(['bench', '--train', *more, '--', *engine]) == 1
    assert message in capsys.readouterr().err


def test_rollouts_that_fail_end_the_bench(capfd):
    """The part in a process of its own says why."""
    with pytest.raises(ValueError, match='the rollouts ended with status 1'):
        step.run_rollouts(['--width', '0'], ['--model', 'M'])
    said = capfd.readouterr()
    assert '--prompts, --width and --repeats must be at least 1' in said.err and said.out == ''
    assert step.model_in(['--a', 'b', '--model=org/name']) == 'org/name'


def test_rows_are_kept_of_trees_only(capsys):
    assert main(['bench', '--modes', 'independent', '--keep-rows', 'rows.json', '--', '--model', 'M']) == 1
    assert '--modes must have stream or lockstep' in capsys.readouterr().err
