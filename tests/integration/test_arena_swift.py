"""What a real run of an arena adds to swift's trainer: its reward, and the callback that measures and ends it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip('swift')
pytest.importorskip('torch')

from treepo_swift.lab.arena.model import make_model
from treepo_swift.lab.arena.runs import RUN_VARIABLE, Point
from treepo_swift.lab.arena.settings import Pretraining
from treepo_swift.lab.arena.tasks import EOS, encode

SMALL = Pretraining(hidden=16, layers=2, heads=2)
ARGS = SimpleNamespace(num_generations=4)


@pytest.fixture
def plugin():
    from swift.callbacks import callbacks_map
    from swift.rewards import orms

    from treepo_swift.lab.arena import swift_plugin

    assert orms['treepo_arena'] is swift_plugin.ArenaReward
    assert callbacks_map['treepo_arena'] is swift_plugin.ArenaCallback
    return swift_plugin


@pytest.fixture
def callback(plugin, monkeypatch, tmp_path):
    training = {'tokens': 1000, 'marks': 2, 'prompts': 2, 'heldout': 4}
    run = {'task': 'decisions', 'seed': 3, 'training': training, 'curve': str(tmp_path / 'curve.jsonl')}
    monkeypatch.setenv(RUN_VARIABLE, json.dumps(run))
    trainer = SimpleNamespace(model=make_model(SMALL), accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    return plugin.ArenaCallback(ARGS, trainer)


def test_the_reward_wants_the_solution_behind_the_one_mark_and_eos(plugin):
    right, wrong = [*encode('Ac3=5;!5'), EOS], [*encode('Ac3=5;!4'), EOS]
    said = [right, wrong, right[:-1], []]
    reward = plugin.ArenaReward()
    assert reward([''] * 4, solution=['5'] * 4, response_token_ids=said) == [1.0, 0.0, 0.0, 0.0]
    # Trees hold an answer's tokens by turn.
    assert reward([''] * 4, solution=['5'] * 4, response_token_ids=[[ids] for ids in said]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize('in_trees', [True, False])
def test_a_run_has_a_point_at_each_mark_and_ends_at_its_tokens(callback, in_trees):
    control = SimpleNamespace(should_training_stop=False)
    callback.trainer.model.train()
    callback.on_train_begin(ARGS, SimpleNamespace(global_step=0), control)
    ended = []
    for step in (1, 2, 3, 4):
        state = SimpleNamespace(global_step=step)
        callback.on_step_begin(ARGS, state, control)
        callback.on_step_end(ARGS, state, control)
        logs = {'completions/mean_length': 40.0, 'reward': 0.5, 'frac_reward_zero_std': 0.25}
        callback.on_log(ARGS, state, control, logs | ({'tree/decoded_tokens': 250.0} if in_trees else {}))
        ended.append(control.should_training_stop)
    callback.on_log(ARGS, state, control, {'train_runtime': 1.0})  # swift's last words are no step
    points = [Point(**json.loads(line)) for line in callback.file.read_text().splitlines()]
    # 320 tokens a step in independent answers, 250 in trees.
    assert [point.decoded for point in points] == ([0, 500, 1000] if in_trees else [0, 640, 1280])
    assert [point.trained for point in points] == ([0, 640, 1280] if in_trees else [0, 640, 1280])
    assert [point.steps for point in points] == [0, 2, 4]
    assert ended == [False, False, False, True]
    assert all(0 <= point.accuracy <= 1 for point in points) and points[1].flat == 0.25
    assert callback.trainer.model.training, 'measuring left the model in another mode'
