"""Trees in Megatron-SWIFT: swift's own trainer source around a tiny model (`megatron_world`), on one rank and several.

What is stubbed is in `megatron_stub`: megatron-core, mcore_bridge and ray. Nothing here runs on a GPU.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')
torch = pytest.importorskip('torch')

from tests.integration.megatron_ranks import Ranks
from tests.integration.test_trainer import advantages, build_trainer
from treepo_swift.advantage import is_segment_level
from treepo_swift.wire.note import RequestNote

LAYOUTS = ['plain', 'free']
"""Rows padded to the right, and packed ([1, T]) with batches aligned to the right: Megatron-SWIFT's default."""
SEGMENTS = {'TREEPO_ADVANTAGE__ESTIMATOR': 'progress', 'TREEPO_ADVANTAGE__NORMALISATION': 'none'}
WHITENED = {'TREEPO_ADVANTAGE__ESTIMATOR': 'progress'}
CASES = [{}, SEGMENTS, WHITENED, {'TREEPO_ADVANTAGE__NORMALISATION': 'group'}]


@pytest.fixture(scope='module')
def ranks(loaded: Any) -> Ranks:
    return Ranks(loaded)


# The same law as in the other trainer.


def train(world: int, folder: str, layout: str = 'plain', steps: int = 2, **changes: Any) -> list[dict[str, Any]]:
    """Steps of a training: what each sample was, and the advantages of its loss tokens in the batch that trains."""
    from swift.megatron.trainers.utils import gather_object

    import tests.integration.megatron_world as m

    client = m.Client() if torch.distributed.get_rank() == world - 1 else None
    trainer = m.build(world, folder, client=client, padding_free=layout == 'free', **changes)
    seen: list[Any] = []
    told = trainer._compute_advantages

    def listen(samples: list[Any], rewards: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = told(samples, rewards, **kwargs)
        mine = [
            (s.request_id, s.rollout_infos['tree'], r, s.finish_reason, s.response_token_ids)
            for s, r in zip(samples, rewards[:, 0].tolist(), strict=True)
        ]
        seen.append((gather_object(mine), gather_object(mine, group=trainer._get_rollout_group())))
        return result

    trainer._compute_advantages = listen
    done = []
    size = trainer.generation_batch_size // trainer.num_generations // mpu().get_data_parallel_world_size()
    for number in range(steps):
        first = (number * mpu().get_data_parallel_world_size() + mpu().get_data_parallel_rank()) * size
        batches = m.step(trainer, m.prompts(size, first))
        everyone, rows = seen.pop()
        losses, logged = m.learn(trainer, batches) if mpu().is_pipeline_last_stage() else ([], {})
        model = trainer.unwrapped_models[0]
        for parameter in model.parameters():  # as Megatron does: gradients of all replicas, the same step on all ranks
            torch.distributed.broadcast(parameter.data, world - 1)
        done.append(
            {
                'everyone': everyone,
                'rows': rows,
                'advantages': m.token_advantages(batches),
                'ids': [ids for b in batches for ids in trained_ids(b)],
                'losses': losses,
                'logged': {key: float(value) for key, value in logged.items()},
                'config': trainer.tree_config,
                'logs': list(trainer._logs['advantages']),
                'requests': [r.data_dict['treepo'] for r in client.requests] if client else [],
                'proven': trainer._sync_proof.proven,
            }
        )
        trainer.state.iteration = number + 1
    return done


def mpu() -> Any:
    return sys.modules['megatron.core.mpu']


def trained_ids(data: dict[str, Any]) -> list[list[int]]:
    """The tokens that a batch trains on, by the labels that swift's forward step reads."""
    labels = data['labels'].flatten()
    counts = data['grpo_batch'].completion_mask.sum(-1).tolist()
    return [part.tolist() for part in labels[labels != -100].split(counts)]


def ordinary(everyone: list[Any], config: Any, **options: Any) -> dict[str, list[float]]:
    """What `TreeGRPOTrainer` gives the loss tokens of the same trees with the same rewards, by request."""
    reports = [report for _, report, *_ in everyone]
    trainer, samples = build_trainer(reports, [reward for _, _, reward, *_ in everyone], tree_config=config, **options)
    for sample, (_, _, _, finish, _) in zip(samples, everyone, strict=True):
        sample.finish_reason = finish
    widest = max(sum(report['tokens']) for report in reports) + 3
    import tests.integration.test_trainer as module

    before, module.T = module.T, widest
    try:
        rows = advantages(trainer, samples)
    finally:
        module.T = before
    return {request: row for (request, *_), row in zip(everyone, rows, strict=True)}


def assert_same_law(results: list[list[dict[str, Any]]], **options: Any) -> None:
    for steps in zip(*results, strict=True):
        expected = ordinary(steps[0]['everyone'], steps[0]['config'], **options)
        for rank in steps:
            assert rank['everyone'] == steps[0]['everyone'] and len(rank['rows']) == len(rank['advantages'])
            for (request, report, _, _, sampled), row, ids in zip(
                rank['rows'], rank['advantages'], rank['ids'], strict=True
            ):
                assert row == pytest.approx(expected[request], abs=1e-5)
                # The loss mask that came with the rollout: all that was sampled and nothing else.
                assert ids == [token for turn in sampled for token in turn] and len(ids) == sum(report['tokens'])
        values = [value for row in expected.values() for value in row]
        assert len(set(values)) > 4
        if is_segment_level(steps[0]['config'].advantage.estimator):
            assert any(len(set(row)) > 1 for row in expected.values())


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('trees', CASES)
def test_the_same_trees_give_each_token_the_advantage_of_the_other_trainer(ranks, layout, trees):
    results = ranks.all(train, layout, trees=trees)
    assert_same_law(results)
    for done in results[0]:
        assert all(map(abs, done['losses'])) and done['logged']['tree/trees'] == 2
        # swift's table of completions shows what trains.
        means = {request: sum(row) / len(row) for request, row in ordinary(done['everyone'], done['config']).items()}
        assert done['logs'] == pytest.approx([means[request] for request, *_ in done['everyone']], abs=1e-5)


@pytest.mark.parametrize('world, stages', [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize('trees', [{}, WHITENED])
def test_ranks_whiten_over_the_whole_batch(ranks, world, stages, trees):
    """With four ranks in two stages swift's order of ranks mixes the halves of two prompts' answers."""
    results = ranks.all(train, 'free', world=world, stages=stages, trees=trees)
    assert_same_law(results)
    trees_of = [report['id'] for _, report, *_ in results[0][0]['everyone']]
    if world == 4:
        assert trees_of[0] == trees_of[1] == trees_of[4] != trees_of[2]
    assert all(done['proven'] for done in (steps[-1] for steps in results))
    last = results[-1][-1]
    assert last['logged']['tree/sync_gap'] == pytest.approx(0, abs=1e-5) and last['logged']['tree/trees'] == 2


def overlong(world: int, folder: str) -> Any:
    return train(world, folder, 'free', 1, overlong_filter=True, max_completion_length=32)


def test_overlong_trajectories_leave_the_whitening(ranks):
    results = ranks.all(overlong, trees={'TREEPO_MAX_DEPTH': '1'})
    finishes = [finish for *_, finish, _ in results[0][0]['everyone']]
    assert 0 < finishes.count('length') < len(finishes)
    assert_same_law(results, overlong_filter=True)


def kl_in_reward(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m

    class WithReference(m.Trainer):
        def prepare_model(self) -> None:
            super().prepare_model()
            self.ref_models = [m.Model()]
            with torch.no_grad():
                self.ref_models[0].head.bias += torch.arange(m.VOCABULARY) / 100

    client = m.Client()
    trainer = m.build(world, folder, client=client, cls=WithReference, kl_in_reward=True, beta=0.1)
    told, seen = trainer._compute_advantages, []

    def listen(samples: list[Any], rewards: torch.Tensor, kl_values: torch.Tensor) -> torch.Tensor:
        result = told(samples, rewards, kl_values=kl_values)
        totals = rewards[:, 0] - 0.1 * kl_values
        seen.extend(
            (s.request_id, s.rollout_infos['tree'], t, s.finish_reason, s.response_token_ids)
            for s, t in zip(samples, totals.tolist(), strict=True)
        )
        return result

    trainer._compute_advantages = listen
    batches = m.step(trainer, m.prompts(2))
    kl = [b['grpo_batch'].old_per_token_logps - b['grpo_batch'].ref_per_token_logps for b in batches]
    assert max(k.abs().max().item() for k in kl) > 0.1
    return seen, m.token_advantages(batches), trainer.tree_config


def test_kl_in_reward_is_taken_off_before_the_estimator(ranks):
    ((everyone, rows, config),) = ranks.all(kl_in_reward)
    expected = ordinary(everyone, config)
    for (request, *_), row in zip(everyone, rows, strict=True):
        assert row == pytest.approx(expected[request], abs=1e-4)


# Requests, turns, the loss.


def asks(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m
    from treepo_swift.trainer import megatron

    said: list[str] = []
    megatron.logger.warning = said.append
    client = m.Client()
    trainer = m.build(world, folder, client=client, vllm_server_pass_dataset=True, loss_type='fipo')
    trainer.state.iteration = 5
    batches = m.step(trainer, m.prompts(2))
    losses, _ = m.learn(trainer, batches)
    assert client.requests[0].data_dict['solution'] == '4'
    assert len(client.sessions[0].hooks['response']) == 2  # one unpacks answers, one sees that a weight sync goes on
    notes = [r.data_dict['treepo'] for r in client.requests]
    return notes, trainer.tree_config.to_note(), losses, m.files(folder), said


def test_every_request_says_what_grows_and_when(ranks):
    """And --loss_type fipo, which ms-swift 4.6.0 refuses in every run without a teacher, trains."""
    ((notes, config, losses, files, said),) = ranks.all(asks, trees={'TREEPO_SHARED_PREFIX__ENABLED': 'true'})
    assert any('shared_prefix does nothing with Megatron' in line for line in said)
    assert len(notes) == 8 and len(losses) == 8 and 'treepo_config.yaml' in files
    for note in notes:
        assert note['mode'] == 'tree' and note['config'] == config
        assert (note['num_generations'], note['step'], note['progress']) == (4, 5, 0.5)


def turns(world: int, folder: str, layout: str) -> Any:
    import tests.integration.megatron_world as m
    from tests.integration.test_turn_tokens import Users

    client = m.Client(Users)
    trainer = m.build(world, folder, client=client, padding_free=layout == 'free')
    batches = m.step(trainer, m.prompts(2))
    return [ids for b in batches for ids in trained_ids(b)], [
        [t for turn, mask in zip(o.response_token_ids, o.response_loss_mask) for t, kept in zip(turn, mask) if kept]
        for o in client.outputs
    ]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_turns_keep_the_loss_mask_of_the_rollout(ranks, layout):
    """swift would train on end-of-turn tokens that nobody sampled, behind turns that reached their limit."""
    ((trained, sampled),) = ranks.all(turns, layout)
    assert trained == sampled and len(trained) == 8


@pytest.mark.parametrize('size', [2, 4])
@pytest.mark.parametrize('context, padding_to, free', [(1, None, False), (1, 8, True), (2, 8, True), (2, 4, False)])
def test_paddings_of_tensor_and_context_parallel_keep_segments_on_their_tokens(ranks, context, padding_to, free, size):
    """The batches are swift's, made before it cuts them for its ranks. No forward pass over such ranks runs here."""
    (longer,) = ranks.all(padded, context, padding_to, free, size)
    # Where packed rows are padded, swift makes rows of the padding, from three samples on: they have no sample.
    assert longer == (free and size > 2)


def padded(world: int, folder: str, context: int, padding_to: int | None, free: bool, size: int) -> bool:
    from swift.rl_core.data import GRPOSample
    from swift.rlhf_trainers.utils import collate_to_grpo_micro_batch, encode_sample

    import tests.integration.megatron_world as m
    from treepo_swift.advantage.batch import SegmentAdvantages
    from treepo_swift.trainer.trees import train_on_samples_only
    from treepo_swift.wire.report import TreeReport

    template = m.new_template(padding_free=free, context=context)
    train_on_samples_only(template)
    trainer = object.__new__(m.Trainer)
    trainer.__dict__.update(rollout_importance_sampling_mode=None, micro_batch_size=size)
    trainer.__dict__['args'] = SimpleNamespace(loss_type='grpo', off_policy_sequence_mask_delta=None)
    rows, batches = [], []
    every = [(3, 2), (1, 4), (5, 1), (2, 2)]
    for counts in every[:size], every[size:]:
        samples = []
        for first, second in counts:
            ids = [10 + i for i in range(first + second)]
            messages = [{'role': 'user', 'content': 'x' * first}, {'role': 'assistant', 'content': ''}]
            samples.append(GRPOSample(messages=messages, response_token_ids=[ids], response_loss_mask=[[1] * len(ids)]))
            report = {'id': 't', 'nodes': [1, 2], 'tokens': [first, second], 'stop': 'eos', 'depth': 2}
            segments = SegmentAdvantages([1.0, -2.0], [first, second], 0.25)
            rows.append((TreeReport.from_dict(report), segments))
        if not samples:
            break
        for sample in samples:
            sample.encoded = encode_sample(sample, template)
        inputs, batch = collate_to_grpo_micro_batch(
            samples, template, device=torch.device('cpu'), padding_to=padding_to
        )
        batch.advantages = torch.full(batch.completion_mask.shape, 0.25)
        batches.append(batch)
        assert padding_to is None or inputs['labels'].shape[1] % padding_to == 0
    trainer._finish(batches, rows)
    for index, (_, segments) in enumerate(rows):
        batch, row = batches[index // size], index % size
        values = batch.advantages[row, batch.completion_mask[row]].tolist()
        assert values == [1.0] * segments.tokens[0] + [-2.0] * segments.tokens[1]
        assert (batch.advantages[row, ~batch.completion_mask[row]] == 0.25).all()
    return batches[0].completion_mask.shape[0] > size


# What goes wrong ends all ranks.


def deaf(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m

    last = torch.distributed.get_rank() == world - 1
    client = m.Client() if last else None
    trainer = m.build(world, folder, client=client)
    for number in range(3):
        if last:
            client.deaf = number > 0
        batches = m.step(trainer, m.prompts(2 // mpu().get_data_parallel_world_size()))
        if mpu().is_pipeline_last_stage():
            m.learn(trainer, batches, rate=5.0)
        for parameter in trainer.unwrapped_models[0].parameters():
            torch.distributed.broadcast(parameter.data, world - 1)


@pytest.mark.parametrize('stages', [1, 2])
def test_a_weight_sync_that_is_lost_ends_all_ranks(ranks, stages):
    results = ranks.run(deaf, world=2, stages=stages)
    assert [type(result).__name__ for result in results] == ['WeightSyncError'] * 2
    assert all('http://tree, step' in str(result) for result in results)


def misaligned(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m

    class Miscounts(m.Client):
        def infer(self, *args: Any, **kwargs: Any) -> list[Any]:
            outputs = super().infer(*args, **kwargs)
            for output in outputs[:1]:
                if 'tree' in output.rollout_infos:
                    output.rollout_infos['tree']['tokens'][0] += 1
            return outputs

    last = torch.distributed.get_rank() == world - 1
    trainer = m.build(world, folder, client=Miscounts() if last else None)
    m.step(trainer, m.prompts(1))


def test_a_token_too_many_on_one_replica_ends_all_ranks(ranks):
    results = ranks.run(misaligned, world=2)
    assert all('were sampled with' in str(result) and 'loss tokens in the trainer' in str(result) for result in results)


def unrewarded(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m

    def silent(completions: list[str], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    m.step(m.build(world, folder, client=m.Client(), reward_funcs=[silent]), m.prompts(2))


def test_a_reward_that_is_no_number_names_function_and_sample(ranks):
    (error,) = ranks.run(unrewarded)
    assert "Reward function 'silent' returned None or nan for sample 0 of the batch" in str(error)


# Rounds, evaluation, no trees.


def resampled(world: int, folder: str) -> Any:
    import tests.integration.megatron_world as m

    calls: list[int] = []

    def flat_at_first(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        return [float(i % 2) if len(calls) > 1 else 1.0 for i in range(len(completions))]

    trainer = m.build(world, folder, client=m.Client(), dynamic_sample=True, reward_funcs=[flat_at_first])
    trainer.resample_data_iterator = iter([[row] for row in m.prompts(8, 100)])
    batches = m.step(trainer, m.prompts(2))
    _, logged = m.learn(trainer, batches)
    return calls, {key: float(value) for key, value in logged.items()}


def test_metrics_cover_the_rounds_that_dynamic_sampling_threw_away(ranks):
    ((calls, logged),) = ranks.all(resampled)
    assert calls == [8, 8] and logged['tree/rounds'] == 2 and logged['tree/trees'] == 4
    assert logged['tree/flat_trees'] == 0.5 and logged['frac_reward_zero_std'] == 0


def evaluation(world: int, folder: str, eval_trees: bool) -> Any:
    import tests.integration.megatron_world as m

    client = m.Client()
    trainer = m.build(world, folder, client=client, num_generations_eval=2)
    for output in m.step(trainer, m.prompts(2)):
        assert output['grpo_batch'].advantages is not None
    client.requests.clear()
    trainer.unwrapped_models[0].eval()
    batches = m.step(trainer, m.prompts(4))
    assert len(batches) == 8
    metrics: dict[str, Any] = {}
    trainer.compute_eval_metrics(metrics)
    return [r.data_dict['treepo'] for r in client.requests], metrics, dict(trainer._metrics['eval'])


@pytest.mark.parametrize('eval_trees', [False, True])
def test_an_evaluation_asks_for_independent_answers_or_trees_of_its_width(ranks, eval_trees):
    ((notes, metrics, logged),) = ranks.all(
        evaluation, eval_trees, trees={'TREEPO_EVAL_TREES': str(eval_trees).lower()}
    )
    assert {note['mode'] for note in notes} == {'tree' if eval_trees else 'independent'}
    if eval_trees:
        assert {note['num_generations'] for note in notes} == {2} and logged['tree/trees'] == [4] and not metrics
    else:
        assert metrics['tree/failures'].item() == 0 and not any(key.startswith('tree/') for key in logged)
    assert logged['reward']


def without_trees(world: int, folder: str) -> Any:
    from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer

    import tests.integration.megatron_world as m

    class Plain(m.Client):
        """Another scheduler: it knows no probes, and gives answers without reports."""

        def infer(self, infer_requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
            if not isinstance(infer_requests[0], dict):
                assert all('treepo' not in (r.data_dict or {}) for r in infer_requests)
                for request in infer_requests:
                    request.data_dict = {'treepo': RequestNote(mode='independent').to_dict()}
            outputs = super().infer(infer_requests, *args, **kwargs)
            for output in outputs:
                output.rollout_infos = {}
            return outputs

    class Swifts(m.Trainer):
        samples2requests = MegatronGRPOTrainer.samples2requests
        _compute_advantages = MegatronGRPOTrainer._compute_advantages
        _generate_and_score_completions = MegatronGRPOTrainer._generate_and_score_completions

    results = []
    for cls in (m.Trainer, Swifts):
        trainer = m.build(world, folder, client=Plain(), cls=cls)
        results.append((trainer.grows_trees, m.token_advantages(m.step(trainer, m.prompts(2))), m.files(folder)))
    return results


def test_a_run_without_trees_is_swifts_own(ranks):
    ((ours, swifts),) = ranks.all(without_trees)
    assert ours == swifts and ours[0] is False and ours[2] == [] and any(map(len, ours[1]))


# Colocate mode.


def colocate(world: int, folder: str, sleep_level: int = 0, lost: bool = False) -> Any:
    import tests.integration.megatron_world as m

    trainer = m.build(world, folder, cls=m.Colocated, sleep_level=sleep_level, **COLOCATE)
    assert trainer.args.multi_turn_scheduler is None and trainer.multi_turn_scheduler is None
    done = []
    for number in range(3):
        trainer.lost = lost and number > 0
        size = 2 // mpu().get_data_parallel_world_size()
        batches = m.step(trainer, m.prompts(size, size * mpu().get_data_parallel_rank()))
        everyone = trainer.everyone
        if mpu().is_pipeline_last_stage():
            m.learn(trainer, batches, rate=5.0)
        for parameter in trainer.unwrapped_models[0].parameters():
            torch.distributed.broadcast(parameter.data, world - 1)
        done.append((everyone, trainer.rows, m.token_advantages(batches), trainer.tree_config))
        assert trainer.awake == (set() if sleep_level else {'weights', 'kv_cache'})
    return done, trainer._sync_proof.proven


@pytest.mark.parametrize('world, stages, sleep_level', [(1, 1, 0), (1, 1, 1), (2, 2, 0), (4, 2, 2)])
def test_trees_grow_on_the_engines_of_all_ranks(ranks, world, stages, sleep_level):
    """An engine that sleeps has its weights at the sync, and its cache, which the comparison needs, at the rollout."""
    results = ranks.all(colocate, sleep_level, world=world, stages=stages, trees=WHITENED)
    assert all(proven for _, proven in results)
    for steps in zip(*(done for done, _ in results), strict=True):
        expected = ordinary(steps[0][0], steps[0][3])
        sizes = [report['id'] for _, report, *_ in steps[0][0]]
        assert {sizes.count(tree) for tree in sizes} == {4}
        for _, rows, advantages_, _ in steps:
            for (request, *_), row in zip(rows, advantages_, strict=True):
                assert row == pytest.approx(expected[request], abs=1e-5)


def test_an_engine_that_lost_its_weights_ends_all_ranks(ranks):
    results = ranks.run(colocate, 0, True, world=2)
    assert all('WeightSyncError' in f'{type(r).__name__}: {r}' for r in results), results
    assert 'the engine of rank' in str(results[0])


# Options.


def refused(world: int, folder: str, changes: dict[str, Any]) -> Any:
    import tests.integration.megatron_world as m

    class Unloaded(m.Trainer):
        def prepare_model(self) -> None:
            raise AssertionError('a model was loaded')

    last = torch.distributed.get_rank() == world - 1
    client = m.Client() if last and changes.get('vllm_mode') != 'colocate' else None
    m.build(world, folder, client=client, cls=Unloaded, **changes)


COLOCATE = dict(vllm_mode='colocate', multi_turn_scheduler='treepo')


@pytest.mark.parametrize(
    'changes, trees, message',
    [
        (dict(router_replay_mode='R3'), {}, '--router_replay_mode R3'),
        (dict(advantage_estimator='rloo', scale_rewards='none', kl_in_reward=False), {}, 'ADVANTAGE__ESTIMATOR=rloo'),
        (dict(scale_rewards='gdpo'), {}, '--scale_rewards gdpo'),
        (dict(loss_type='real', scale_rewards='none'), {}, '--loss_type real: it only takes the sign'),
        (dict(importance_sampling_level='sequence'), SEGMENTS, 'Use sequence_token'),
        (dict(max_completion_length=16), {}, '--max_completion_length'),
        ({}, {'TREEPO_BRANCHING__POLICY': 'nearest'}, 'nearest'),
        (dict(**COLOCATE, vllm_tensor_parallel_size=2), {}, 'must add, step and abort the same requests'),
        (dict(**COLOCATE, completion_length_limit_scope='total'), {}, 'limits each turn'),
        (dict(**COLOCATE, use_gym_env=True), {}, 'plays no environment'),
        (
            COLOCATE,
            {'TREEPO_BUDGET__POLICY': 'by_segment_tokens', 'TREEPO_BUDGET__TOKENS': '4096'},
            'by_segment_tokens on 2 ranks',
        ),
    ],
)
def test_options_that_can_not_work_are_refused_on_all_ranks_before_a_model_loads(ranks, changes, trees, message):
    results = ranks.run(refused, changes, world=2, trees=trees)
    assert all(message in str(result) for result in results), results


@pytest.mark.parametrize(
    'stages, size, generations, message',
    [(2, 2, 4, 'only 2 answers of a replica follow each other'), (1, 2, 4, None), (2, 4, 4, None), (4, 2, 4, None)],
)
def test_dynamic_sampling_that_would_cut_trees_is_refused(stages, size, generations, message):
    from treepo_swift.trainer.compatibility import megatron_reasons

    args = SimpleNamespace(
        router_replay_mode='disabled',
        tensor_model_parallel_size=1,
        context_parallel_size=1,
        pipeline_model_parallel_size=stages,
        per_device_generation_batch_size=size,
        num_generations=generations,
        dynamic_sample=True,
    )
    reasons = list(megatron_reasons(args, 4))
    assert [message in reason for reason in reasons] == ([] if message is None else [True])


# Registering.


def registers(world: int, folder: str) -> Any:
    import importlib

    from treepo_swift.plugin import register

    register()
    assert 'swift.megatron' not in sys.modules
    import swift.megatron.pipelines.train.rlhf as pipeline

    register()
    trainer = importlib.import_module('swift.megatron.trainers').MegatronGRPOTrainer
    from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer

    args = SimpleNamespace(rlhf_type='grpo', vllm_mode='colocate')
    made: list[Any] = []
    trainer.__init__ = lambda self, *given, **options: made.append(type(self))
    pipeline.MegatronRLHF.prepare_trainer(SimpleNamespace(args=args, template=None, _prepare_vllm_client=lambda: None))
    assert made == [trainer] and issubclass(trainer, MegatronGRPOTrainer) and trainer is not MegatronGRPOTrainer
    del MegatronGRPOTrainer._score_completions
    register()


def test_the_trainer_is_registered_where_megatron_is_loaded_and_only_there(ranks):
    (error,) = ranks.run(registers)
    assert type(error).__name__ == 'UnsupportedVersion', getattr(error, 'told', error)
    assert 'lacks swift.megatron.trainers.grpo_trainer:MegatronGRPOTrainer._score_completions' in str(error)
