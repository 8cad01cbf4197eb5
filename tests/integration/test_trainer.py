"""From rewards to the advantages of every token, through swift's own code, without a model or a server."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from swift.utils import get_logger

from treepo_swift.config import TreeConfig
from treepo_swift.trainer.weight_sync import WeightSyncError
from treepo_swift.wire.note import RequestNote

T = 12
"""Width of the completion region of every batch below."""


def report(tree: str, nodes: Sequence[int], tokens: Sequence[int], stop: str = 'eos') -> dict[str, Any]:
    return {'id': tree, 'nodes': list(nodes), 'tokens': list(tokens), 'stop': stop, 'depth': len(nodes)}


WORKED = [
    report('u', [1, 2], [3, 2]),
    report('u', [1, 3], [3, 1]),
    report('u', [4, 5], [2, 2]),
    report('u', [4, 6], [2, 4]),
]
"""The tree of the worked example: A and B fork below node 1, C and D below node 4."""
FLAT = [report('u', [i], [i + 2]) for i in range(4)]
"""Nothing shared: plain GRPO."""
PROGRESS = [[0.25, 0.5], [0.25, -0.5], [-0.25, 0.0], [-0.25, 0.0]]
"""What each node is worth more than its parent, where only A is right."""


@contextmanager
def listening(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """swift's logger does not hand its records on to the root's."""
    logger = get_logger()
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def build_trainer(
    reports: Sequence[dict[str, Any] | None],
    rewards: Callable[..., list[Any]] | Sequence[Any],
    *,
    cls: Any = None,
    config: dict[str, Any] | None = None,
    num_generations: int = 4,
    steps: int = 1,
    world: tuple[int, int] = (0, 1),
    grows_trees: bool = True,
    **attributes: Any,
) -> tuple[Any, list[Any]]:
    """A trainer that has only what rewards and advantages need, and its samples. `world` is (rank, ranks)."""
    from swift.rl_core.data import GRPOSample

    from tests.flat import flat
    from treepo_swift.trainer.metrics import EvaluationFailures
    from treepo_swift.trainer.trainer import TreeGRPOTrainer

    def reward(completions: list[str], **kwargs: Any) -> list[Any]:
        return [rewards[int(text)] for text in completions]

    trainer = object.__new__(cls or TreeGRPOTrainer)
    trainer.__dict__.update(
        {
            **dict(
                tree_config=flat(**(config or {})),
                grows_trees=grows_trees,
                _rounds=[],
                _evaluation_failures=EvaluationFailures(),
                _segment_advantages=None,
                args=SimpleNamespace(report_to=[], steps_per_generation=steps),
                accelerator=SimpleNamespace(
                    device=torch.device('cpu'),
                    process_index=world[0],
                    num_processes=world[1],
                    is_main_process=not world[0],
                ),
                state=SimpleNamespace(global_step=0, max_steps=10),
                control=SimpleNamespace(should_evaluate=False),
                template=SimpleNamespace(sequence_parallel_size=1),
                model=SimpleNamespace(training=True),
                num_generations=num_generations,
                num_generations_eval=num_generations,
                dynamic_num_samples=False,
                enable_server_multi_turn=False,
                use_gym_env=False,
                kl_in_reward=False,
                beta=0.0,
                advantage_estimator='grpo',
                scale_rewards='group',
                reward_funcs=[rewards if callable(rewards) else reward],
                reward_model_plugins=[None],
                reward_func_names=['right'],
                reward_weights=torch.ones(1),
                overlong_filter=False,
                rollout_importance_sampling_mode=None,
                _has_teacher=False,
                advantage_reweight=None,
                sdar_loss_coef=0.0,
                loss_type='dapo',
                off_policy_sequence_mask_delta=None,
                _metrics={'train': defaultdict(list), 'eval': defaultdict(list)},
                _logs={'rewards': defaultdict(list), 'advantages': []},
            ),
            **attributes,
        }
    )
    samples = [
        GRPOSample(
            messages=[{'role': 'user', 'content': f'question {i}'}, {'role': 'assistant', 'content': str(i)}],
            request_id=f'r{i}',
            rollout_infos={'num_turns': 1} if r is None else {'tree': r},
        )
        for i, r in enumerate(reports)
    ]
    return trainer, samples


def encode(trainer: Any, samples: Sequence[Any], *, left: bool = False, **fields: Any) -> list[dict[str, Any]]:
    """Batches whose loss tokens are those of the reports, after two masked tokens (a response prefix)."""
    from swift.rl_core.data import GRPOBatch

    encoded = []
    for chunk in trainer.split_by_mini_batches(list(samples)):
        mask = torch.zeros(len(chunk), T, dtype=torch.bool)
        for row, sample in enumerate(chunk):
            tree = sample.rollout_infos.get('tree')
            count = 3 if tree is None else 0 if tree['stop'] in ('failed', 'absent') else sum(tree['tokens'])
            start = T - count if left else 2
            mask[row, start : start + count] = True
        truncated = torch.tensor([sample.finish_reason == 'length' for sample in chunk])
        batch = GRPOBatch(mask, truncated, torch.full((len(chunk),), T))
        for name, value in fields.items():
            setattr(batch, name, value(mask))
        encoded.append({'grpo_batch': batch})
    return encoded


def advantages(trainer: Any, samples: Sequence[Any], **options: Any) -> list[list[float]]:
    """The advantages of every sample's loss tokens, as swift's pipeline leaves them for the loss."""
    from accelerate import PartialState

    PartialState(cpu=True)
    trainer._rewards_per_func = trainer._compute_rewards_per_func(samples)
    encoded = encode(trainer, samples, **options)
    trainer._postprocess_batch(samples, encoded)
    rows = []
    for batch in (e['grpo_batch'] for e in encoded):
        assert batch.advantages.shape == batch.completion_mask.shape
        rows += [values[mask].tolist() for values, mask in zip(batch.advantages, batch.completion_mask)]
    return rows


def spread(values: Sequence[Sequence[float]], reports: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[v for v, n in zip(part, r['tokens']) for _ in range(n)] for part, r in zip(values, reports)]


@pytest.mark.parametrize('left', [False, True])
@pytest.mark.parametrize('steps', [1, 2])
def test_segment_advantages_reach_their_own_tokens(left, steps):
    """In both layouts that swift has (padding_free aligns to the right), with a response prefix, over mini-batches."""
    trainer, samples = build_trainer(
        WORKED, [1.0, 0, 0, 0], steps=steps, config=dict(estimator='progress', normalisation='none')
    )
    rows = advantages(trainer, samples, left=left)
    for row, expected in zip(rows, spread(PROGRESS, WORKED), strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    # swift knows a trajectory's mean over its tokens.
    assert samples[0].advantages.item() == pytest.approx((0.25 * 3 + 0.5 * 2) / 5)
    assert trainer._logs['advantages'] == pytest.approx([s.advantages.item() for s in samples])


@pytest.mark.parametrize('estimator', ['treepo', 'progress'])
@pytest.mark.parametrize('normalisation', ['whiten', 'group', 'none'])
def test_normalisation_counts_loss_tokens(estimator, normalisation):
    trainer, samples = build_trainer(
        WORKED, [1.0, 0, 0, 0], config=dict(estimator=estimator, normalisation=normalisation)
    )
    tokens = torch.tensor([v for row in advantages(trainer, samples) for v in row])
    if normalisation == 'whiten':
        assert tokens.mean().item() == pytest.approx(0, abs=1e-6) and tokens.std().item() == pytest.approx(1, abs=1e-4)
    elif normalisation == 'group':
        assert tokens.abs().max() > 0.5
    else:
        assert tokens[0].item() == pytest.approx(0.625 if estimator == 'treepo' else 0.25)


def test_placeholders_are_in_no_baseline_no_metric_and_no_loss():
    reports = [
        *WORKED,
        report('v', [1], [2]),
        report('v', [2], [2]),
        report('v', [], [], 'failed'),
        report('v', [], [], 'absent'),
    ]
    trainer, samples = build_trainer(reports, [1.0, 0, 0, 0, 0.3, 0.3, 9.0, None], config=dict(normalisation='none'))
    rows = advantages(trainer, samples)
    assert rows[4:] == [[0, 0], [0, 0], [], []] and rows[0][0] == pytest.approx(0.625)
    # What the reward function made of their filler text is forgotten: the tree is flat.
    assert trainer._rewards_per_func[4:, 0].tolist() == pytest.approx([0.3] * 4)
    assert trainer.compute_std(samples, trainer._rewards_per_func)[4:].tolist() == [0, 0, 0, 0]
    assert trainer._metrics['train']['tree/flat_trees'] == [0.5]
    assert trainer._metrics['train']['tree/stop/failed'] == [1 / 8]


def test_a_tree_of_placeholders_only_moves_nothing():
    reports = [*WORKED, *[report('v', [], [], 'failed')] * 4]
    trainer, samples = build_trainer(reports, [1.0, 0, 0, 0, 1, 2, 3, 4])
    rows = advantages(trainer, samples)
    assert rows[4:] == [[]] * 4 and all(map(math.isfinite, rows[0]))
    assert trainer.compute_std(samples, trainer._rewards_per_func)[4:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize('estimator', ['treepo', 'progress'])
def test_overlong_trajectories_stay_in_the_baseline_but_not_in_the_whitening(estimator):
    trainer, samples = build_trainer(WORKED, [1.0, 0, 0, 0], overlong_filter=True, config=dict(estimator=estimator))
    samples[3].finish_reason = 'length'
    rows = advantages(trainer, samples)
    tokens = torch.tensor([v for row in rows[:3] for v in row])
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6) and tokens.std().item() == pytest.approx(1, abs=1e-4)
    assert set(rows[3]) == {0.0}


def test_kl_in_reward_is_subtracted_before_the_estimator():
    trainer, samples = build_trainer(
        FLAT, [1.0, 0, 0, 0], kl_in_reward=True, beta=0.1, config=dict(normalisation='none')
    )
    kl = {
        'old_per_token_logps': lambda mask: torch.full(mask.shape, -1.0),
        'ref_per_token_logps': lambda mask: torch.full(mask.shape, -3.0),
    }
    rows = advantages(trainer, samples, **kl)
    rewards = [r - 0.1 * 2 * sum(report['tokens']) for r, report in zip([1, 0, 0, 0], FLAT)]
    mean = sum(rewards) / 4
    assert [row[0] for row in rows] == pytest.approx([r - mean for r in rewards])


def test_a_token_too_many_is_an_error_with_both_counts():
    reports = [*WORKED[:3], report('u', [4, 6], [2, 4])]
    trainer, samples = build_trainer(reports, [1.0, 0, 0, 0])
    trainer._rewards_per_func = trainer._compute_rewards_per_func(samples)
    encoded = encode(trainer, samples)
    encoded[0]['grpo_batch'].completion_mask[3, 2] = False
    with pytest.raises(
        RuntimeError,
        match=r'tree u has 5 loss tokens in the trainer, but its nodes \[4, 6\] were '
        'sampled with 6',
    ):
        trainer._postprocess_batch(samples, encoded)


def test_rollout_importance_sampling_without_log_probs_is_an_error():
    trainer, samples = build_trainer(WORKED, [1.0, 0, 0, 0], rollout_importance_sampling_mode='token_truncate')
    with pytest.raises(RuntimeError, match='--rollout_importance_sampling_mode: log-probs of the rollout are missing'):
        advantages(trainer, samples)


@pytest.mark.parametrize(
    'value, said',
    [
        (None, "'right' returned None or nan"),
        (math.nan, "'right' returned None or nan"),
        (math.inf, "'right' returned inf"),
        (-math.inf, "'right' returned -inf"),
    ],
)
def test_a_reward_that_is_no_number_names_function_and_sample(value, said):
    trainer, samples = build_trainer(WORKED, [1.0, 0, value, 0])
    with pytest.raises(ValueError, match=f'Reward function {said} for sample 2 of the batch \\(r2\\).*question 2'):
        advantages(trainer, samples)


def test_one_of_two_reward_functions_may_have_nothing_to_say():
    trainer, samples = build_trainer(FLAT, [1.0, 0, 0, 0], config=dict(normalisation='none'))
    trainer.__dict__.update(
        reward_funcs=[trainer.reward_funcs[0], lambda completions, **kwargs: [None] * len(completions)],
        reward_model_plugins=[None, None],
        reward_func_names=['right', 'silent'],
        reward_weights=torch.ones(2),
    )
    assert advantages(trainer, samples)[0][0] == pytest.approx(0.75)


def test_metrics_cover_the_rounds_that_dynamic_sampling_threw_away():
    stats = {
        'decoded_tokens': 11,
        'trajectory_tokens': 19,
        'engine_requests': 6,
        'forks': 3,
        'fallbacks': 0,
        'failures': 0,
    }
    reports = [
        {**r, **({'stats': stats, 'batch': {'seconds': 2.0, 'scheduler_cpu_seconds': 0.1}} if not i else {})}
        for i, r in enumerate(WORKED)
    ]
    trainer, samples = build_trainer(reports, [1.0, 1, 1, 1])
    assert trainer.compute_std(samples, trainer._compute_rewards_per_func(samples)).tolist() == [0] * 4
    fresh = [{**r, 'id': 'w'} for r in reports]
    _, resampled = build_trainer(fresh, [])
    trainer.reward_funcs[:] = [lambda completions, **kwargs: [1.0, 0, 0, 0]]
    advantages(trainer, resampled)
    metrics = trainer._metrics['train']
    assert metrics['tree/rounds'] == [2] and metrics['tree/trees'] == [2] and metrics['tree/decoded_tokens'] == [22]
    assert metrics['tree/flat_trees'] == [0.5] and metrics['tree/rollout_seconds'] == [4]
    assert trainer._rounds == []


def test_samples_without_trees_are_left_to_swift():
    """A server of another scheduler, and evaluation; in training on trees a missing one is an error."""
    from swift.rlhf_trainers import GRPOTrainer

    rewards = [1.0, 0, 0, 1, 0, 0, 0, 1]
    plain, samples = build_trainer([None] * 8, rewards, cls=GRPOTrainer)
    expected = advantages(plain, samples)
    for options in (dict(grows_trees=False), dict(model=SimpleNamespace(training=False))):
        ours, samples = build_trainer([None] * 8, rewards, **options)
        assert advantages(ours, samples) == expected
        assert not any(key.startswith('tree/') for metrics in ours._metrics.values() for key in metrics)
    ours, samples = build_trainer([None] * 8, rewards)
    samples[0].rollout_infos['tree'] = WORKED[0]
    with pytest.raises(RuntimeError, match='7 of 8 samples of a batch came without a tree'):
        advantages(ours, samples)


@pytest.mark.parametrize(
    'training, should_evaluate, eval_trees, mode, width',
    [
        (True, False, False, 'tree', 4),
        (False, True, False, 'independent', None),
        (True, True, False, 'independent', None),  # --async_generate asks before the model is set to eval
        (False, True, True, 'tree', 2),
        (False, False, True, 'tree', 2),
    ],
)
def test_evaluation_asks_for_trees_only_where_told(training, should_evaluate, eval_trees, mode, width):
    trainer, _ = build_trainer([], [], config=dict(eval_trees=eval_trees), num_generations_eval=2)
    trainer.model.training, trainer.control.should_evaluate = training, should_evaluate
    trainer.state.global_step = 5
    note = trainer._request_note()
    assert (note.mode, note.num_generations) == (mode, width)
    assert note.step == 5 and note.packed
    assert mode == 'independent' or note.progress == 0.5


def test_evaluation_runs_by_the_trainers_config():
    trainer, _ = build_trainer([], [], config=dict(segment_length=64, max_depth=3, hook_timeout=5))
    trainer.model.training = False
    sent = RequestNote.from_dict(trainer._request_note().to_dict())
    assert sent.mode == 'independent' and sent.tree_config(TreeConfig()) == trainer.tree_config


def test_answers_that_failed_in_evaluation_are_counted_and_told(monkeypatch, caplog):
    from swift.rlhf_trainers import GRPOTrainer

    errors = [None, 'Tools.step of tree a: raised KeyError', 'Tools.step of tree a: raised KeyError', 'no engine']

    def evaluate(trainer: Any) -> Any:
        for _ in range(2):
            advantages(trainer, samples)
        return 'output'

    monkeypatch.setattr(GRPOTrainer, 'evaluation_loop', evaluate)
    for grows_trees in (True, False):
        trainer, samples = build_trainer([None] * 4, [1.0, 0, 0, 1], grows_trees=grows_trees)
        trainer.model.training = False
        for sample, error in zip(samples, errors, strict=True):
            sample.rollout_infos.update({} if error is None else {'tree_failure': error})
        caplog.clear()
        with listening(caplog):
            assert trainer.evaluation_loop() == 'output'
        told = [record.message for record in caplog.records if 'failed on the rollout server' in record.message]
        assert len(told) == grows_trees
        if grows_trees:
            # swift logs the mean of what is in the list, as `eval_tree/failures`.
            assert trainer._metrics['eval']['tree/failures'] == [6.0]
            assert '6 of 8 answers' in told[0] and 'Most common cause (4 times): Tools.step of tree a' in told[0]
        else:
            assert 'tree/failures' not in trainer._metrics['eval']
    trainer, samples = build_trainer([None] * 4, [1.0, 0, 0, 1])
    trainer.model.training = False
    trainer.evaluation_loop()
    assert trainer._metrics['eval']['tree/failures'] == [0.0]


class ProbedServers:
    """A client of two servers. The policy has moved by `shift`; the second server is `behind` it by so much."""

    base_urls, num_servers = ['http://a', 'http://b'], 2

    def __init__(self, dtype: str = 'float32') -> None:
        self.dtype, self.shift, self.behind, self.asked = dtype, 0.0, 0.0, 0

    def scores(self, count: int, shift: float) -> list[float]:
        return [-1.0 - 0.1 * (index % 7) - shift for index in range(count)]

    def infer(self, requests: list[Any], config: Any, use_tqdm: bool) -> list[Any]:
        self.asked += 1
        count = len(requests[0]['data_dict']['treepo']['token_ids']) - 1
        shifts = [self.shift, self.shift - self.behind]
        return [
            SimpleNamespace(
                rollout_infos={'treepo': {'engine': {'dtype': self.dtype}, 'logprobs': self.scores(count, shift)}}
            )
            for shift in shifts
        ]


def probed_trainer(servers: ProbedServers, trainer_dtype: str) -> Any:
    from accelerate import PartialState

    from treepo_swift.trainer.weight_sync import WeightSyncProof

    PartialState(cpu=True)
    trainer, _ = build_trainer([], [], vllm_client=servers, _sync_proof=WeightSyncProof([trainer_dtype]))
    trainer.processing_class = SimpleNamespace(encode=lambda text, add_special_tokens: list(range(64)))
    trainer._score = lambda ids: servers.scores(len(ids) - 1, servers.shift)
    return trainer


def test_a_server_that_grows_trees_no_more_is_named():
    class Restarted(ProbedServers):
        def infer(self, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super().infer(*args, **kwargs)[:1], SimpleNamespace(rollout_infos={})]

    trainer = probed_trainer(Restarted(), 'torch.float32')
    with pytest.raises(WeightSyncError, match='http://b grew trees when the training started'):
        trainer._verify_weight_sync(trainer._sync_proof)


def test_what_is_proven_is_compared_for_a_fiftieth_of_the_time(monkeypatch):
    """Steps of 3 s, comparisons of 0.3: every one until the proof, then one in five."""
    from swift.rlhf_trainers import GRPOTrainer

    from treepo_swift.trainer import trainer as trainer_module
    from treepo_swift.trainer import weight_sync

    now = [0.0]
    monkeypatch.setattr(weight_sync.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(trainer_module.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(GRPOTrainer, '_move_model_to_vllm', lambda self: None)
    servers = ProbedServers()
    trainer = probed_trainer(servers, 'torch.float32')
    score = trainer._score

    def slow_score(ids: list[int]) -> list[float]:
        now[0] += 0.3
        return score(ids)

    trainer._score = slow_score
    asked = []
    for step in range(100):
        servers.shift = 0.1 * step
        trainer._move_model_to_vllm()
        asked.append(servers.asked)
        now[0] += 3
    assert asked[:2] == [1, 2] and trainer._sync_proof.proven
    # What came before the proof does not count.
    assert 0.3 * (servers.asked - 2) <= 0.02 * now[0] + 0.3 and servers.asked >= 22
    servers.behind = 0.1
    with pytest.raises(WeightSyncError, match='has stopped following|does not sample from'):
        for _ in range(8):
            trainer._move_model_to_vllm()
            now[0] += 3


def test_every_sync_is_compared_on_every_server_and_timed():
    servers = ProbedServers()
    trainer = probed_trainer(servers, 'torch.float32')
    for step in range(3):
        servers.shift = 0.1 * step
        trainer.state.global_step = step
        trainer._verify_weight_sync(trainer._sync_proof)
    metrics = trainer._metrics['train']
    assert servers.asked == 3 and trainer._sync_proof.proven and metrics['tree/sync_gap'] == [0, 0, 0]
    assert len(metrics['tree/proof_seconds']) == 3 and all(0 < s < 60 for s in metrics['tree/proof_seconds'])
    servers.shift, servers.behind = 0.3, 0.1
    with pytest.raises(WeightSyncError, match='http://b, step 2: the server does not sample from'):
        trainer._verify_weight_sync(trainer._sync_proof)


def test_servers_score_while_the_trainer_does():
    servers = ProbedServers()
    trainer = probed_trainer(servers, 'torch.float32')
    answered = threading.Event()
    infer, score = servers.infer, trainer._score

    def infer_and_tell(*args: Any, **kwargs: Any) -> list[Any]:
        answered.set()
        return infer(*args, **kwargs)

    servers.infer = infer_and_tell
    trainer._score = lambda ids: score(ids) if answered.wait(60) else pytest.fail('nobody was asked before')
    trainer._verify_weight_sync(trainer._sync_proof)
    assert servers.asked == 1 and trainer._sync_proof.servers


@pytest.mark.parametrize('dtype, fits', [('bfloat16', True), ('float32', False)])
def test_the_servers_own_type_says_what_gap_is_possible(dtype, fits):
    """float32 masters against a bfloat16 server: 0.02 nats apart with equal weights."""
    servers = ProbedServers(dtype)
    trainer = probed_trainer(servers, 'torch.float32')
    servers.behind = 0.02
    if fits:
        trainer._verify_weight_sync(trainer._sync_proof)
        assert not trainer._sync_proof.proven
    else:
        with pytest.raises(WeightSyncError, match='already at the first sync'):
            trainer._verify_weight_sync(trainer._sync_proof)


@pytest.mark.parametrize('autocast, coarser', [('no', 'float32'), ('bf16', 'bfloat16'), ('fp16', 'float16')])
def test_autocast_counts_as_the_trainers_type(autocast, coarser):
    from treepo_swift.trainer.weight_sync import coarsest

    trainer, _ = build_trainer([], [], model=torch.nn.Linear(1, 1))
    trainer.accelerator.mixed_precision = autocast
    assert coarsest(trainer._computing_types()) == coarser


def test_paths_that_end_before_the_completion_length_are_told_of_once(caplog):
    from treepo_swift.trainer.arguments import warn_of_short_paths

    with listening(caplog):
        for length in (16_384, 16_384, 7_168):
            warn_of_short_paths(TreeConfig(segment_length=512, max_depth=14), length)
    (told,) = [record.message for record in caplog.records]
    assert '14 x 512 = 7168 tokens' in told and '--max_completion_length 16384' in told and 'evaluation' in told


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            **dict(
                advantage_estimator='grpo',
                scale_rewards='group',
                loss_type='dapo',
                kl_in_reward=False,
                beta=0.04,
                importance_sampling_level='token',
                use_liger_kernel=False,
                advantage_reweight=None,
                structured_outputs_regex=None,
                async_generate=False,
                eval_on_start=False,
                per_device_train_batch_size=16,
                num_generations=8,
                tree_scheduler=None,
                vllm_tensor_parallel_size=1,
                completion_length_limit_scope='per_round',
                world_size=2,
            ),
            **changes,
        }
    )


@pytest.mark.parametrize(
    'changes, config, message',
    [
        (dict(advantage_estimator='rloo', scale_rewards='none'), {}, 'Set TREEPO_ADVANTAGE__ESTIMATOR=rloo instead.$'),
        (dict(scale_rewards='gdpo'), {}, '--scale_rewards gdpo: it normalises every reward function by itself'),
        (dict(scale_rewards='none'), {}, 'TREEPO_ADVANTAGE__NORMALISATION=none'),
        (dict(scale_rewards='batch'), dict(normalisation='group'), 'TREEPO_ADVANTAGE__NORMALISATION=whiten'),
        (dict(loss_type='real', scale_rewards='none'), {}, '--loss_type real: it only takes the sign'),
        (dict(loss_type='real', per_device_train_batch_size=12), dict(normalisation='none'), 'must hold whole prompts'),
        (dict(kl_in_reward=True), dict(reject_flat_subgroups=True), 'no subgroup would ever be rejected'),
        (dict(loss_type='real'), dict(estimator='progress', normalisation='none'), 'one sign per trajectory'),
        (dict(importance_sampling_level='sequence'), dict(estimator='spo'), 'Use sequence_token'),
        (dict(use_liger_kernel=True), dict(estimator='treerl'), 'takes the mean over a trajectory'),
        (dict(advantage_reweight='rlsd'), dict(estimator='progress'), 'reweights one advantage per trajectory'),
        (dict(structured_outputs_regex='a+'), {}, 'would start anew at every segment'),
        (dict(async_generate=True, eval_on_start=True), {}, "trains on the evaluation's"),
        (dict(tree_scheduler='treepo', vllm_tensor_parallel_size=2), {}, 'must add, step and abort the same requests'),
        (dict(tree_scheduler='treepo', completion_length_limit_scope='total'), {}, 'limits each turn'),
        (
            dict(tree_scheduler='treepo'),
            dict(budget='by_segment_tokens', budget_tokens=4096),
            'by_segment_tokens on 2 ranks in colocate mode',
        ),
    ],
)
def test_options_that_can_not_work_are_refused_with_the_reason(changes, config, message):
    from tests.flat import flat
    from treepo_swift.config import ConfigError
    from treepo_swift.trainer.compatibility import check_options

    with pytest.raises(ConfigError, match=message):
        check_options(options(**changes), flat(**config))


@pytest.mark.parametrize(
    'changes, config',
    [
        ({}, {}),
        (dict(tree_scheduler='treepo'), {}),
        (dict(tree_scheduler='treepo', world_size=1), dict(budget='by_segment_tokens', budget_tokens=4096)),
        ({}, dict(budget='by_segment_tokens', budget_tokens=4096)),
        (dict(scale_rewards='batch'), {}),
        (dict(scale_rewards='none'), dict(normalisation='none')),
        (dict(scale_rewards='none', loss_type='real'), dict(normalisation='group')),
        (dict(kl_in_reward=True, beta=0.0), dict(reject_flat_subgroups=True)),
        (dict(importance_sampling_level='sequence'), {}),
        (dict(importance_sampling_level='sequence_token', async_generate=True), dict(estimator='progress')),
    ],
)
def test_options_that_work_are_let_through(changes, config):
    from tests.flat import flat
    from treepo_swift.trainer.compatibility import check_options

    check_options(options(**changes), flat(**config))


@pytest.mark.parametrize('asked', [True, False])
def test_the_weights_are_proven_unless_told_otherwise(asked, monkeypatch, tmp_path):
    from swift.rlhf_trainers import GRPOTrainer

    monkeypatch.setattr(GRPOTrainer, 'prepare_rollout', lambda self: None)
    from tests.flat import flat

    config = flat(verify_weight_sync=asked)
    args = SimpleNamespace(
        tree_scheduler=None,
        tree_engines=[('http://x', {})],
        output_dir=str(tmp_path),
        tree_config=config,
        log_completions=False,
    )
    trainer, _ = build_trainer(
        [],
        [],
        args=args,
        vllm_client=SimpleNamespace(sessions=[]),
        _sync_proof=None,
    )
    monkeypatch.setattr(trainer, '_broadcast', lambda function: function())
    monkeypatch.setattr(trainer, '_computing_types', lambda: ['float32'])
    trainer.prepare_rollout()
    assert (trainer._sync_proof is not None) == asked
    assert f'verify_weight_sync: {str(asked).lower()}' in (tmp_path / 'treepo_config.yaml').read_text()
