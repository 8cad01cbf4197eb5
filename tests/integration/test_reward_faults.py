"""Reward functions that raise, hang, or return what is no list of rewards; and a disk that is full."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')
pytest.importorskip('vllm')

from tests.integration.colocate_fakes import Ranks
from tests.integration.test_trainer import FLAT, advantages, build_trainer, listening, report
from treepo_swift.trainer.reward_watch import RewardWatch, watched_rewards


def raises(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError('\x1b[2Jsolution')


class Asynchronous:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return raises(completions)


def exits(completions: list[str], **kwargs: Any) -> list[float]:
    raise SystemExit(1)


FUNCTIONS = {
    'raises': (raises, r"'right' raised KeyError: '\\x1b\[2Jsolution' at test_reward_faults.py:\d+, for a batch of 4"),
    'raises, async': (Asynchronous(), r"'right' raised KeyError: '\\x1b\[2Jsolution' at test_reward_faults.py"),
    'exits': (exits, "'right' raised SystemExit: 1 at"),
    'returns None': (lambda completions, **kwargs: None, "'right' returned None, allowed is a list of numbers or None"),
    'returns too few': (lambda completions, **kwargs: [1.0], "'right' returned 1 rewards for 4 completions"),
    'returns text': (lambda completions, **kwargs: ['good'] * 4, "'right' returned .*'good'\\], allowed is a list"),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_reward_function_that_fails_is_named_with_what_it_did(name):
    function, complaint = FUNCTIONS[name]
    trainer, samples = build_trainer(FLAT, [0.0] * 4)
    trainer.reward_funcs = [function]
    with pytest.raises(RuntimeError, match=f'Reward function {complaint}.*on rank 0; the training ends on all'):
        advantages(trainer, samples)
    assert trainer.reward_funcs == [function]


def test_one_rank_whose_reward_raises_ends_all_and_nobody_waits():
    def work(rank: int, gather: Any) -> None:
        trainer = SimpleNamespace(reward_funcs=[raises if rank else lambda c, **k: [1.0]], reward_func_names=['right'])
        with watched_rewards(trainer, print, gather):
            (function,) = trainer.reward_funcs
            gather([function(['a'])])  # as swift gathers rewards: nobody may be missing

    for error in Ranks(3).run(work):
        assert isinstance(error, RuntimeError) and "raised KeyError: '\\x1b[2Jsolution'" in str(error)
        assert 'That was on rank 1' in str(error)


def test_a_reward_function_that_hangs_is_named_with_where_it_stands():
    told: list[str] = []
    stands = threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        stands.set()

    def hangs(completions: list[str], **kwargs: Any) -> list[float]:
        assert stands.wait(30)
        return [1.0] * len(completions)

    (watched,) = RewardWatch(tell, slow_seconds=0.05).watched([hangs], ['right'])
    assert watched(['a', 'b']) == [1.0, 1.0]
    assert "reward function 'right' has been running for 0.05 s" in told[0] and 'It stands at threading.py' in told[0]


def test_healthy_rewards_are_what_they_were_and_leave_no_thread():
    trainer, samples = build_trainer(FLAT, [1.0, 0, None, 0], config=dict(normalisation='none'))
    trainer.__dict__.update(
        reward_funcs=[trainer.reward_funcs[0], lambda completions, **kwargs: torch.zeros(len(completions))],
        reward_model_plugins=[None, None],
        reward_func_names=['right', 'zero'],
        reward_weights=torch.ones(2),
    )
    assert advantages(trainer, samples)[0][0] == pytest.approx(0.75)
    assert not [thread for thread in threading.enumerate() if thread.name == 'treepo-rewards']


@pytest.mark.parametrize('estimator', ['treepo', 'grpo', 'rloo', 'progress', 'spo', 'treerl'])
@pytest.mark.parametrize('healthy', [0, 1])
def test_a_tree_with_one_healthy_leaf_or_none_moves_nothing(estimator, healthy):
    lost = [report('v', [9], [3])] * healthy + [report('v', [], [], 'failed')] * (4 - healthy)
    config = dict(estimator=estimator, normalisation='none')
    trainer, samples = build_trainer([*FLAT, *lost], [1.0, 0, 0, 0, 1.0, 9.0, 9.0, 9.0], config=config)
    rows = advantages(trainer, samples)
    assert rows[4:] == [[0.0] * 3] * healthy + [[]] * (4 - healthy)
    alone, few = build_trainer(FLAT, [1.0, 0, 0, 0], config=config)
    assert rows[:4] == advantages(alone, few)


def test_a_full_disk_does_not_end_one_rank_of_several(monkeypatch, caplog, tmp_path):
    def full(self: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', full)
    trainer, _ = build_trainer([], [], args=SimpleNamespace(output_dir=str(tmp_path)))
    with listening(caplog):
        trainer._keep_config()
    told = [record.message for record in caplog.records if 'could not be written' in record.message]
    assert len(told) == 1 and 'No space left on device' in told[0] and 'goes on without it' in told[0]
