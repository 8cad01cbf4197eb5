"""Trees in the trainer's process: the same as a server's, whole groups over ranks, an end to whatever goes wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('swift')
pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput

from tests.flat import flat
from tests.integration.colocate_fakes import Llm, Ranks, StreamingLlm, SwiftEngine
from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.server.colocate import ColocateTrees
from treepo_swift.server.engine import EngineGone
from treepo_swift.server.scheduler import RolloutError, TreeRolloutScheduler
from treepo_swift.server.watchdog import EXIT_STATUS, RolloutStalled
from treepo_swift.trainer.rollout import RankRollout, deal_groups, rollout_note
from treepo_swift.wire.groups import group_requests

CONFIG = flat(segment_length=16, max_depth=4)
CONFIGS = [
    CONFIG,
    flat(segment_length=16, max_depth=4, branching='logprob', fallback='min_logprob_token', after_answer='cut'),
    flat(segment_length=16, max_depth=4, pacing='even', budget='by_segment_tokens', budget_tokens=640),
]


class Turns(TreeRolloutScheduler):
    """Three turns, with a plain hook and an async one."""

    async def on_turn_end(self, infer_request, response_choice, current_turn):
        await asyncio.sleep(0.001)
        return {'done': current_turn == 3}

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': f'And then ({current_turn})?'})
        return {'infer_request': infer_request}


def requests(
    prompts: list[str], *, config: TreeConfig = CONFIG, width: int = 4, evaluates: bool = False
) -> list[RolloutInferRequest]:
    note = rollout_note(config, width=width, step=1, max_steps=10, evaluates=evaluates, packed=False).to_dict()
    return [
        RolloutInferRequest(
            messages=[{'role': 'user', 'content': prompt}], uuid=f'r{index}', data_dict={'treepo': note}
        )
        for index, prompt in enumerate(prompts)
    ]


def trees(
    llm: Llm | None = None, scheduler: type[TreeRolloutScheduler] = TreeRolloutScheduler, config: TreeConfig = CONFIG
) -> ColocateTrees:
    return ColocateTrees(SwiftEngine(llm or Llm()), scheduler, config)


def ask(**options: Any) -> RequestConfig:
    return RequestConfig(**{'max_tokens': 64, 'temperature': 1.0, 'seed': 7, **options})


def said(outputs: list[RolloutOutput]) -> list[tuple[Any, ...]]:
    """All of a rollout that a training reads; not what it took."""
    return [
        (
            o.response.id,
            o.messages,
            o.response_token_ids,
            o.response_loss_mask,
            o.rollout_logprobs,
            {k: v for k, v in o.rollout_infos.get('tree', {}).items() if k not in ('stats', 'batch', 'id')},
        )
        for o in outputs
    ]


# The same trees as on an asynchronous engine.


@pytest.mark.parametrize('scheduler', [TreeRolloutScheduler, Turns])
@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.parametrize('config', CONFIGS)
def test_the_same_seed_gives_the_trees_of_a_server(config, ahead, scheduler):
    batch = requests(['one'] * 4 + ['two'] * 4 + ['one'] * 4, config=config)
    here = trees(Llm(ahead=ahead), scheduler, config).rollout(batch, ask())
    for pace in range(3):
        server = scheduler(infer_engine=SwiftEngine(StreamingLlm(random.Random(pace))))
        server._server().engine._engine.template.max_length = None
        there = asyncio.run(server.rollout(batch, ask(), use_tqdm=False))
        assert said(here) == said(there)
    assert len({str(o.response_token_ids) for o in here}) > 6


def test_evaluation_samples_independent_answers():
    outputs = trees().rollout(requests(['one', 'two', 'two'], evaluates=True), ask())
    assert (
        all('tree' not in o.rollout_infos for o in outputs) and len({str(o.response_token_ids) for o in outputs}) == 3
    )


def test_the_engine_scores_a_text():
    assert trees().score([5, 6, 7]) == [-6.0, -7.0]


# Ranks.


def in_parts(values: list[Any], world: int) -> list[list[Any]]:
    size = len(values) // world
    return [values[rank * size : (rank + 1) * size] for rank in range(world)]


@pytest.mark.parametrize('world', [2, 3, 4])
@pytest.mark.parametrize('evaluates', [False, True])
def test_ranks_grow_the_trees_of_one(world, evaluates):
    """Three trees of four over 2, 3 and 4 ranks: cut in halves, whole, or more ranks than trees. One prompt twice."""
    batch = requests(['one'] * 4 + ['two'] * 4 + ['one'] * 4, evaluates=evaluates)
    size = 1 if evaluates else 4
    alone = RankRollout(trees(), rank=0, gather=list).outputs(batch, size, ask())
    parts = in_parts(batch, world)
    results = Ranks(world).run(
        lambda rank, gather: RankRollout(trees(), rank=rank, gather=gather).outputs(parts[rank], size, ask())
    )
    assert said([output for part in results for output in part]) == said(alone)
    assert len({str(o.response_token_ids) for o in alone}) > 6


def test_one_rank_that_fails_ends_all():
    parts = in_parts(requests(['one'] * 4 + ['two'] * 4), 2)

    def fail(step: int) -> bool:
        raise MemoryError('out of memory')

    def work(rank: int, gather: Any) -> Any:
        here = trees(Llm(before_step=fail) if rank == 1 else None)
        return RankRollout(here, rank=rank, gather=gather).outputs(parts[rank], 4, ask())

    other, failed = Ranks(2).run(work)
    assert isinstance(failed, EngineGone) and 'raised MemoryError in a step' in str(failed)
    assert isinstance(other, RuntimeError) and 'Rank 1 failed, and no rank can go on without it. EngineGone: ' in str(
        other
    )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.integers(1, 8))
def test_groups_are_dealt_whole_and_evenly(sizes, ranks):
    keys = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    groups = group_requests(keys, [None] * len(keys))
    grown_by = deal_groups(groups, len(keys), ranks)
    whose = [{grown_by[position] for position in group.members} for group in groups]
    assert all(len(rank) == 1 for rank in whose)
    counts = [whose.count({rank}) for rank in range(ranks)]
    assert max(counts) - min(counts) <= 1


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_groups_that_lie_whole_on_ranks_stay_there(ranks, each, width):
    keys = [str(group) for group in range(ranks * each) for _ in range(width)]
    groups = group_requests(keys, [width] * len(keys))
    assert deal_groups(groups, len(keys), ranks) == [position // (each * width) for position in range(len(keys))]


# What goes wrong.


def test_a_step_that_fails_ends_the_rollout_at_once_and_for_good():
    def fail(step: int) -> bool:
        if step == 20:
            raise RuntimeError('CUDA error: an illegal memory access')
        return True

    llm = Llm(before_step=fail)
    here = trees(llm)
    for _ in range(2):
        with pytest.raises(EngineGone, match="vLLM's engine raised RuntimeError in a step.*illegal memory access"):
            here.rollout(requests(['one'] * 4), ask())
        assert llm.steps == 20


def test_an_engine_that_sleeps_is_not_asked():
    llm = Llm()
    llm.sleeps = True
    with pytest.raises(EngineGone, match='sleeps, or its scheduler is paused'):
        trees(llm).rollout(requests(['one'] * 4), ask())
    assert not llm.added


@pytest.mark.parametrize('ahead', [False, True])
def test_when_a_rollout_has_ended_nothing_of_it_is_in_the_engine(ahead):
    class Rude(TreeRolloutScheduler):
        def check_segment(self, path, text):
            raise KeyError('no such tool')

    llm = Llm(ahead=ahead)
    with pytest.raises(RolloutError, match='no such tool'):
        trees(llm, Rude).rollout(requests(['one'] * 4), ask())
    assert llm.added and not llm.requests and not llm.batch_queue
    trees(llm).rollout(requests(['one'] * 4), ask())
    assert not llm.requests and not llm.batch_queue


def test_a_rollout_that_stands_still_ends_and_says_where():
    """As where a scheduler was left paused: steps come back, with nothing."""
    config = flat(segment_length=16, max_depth=4, stall_timeout=0.3)
    llm = Llm(before_step=lambda step: step < 10)
    with pytest.raises(RolloutStalled, match=r'(?s)stall_timeout=0.3 s.*2 requests are in.*TreeGrower._grow'):
        trees(llm, config=config).rollout(requests(['one'] * 4, config=config), ask())
    assert not llm.requests


def test_hooks_that_answer_slowly_are_no_stall():
    config = flat(segment_length=16, max_depth=4, stall_timeout=0.4)

    class Slow(Turns):
        def check_finished(self, infer_request, response_choice, current_turn):
            time.sleep(0.3)
            return False

    assert trees(scheduler=Slow, config=config).rollout(requests(['one'] * 2, config=config, width=2), ask())


class Blocks(TreeRolloutScheduler):
    async def check_segment(self, path, text):
        time.sleep(60)


def stand_in_one_place(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    config = flat(segment_length=16, max_depth=4, stall_timeout=0.5)
    trees(scheduler=Blocks, config=config).rollout(requests(['one'] * 4, config=config), ask())


def test_a_loop_that_stands_in_one_place_ends_the_process_and_says_where(loaded, tmp_path):
    process = loaded.Process(target=stand_in_one_place, args=(str(tmp_path / 'log'),))
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_STATUS
    log = (tmp_path / 'log').read_text()
    assert 'stood in one place for faults.stall_timeout=0.5 s' in log and 'time.sleep(60)' in log


# The trainer around it.


def test_the_trainers_process_is_left_as_it_was():
    gc.unfreeze()  # what servers of other tests have frozen, and what of it dies meanwhile, would be counted too
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    threads = set(threading.enumerate())
    engine = SwiftEngine(Llm())
    outputs = ColocateTrees(engine, TreeRolloutScheduler, CONFIG).rollout(requests(['one'] * 4), ask())
    assert (gc.get_freeze_count(), gc.get_threshold()) == (frozen, thresholds)
    started = {thread for thread in set(threading.enumerate()) - threads if not isinstance(thread, tqdm.TMonitor)}
    # Those that encoded prompts end by themselves in half a second.
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)
    # swift's own engine and template are used by its weight sync and in runs without trees.
    assert isinstance(engine.engine, Llm) and not engine.use_async_engine and engine.template.max_length == 20
    # swift writes into messages: they may not be a sibling's too.
    messages = [id(message) for output in outputs for message in output.messages]
    assert len(messages) == len(set(messages)) == 8


def test_what_the_engine_can_not_do_is_refused_when_the_trees_are_made():
    with pytest.raises(ConfigError, match='--vllm_max_model_len = 1000'):
        trees(config=flat(segment_length=512, max_depth=4))


def arguments(**given: Any) -> Any:
    """`TreeGRPOConfig` as far as colocate mode looks at it."""
    from treepo_swift.trainer.arguments import TreeGRPOConfig

    args = object.__new__(TreeGRPOConfig)
    args.__dict__.update(
        **{
            **dict(use_vllm=True, vllm_mode='colocate', max_completion_length=64, vllm_max_model_len=None),
            **dict(use_gym_env=None, vllm_server_pass_dataset=False),
            **given,
        }
    )
    return args


@pytest.mark.parametrize(
    'name, mode, taken', [('tree', 'colocate', 'tree'), ('tree', 'server', None), ('tips', 'colocate', None)]
)
def test_swift_keeps_its_own_schedulers_and_does_not_see_ours(name, mode, taken, monkeypatch):
    from swift.rollout import MultiTurnScheduler, multi_turns

    monkeypatch.setitem(multi_turns, 'tree', TreeRolloutScheduler)
    monkeypatch.setitem(multi_turns, 'tips', MultiTurnScheduler)
    args = arguments(multi_turn_scheduler=name, vllm_mode=mode)
    assert args._take_tree_scheduler() == taken
    assert args.multi_turn_scheduler == (None if taken else name)


def test_trees_without_vllm_are_refused(monkeypatch):
    from swift.rollout import multi_turns

    monkeypatch.setitem(multi_turns, 'tree', TreeRolloutScheduler)
    args = arguments(multi_turn_scheduler='tree', vllm_mode=None, use_vllm=False)
    with pytest.raises(ConfigError, match='tree without vLLM: trees grow on vLLM only'):
        args._take_tree_scheduler()


@pytest.mark.parametrize(
    'scheduler, given, config, error',
    [
        (TreeRolloutScheduler, dict(max_completion_length=48), {}, '--max_completion_length = 48'),
        (TreeRolloutScheduler, dict(vllm_max_model_len=48), {}, '--vllm_max_model_len = 48'),
        (TreeRolloutScheduler, dict(use_gym_env=True), {}, 'plays no environment'),
        (TreeRolloutScheduler, {}, dict(branching='nearest'), 'nearest'),
        (Turns, {}, {}, None),
        (TreeRolloutScheduler, {}, {}, None),
    ],
)
def test_what_can_not_work_in_this_process_is_refused_before_a_model_loads(
    scheduler, given, config, error, monkeypatch
):
    from swift.rollout import multi_turns

    from treepo_swift.trainer import arguments as module

    monkeypatch.setitem(multi_turns, 'tree', scheduler)
    monkeypatch.setattr(module, 'check_options', lambda *args: None)
    args = arguments(tree_scheduler='tree', tree_config=flat(segment_length=16, max_depth=4, **config), **given)
    if error is None:
        args._check_colocate()
        # Hooks about turns may read the dataset's columns.
        assert args.vllm_server_pass_dataset == (scheduler is Turns)
        return
    with pytest.raises(Exception, match=error):
        args._check_colocate()
    assert not args.vllm_server_pass_dataset


def test_without_trees_a_rollout_is_swifts_own(monkeypatch):
    from swift.rlhf_trainers import GRPOTrainer

    from treepo_swift.trainer.trainer import TreeGRPOTrainer

    monkeypatch.setattr(GRPOTrainer, '_infer_single_or_multi_turn', lambda self, *args: args)
    trainer = object.__new__(TreeGRPOTrainer)
    samples, config = object(), object()
    assert trainer._infer_single_or_multi_turn(samples, config) == (samples, config, False)


@pytest.mark.parametrize('follows', [True, False])
def test_weights_are_compared_when_the_engine_is_awake(follows, monkeypatch):
    """The trainer's half at the sync, when it is on its device; the engine's at the rollout, when it has its cache."""
    from swift.rlhf_trainers import GRPOTrainer

    from tests.integration.test_trainer import build_trainer
    from treepo_swift.trainer.weight_sync import WeightSyncError, WeightSyncProof

    trainer, _ = build_trainer([], [])
    log: list[str] = []
    monkeypatch.setattr(GRPOTrainer, '_move_model_to_vllm', lambda self: log.append('sync'))
    served = [-1.0, -2.0] if follows else [-3.0, -4.0]

    def score(ids: list[int]) -> list[float]:
        log.append('engine')
        return served

    trainer.__dict__.update(
        trees_here=SimpleNamespace(score=score, engine_info={'dtype': 'float32'}),
        _sync_proof=WeightSyncProof(['float32'], in_process=True),
        processing_class=SimpleNamespace(encode=lambda *a, **k: [1, 2, 3]),
        _score=lambda ids: log.append('trainer') or [-1.0, -2.0],
    )
    trainer._move_model_to_vllm()
    assert log == ['sync', 'trainer']
    if not follows:
        with pytest.raises(WeightSyncError, match='the engine of rank 0, step 0: the engine holds other weights'):
            trainer._compare_weights()
        return
    trainer._compare_weights()
    trainer._compare_weights()
    assert log == ['sync', 'trainer', 'engine']
    assert trainer._metrics['train']['tree/sync_gap'] == [0.0]
