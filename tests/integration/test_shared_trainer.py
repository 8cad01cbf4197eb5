"""The trainer with log-probs over tries: swift's own loss, metrics and gradients are those of the plain path."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('swift')

from accelerate.utils import DistributedType
from swift.rlhf_trainers import GRPOTrainer

from tests.integration.test_shared_logprobs import VOCABULARY, assert_same_gradients, build
from treepo_swift.config import TreeConfig
from treepo_swift.trainer.shared_prefix import attention, mixin, trust
from treepo_swift.trainer.shared_prefix.batch import CACHE, OUTSIDE, read_rows
from treepo_swift.trainer.shared_prefix.joining import affordable_tokens, windows
from treepo_swift.trainer.shared_prefix.trie import build_trie

W = 4
"""Rows of a group."""
LOSSES = ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo', 'sapo', 'fipo', 'real')


def group_rows() -> list[tuple[int, list[int]]]:
    """Two trees of `W` rows with the lengths of their prompts; answers fork inside, and one is a placeholder."""
    first, second = [3, 4, 5], [6, 2, 6, 2, 1]
    trunk = [7, 8, 9, 10]
    rows = [(3, [*first, *trunk, 1, 2, 3]), (3, [*first, *trunk, 4]), (3, [*first, 7, 8, 5, 5]), (3, [*first, 9, 9])]
    rows += [
        (5, [*second, *trunk, 5]),
        (5, [*second, *trunk[:2], 6, 6, 6, 6]),
        (5, [*second, 20, 21]),
        (5, [*second, 0]),
    ]
    return rows


def micro_batch(rows: list[tuple[int, list[int]]], *, layout: str = 'right', masked: bool = True) -> tuple[dict, Any]:
    """What swift's collator makes of prompts and answers; some tokens inside an answer are an environment's."""
    from swift.rl_core.data import GRPOBatch
    from swift.rlhf_trainers.utils import build_completion_mask_and_seq_lengths

    labels = [[-100] * prompt + row[prompt:] for prompt, row in rows]
    if masked:
        labels[0][5:7] = [-100, -100]
    longest = max(len(row) for _, row in rows)
    if layout == 'free':
        flat = lambda parts: torch.tensor([[value for part in parts for value in part]])
        inputs = {
            'input_ids': flat(row for _, row in rows),
            'position_ids': flat(range(len(row)) for _, row in rows),
        }
        label_ids = flat(labels)
    else:
        pad = lambda row, value: (
            [*[value] * (longest - len(row)), *row] if layout == 'left' else [*row, *[value] * (longest - len(row))]
        )
        inputs = {
            'input_ids': torch.tensor([pad(row, 0) for _, row in rows]),
            'attention_mask': torch.tensor([pad([1] * len(row), 0) for _, row in rows]),
        }
        if layout == 'left':
            inputs['position_ids'] = torch.tensor([pad(list(range(len(row))), 0) for _, row in rows])
        label_ids = torch.tensor([pad(row, -100) for row in labels])
    kept = int((label_ids.shape[-1] - (label_ids != -100).int().argmax(-1)).max())
    mask, lengths, _ = build_completion_mask_and_seq_lengths(
        label_ids, len(rows), padding_free=layout == 'free', encoded_batch=inputs, logits_to_keep=kept
    )
    return inputs, GRPOBatch(mask, torch.zeros(len(rows), dtype=torch.bool), lengths, logits_to_keep=kept)


def build_trainer(model: Any, *, shared: dict[str, Any] | None = None, free: bool = False, **changes: Any) -> Any:
    """A trainer that has only what its loss needs."""
    from treepo_swift.trainer.trainer import TreeGRPOTrainer

    trainer = object.__new__(TreeGRPOTrainer)
    args = dict(
        delta=None,
        log_entropy=True,
        top_entropy_quantile=0.8,
        per_device_train_batch_size=2 * W,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        gradient_checkpointing_kwargs=None,
        report_to=[],
        per_device_eval_batch_size=2 * W,
        use_liger_kernel=False,
        optim='adamw_torch',
    )
    args.update({key: changes.pop(key) for key in list(changes) if key in args})
    trainer.__dict__.update(
        tree_config=TreeConfig(shared_prefix={'enabled': True, 'skip_old_logprobs': True, **(shared or {})}),
        grows_trees=True,
        model=model,
        ref_model=None,
        model_kwarg_keys=('use_cache', 'logits_to_keep'),
        is_multimodal=False,
        template=SimpleNamespace(padding_free=free, sequence_parallel_size=1),
        accelerator=SimpleNamespace(
            device=torch.device('cpu'),
            num_processes=1,
            is_main_process=True,
            mixed_precision='no',
            distributed_type=DistributedType.NO,
            gather_for_metrics=lambda value: value,
            unwrap_model=lambda model: model,
        ),
        args=SimpleNamespace(**args),
        temperature=0.9,
        compute_entropy=True,
        top_entropy_quantile=0.8,
        overlong_filter=False,
        beta=0.0,
        kl_in_reward=False,
        loss_type='grpo',
        importance_sampling_level='token',
        epsilon_low=0.05,
        epsilon_high=0.1,
        tau_pos=1.0,
        tau_neg=1.05,
        real_tau=0.5,
        fipo_gamma=0.9,
        fipo_clip_range=0.2,
        fipo_clip_high_only=False,
        fipo_safety_threshold=3.0,
        max_completion_length=16,
        num_generations=W,
        num_iterations=1,
        dynamic_num_samples=False,
        rollout_importance_sampling_mode=None,
        disable_rollout_importance_sampling=False,
        log_rollout_offpolicy_metrics=False,
        off_policy_sequence_mask_delta=None,
        advantage_reweight=None,
        sdar_loss_coef=0.0,
        chord_sft_iterator=None,
        use_liger_loss=False,
        use_teacher_api=False,
        _has_teacher=False,
        _is_dynamic_self_distillation=False,
        model_accepts_loss_kwargs=False,
        compute_loss_func=None,
        current_gradient_accumulation_steps=1,
        _metrics={'train': defaultdict(list), 'eval': defaultdict(list)},
    )
    trainer.__dict__.update(changes)
    return trainer


@pytest.fixture(autouse=True)
def one_process() -> None:
    from accelerate import PartialState

    PartialState(cpu=True)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the mixin says."""
    said: list[str] = []
    for level in ('info', 'warning', 'info_once'):
        monkeypatch.setattr(mixin.logger, level, said.append)
    return said


def loss_of(model: Any, layout: str = 'right', *, enabled: bool = True, old: float = 0.0, **changes: Any) -> Any:
    """Loss, metrics and gradients by swift's own code; `old` is how far the policy that sampled was away."""
    trainer = build_trainer(model, shared={'enabled': enabled}, free=layout == 'free', **changes)
    inputs, batch = micro_batch(group_rows(), layout=layout)
    dice = torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(batch.completion_mask.shape, generator=dice, dtype=torch.float64)
    batch.advantages = noise()
    if changes.get('loss_type') == 'real':
        batch.advantages = batch.advantages[:, :1].expand_as(batch.advantages)
    batch.num_items_in_batch = batch.completion_mask.sum()
    with torch.no_grad():
        now = trainer._get_per_token_logps_and_entropies(model, dict(inputs), batch)[0]
    if old:
        batch.old_per_token_logps = now + old * noise()
    batch.ref_per_token_logps = now + 0.1 * noise()
    model.zero_grad()
    loss, metrics = trainer._compute_loss_and_metrics(model, dict(inputs), batch)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.item(), metrics, gradients, trainer


def flattened(metrics: Any, name: str = '') -> dict[str, float]:
    """Every number of swift's metrics by its place."""
    if torch.is_tensor(metrics):
        metrics = metrics.tolist()
    if isinstance(metrics, (dict, list)):
        items = metrics.items() if isinstance(metrics, dict) else enumerate(metrics)
        return {key: number for k, v in items for key, number in flattened(v, f'{name}/{k}').items()}
    return {name: metrics} if isinstance(metrics, (int, float)) else {}


def assert_equal_losses(model: Any, layout: str = 'right', **changes: Any) -> None:
    loss, metrics, gradients, trainer = loss_of(model, layout, **changes)
    expected, wanted_metrics, wanted, _ = loss_of(model, layout, enabled=False, **changes)
    assert trainer._metrics['train']['tree/train_token_ratio'][0] > 1.5, 'nothing was shared'
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    numbers, wanted_numbers = flattened(metrics), flattened(wanted_metrics)
    assert numbers.keys() == wanted_numbers.keys() and len(numbers) > 3
    for name, value in numbers.items():
        assert value == pytest.approx(wanted_numbers[name], rel=1e-7, nan_ok=True), name
    assert_same_gradients(gradients, wanted, 1e-6)


@pytest.mark.parametrize('layout', ['right', 'left', 'free'])
@pytest.mark.parametrize('loss_type', LOSSES)
def test_loss_metrics_and_gradients_are_those_of_the_plain_path(loss_type, layout):
    """With clipping, and an advantage for each token as estimators of segments give them."""
    assert_equal_losses(build('Qwen2').train(), layout, loss_type=loss_type, old=0.2)


@pytest.mark.parametrize('level', ['token', 'sequence', 'sequence_token'])
@pytest.mark.parametrize('beta', [0.0, 0.3])
def test_importance_levels_and_kl(level, beta):
    assert_equal_losses(build('Qwen3').train(), importance_sampling_level=level, beta=beta, old=0.2)


def test_five_steps_end_at_the_same_weights():
    """In float32, with AdamW, old log-probs left out or computed, new rows each step."""
    ends = []
    for on in (True, False):
        model = build('Qwen2', torch.float32).train()
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trainer = build_trainer(model, shared={'enabled': on}, loss_type='dapo')
        for step in range(5):
            inputs, batch = micro_batch(
                [(prompt, [(token + step) % VOCABULARY for token in row]) for prompt, row in group_rows()]
            )
            if not on:
                with torch.no_grad():
                    batch.old_per_token_logps = trainer._get_per_token_logps_and_entropies(model, dict(inputs), batch)[
                        0
                    ]
            generator = torch.Generator().manual_seed(step)
            batch.advantages = torch.randn(2 * W, 1, generator=generator).expand_as(batch.completion_mask)
            batch.num_items_in_batch = batch.completion_mask.sum()
            loss, _ = trainer._compute_loss_and_metrics(model, inputs, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (trainer._metrics['train']['tree/train_token_ratio'][-1] > 1.5) == on
        ends.append(dict(model.named_parameters()))
    moved = 0.0
    for name, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-4, atol=2e-5, msg=name)
        moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-3


def test_clipping_is_active_in_these_tests():
    _, metrics, _, _ = loss_of(build('Qwen2').train(), old=0.2)
    assert metrics['clipping']['region_clip_mean'] > 0.1


@pytest.mark.parametrize('layout', ['right', 'left', 'free'])
def test_frames_are_swifts(layout):
    """Trained places hold the log-probs, places beside a padding_free row what swift puts there."""
    model = build('Qwen2')
    inputs, batch = micro_batch(group_rows(), layout=layout)
    plain = build_trainer(model, shared={'enabled': False}, free=layout == 'free')
    expected, entropies = plain._get_per_token_logps_and_entropies(model, dict(inputs), batch, compute_entropy=True)
    rows = read_rows(inputs, batch, padding_free=layout == 'free')
    found, found_entropies = rows.logprobs(model, temperature=0.9, entropies=True)
    assert found.shape == expected.shape
    mask = batch.completion_mask
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_entropies[mask], entropies[mask], rtol=1e-9, atol=1e-9)
    if layout == 'free':
        assert ((found == OUTSIDE) == (expected == OUTSIDE)).all() and (found == OUTSIDE).any()
    assert (found[~mask & (expected != OUTSIDE)] == 0).all()
    assert batch.__dict__[CACHE] is rows is read_rows(inputs, batch, padding_free=layout == 'free')


def test_a_run_without_trees_is_left_alone(monkeypatch):
    monkeypatch.setattr(mixin, 'read_rows', lambda *args, **kwargs: pytest.fail('read'))
    _, _, _, trainer = loss_of(build('Qwen2').train(), grows_trees=False)
    assert not trainer._metrics['train'] and not trainer._can_leave_out_old([])


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(mixin, 'read_rows', lambda *args, **kwargs: pytest.fail('read'))
    *_, trainer = loss_of(build('Qwen2').train(), enabled=False)
    assert trainer._metrics['train']['tree/train_token_ratio'] == [1.0]


# Micro-batches of one optimizer step.


def cut(size: int, layout: str = 'right') -> list[dict[str, Any]]:
    """The two trees in micro-batches of `size` rows, the same each time."""
    rows, dice = group_rows(), torch.Generator().manual_seed(3)
    batches = []
    for i in range(0, len(rows), size):
        inputs, batch = micro_batch(rows[i : i + size], layout=layout, masked=i == 0)
        batch.advantages = torch.randn(batch.completion_mask.shape, generator=dice, dtype=torch.float64)
        batches.append({'model_inputs': inputs, 'grpo_batch': batch})
    for batch in batches:
        batch['grpo_batch'].num_items_in_batch = sum(b['grpo_batch'].completion_mask.sum() for b in batches)
    return batches


def optimizer_steps(
    model: Any, monkeypatch: pytest.MonkeyPatch, steps: int, *, size: int = 2, layout: str = 'right', **changes: Any
) -> tuple[list[Any], list[dict[str, Any]], Any, int]:
    """Losses, gradients after each of `steps` optimizer steps, the trainer, and how many forwards had gradients."""
    batches = cut(size, layout)
    per_step = len(batches) // steps
    trainer = build_trainer(
        model,
        free=layout == 'free',
        gradient_accumulation_steps=per_step,
        steps_per_generation=len(batches),
        per_device_train_batch_size=size,
        **changes,
    )

    def training_step(self: Any, model: Any, batch: Any, num_items_in_batch: Any = None) -> Any:
        loss, metrics = self._compute_loss_and_metrics(model, dict(batch['model_inputs']), batch['grpo_batch'])
        (loss / per_step).backward()
        return loss.item(), metrics

    monkeypatch.setattr(GRPOTrainer, 'training_step', training_step)
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1) if torch.is_grad_enabled() else None)
    trainer._find_following(batches)
    results, gradients = [], []
    model.zero_grad()
    for i, batch in enumerate(batches):
        trainer.accelerator.sync_gradients = (i + 1) % per_step == 0
        results.append(trainer.training_step(model, batch))
        if trainer.accelerator.sync_gradients:
            assert trainer._joined is None
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
            model.zero_grad()
    hook.remove()
    return results, gradients, trainer, len(forwards)


@pytest.mark.parametrize(
    'size, steps, loss_type, layout',
    [
        *((2, 1, name, 'right') for name in LOSSES if name != 'real'),  # it wants whole groups
        (2, 1, 'dapo', 'free'),
        (2, 2, 'bnpo', 'right'),
        (1, 1, 'grpo', 'left'),
        (1, 1, 'dapo', 'free'),
    ],
)
def test_joined_micro_batches_have_their_own_losses_and_the_same_gradients(size, steps, loss_type, layout, monkeypatch):
    model = build('Qwen2').train()
    changes = dict(size=size, layout=layout, loss_type=loss_type)
    found = optimizer_steps(model, monkeypatch, steps, shared={'max_tokens': 1000}, **changes)
    plain = optimizer_steps(model, monkeypatch, steps, shared={'enabled': False}, **changes)
    for (loss, metrics), (expected, wanted_metrics) in zip(found[0], plain[0], strict=True):
        assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
        numbers, wanted = flattened(metrics), flattened(wanted_metrics)
        assert numbers.keys() == wanted.keys()
        for name, value in numbers.items():
            assert value == pytest.approx(wanted[name], rel=1e-7, abs=1e-12, nan_ok=True), name
    for ours, theirs in zip(found[1], plain[1], strict=True):
        assert_same_gradients(ours, theirs, 1e-6)
    # One forward for all micro-batches of a step.
    assert (found[3], plain[3]) == (steps, len(found[0]))


def test_what_does_not_fit_is_not_joined(monkeypatch):
    model = build('Qwen2').train()
    shared = lambda most: {'max_tokens': most}
    forwards = lambda most: optimizer_steps(model, monkeypatch, 1, shared=shared(most))[3]
    rows = [row for _, row in group_rows()]
    larger = max(len(build_trie(tree).tokens) for tree in (rows[:W], rows[W:]))
    assert [forwards(most) for most in (1, larger, 1000)] == [4, 2, 1]
    # Without a number: as many tokens as a micro-batch has row by row, padding included.
    assert forwards(None) == 2


def test_with_checkpointing_more_fits():
    model = build('Qwen2').train()
    assert affordable_tokens(model, 100) == 100
    model.gradient_checkpointing_enable({'use_reentrant': False})
    config = model.config
    kept = 2 * config.num_hidden_layers * config.hidden_size + 17 * config.intermediate_size
    assert affordable_tokens(model, 100) == int(100 * (1 + 5 * config.vocab_size / kept)) > 100


def test_steps_and_rollouts_that_do_not_meet_join_nothing():
    assert [list(w) for w in windows(4, 2)] == [[0, 1], [2, 3]]
    assert [list(w) for w in windows(2, 4)] == [[0, 1]]
    assert [list(w) for w in windows(3, 2)] == [[0], [1], [2]]


def test_a_step_that_ends_early_loses_no_gradient(monkeypatch):
    """The last optimizer step of an epoch may have fewer micro-batches than were computed together."""
    model = build('Qwen2').train()
    batches = cut(2)
    monkeypatch.setattr(
        GRPOTrainer,
        'training_step',
        lambda self, model, batch, n=None: self._compute_loss_and_metrics(
            model, dict(batch['model_inputs']), batch['grpo_batch']
        )[0].backward(),
    )
    found = []
    for enabled in (True, False):
        trainer = build_trainer(model, shared={'enabled': enabled, 'max_tokens': 1000}, gradient_accumulation_steps=4)
        trainer._find_following(batches)
        model.zero_grad()
        for i in (0, 1):
            trainer.accelerator.sync_gradients = i == 1
            trainer.training_step(model, batches[i])
        assert trainer._joined is None
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_same_gradients(*found, 1e-6)


@pytest.mark.parametrize(
    'changes, reason',
    [
        (dict(dynamic_num_samples=True), 'other numbers of samples'),
        (dict(optim='lomo'), 'updates weights within the backward'),
        (dict(distributed=DistributedType.DEEPSPEED), 'DEEPSPEED counts the passes'),
    ],
)
def test_where_nothing_is_joined(changes, reason, lines):
    distributed = changes.pop('distributed', DistributedType.NO)
    trainer = build_trainer(build('Qwen2').train(), gradient_accumulation_steps=4, **changes)
    trainer.accelerator.distributed_type = distributed
    batches = cut(2)
    trainer._find_following(batches)
    assert not trainer._following and reason in trainer._why_not_joined()
    trainer.args.per_device_train_batch_size = 2
    trainer._say_what_micro_batches_share(batches)
    assert reason in lines[0]


# Passes that are not needed.


def prepare(model: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, Any, list[Any]]:
    """swift's own preparation of a rollout, but for templates: what was computed, and by which models."""
    from swift.rlhf_trainers import grpo_trainer

    inputs, batch = micro_batch(group_rows())
    monkeypatch.setattr(grpo_trainer, 'encode_sample', lambda sample, template: {})
    monkeypatch.setattr(grpo_trainer, 'collate_to_grpo_micro_batch', lambda *args, **kwargs: (dict(inputs), batch))
    trainer = build_trainer(model, shared=changes.pop('shared', None), **changes)
    from swift.rl_core.data import GRPOSample

    samples = [GRPOSample(messages=[], request_id=str(i)) for i in range(2 * W)]
    if changes.get('_is_dynamic_self_distillation'):
        samples[3].teacher_prompt = 'The answer is 4. Why?'
        monkeypatch.setattr(grpo_trainer, 'build_opsd_samples', lambda batch: False)
    trainer._template_context = lambda template: nullcontext()
    seen: list[Any] = []
    single = trainer._get_per_token_logps_and_entropies_single
    trainer._get_per_token_logps_and_entropies_single = lambda model, *a, **k: (
        seen.append(model) or single(model, *a, **k)
    )
    encoded = trainer._prepare_batch_inputs(samples)
    return trainer, encoded[0]['grpo_batch'], seen


@pytest.mark.parametrize('loss_type', LOSSES)
@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_without_old_log_probs_the_loss_is_the_same(loss_type, level, monkeypatch):
    found = []
    for skip in (True, False):
        model = build('Qwen2').train()
        trainer, batch, seen = prepare(
            model,
            monkeypatch,
            shared={'skip_old_logprobs': skip},
            loss_type=loss_type,
            importance_sampling_level=level,
        )
        assert (batch.old_per_token_logps is None) == skip and len(seen) == (not skip)
        torch.manual_seed(2)
        batch.advantages = torch.randn(2 * W, 1).expand_as(batch.completion_mask).double()
        loss, metrics = trainer._compute_loss_and_metrics(model, micro_batch(group_rows())[0], batch)
        loss.backward()
        found.append((loss, metrics, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, metrics, gradients), (expected, wanted_metrics, wanted) = found
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    if loss_type == 'real':  # its loss sees only ratios, which are all 1
        assert all(torch.allclose(gradients[name], wanted[name], rtol=1e-6, atol=1e-9) for name in wanted)
    else:
        assert_same_gradients(gradients, wanted, 1e-6)
    assert metrics.get('clipping') == pytest.approx(wanted_metrics.get('clipping')), loss_type


def test_old_log_probs_are_left_out_only_where_asked(monkeypatch):
    for skip in (True, False):
        _, batch, _ = prepare(build('Qwen2').train(), monkeypatch, shared={'skip_old_logprobs': skip})
        assert (batch.old_per_token_logps is None) == skip


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(num_iterations=2), 'weights move'),
        (dict(gradient_accumulation_steps=1, steps_per_generation=2), 'weights move'),
        (dict(beta=0.1, kl_in_reward=True), 'KL term'),
        (dict(_teacher_model=object()), 'teacher'),
        (dict(_is_dynamic_self_distillation=True), 'teacher'),
        (dict(rollout_importance_sampling_mode='token_truncate'), 'log-probs of the rollout'),
        (dict(log_rollout_offpolicy_metrics=True), 'log-probs of the rollout'),
        (dict(off_policy_sequence_mask_delta=0.1), 'off_policy_sequence_mask_delta'),
        (dict(use_liger_loss=True), 'liger'),
    ],
)
def test_old_log_probs_are_computed_where_something_needs_them(changes, said, lines):
    trainer = build_trainer(build('Qwen2').train(), **changes)
    samples = [SimpleNamespace(teacher_prompt='Why?' if i else None, teacher_images=None) for i in range(2)]
    assert not trainer._can_leave_out_old(samples)
    assert len(lines) == 1 and said in lines[0]
    assert build_trainer(build('Qwen2').train())._can_leave_out_old(samples)


def test_dropout_needs_old_log_probs(lines):
    assert not build_trainer(build('Qwen2', attention_dropout=0.1).train())._can_leave_out_old([])
    assert 'dropout' in lines[0]


def test_reference_log_probs_are_computed_though_old_ones_are_left_out(monkeypatch):
    model, reference = build('Qwen2').train(), build('Qwen3')
    _, batch, seen = prepare(model, monkeypatch, beta=0.1, ref_model=reference)
    assert seen == [reference] and batch.old_per_token_logps is None and batch.ref_per_token_logps is not None
    # The policy itself with its adapter switched off, as for LoRA.
    _, batch, seen = prepare(model, monkeypatch, beta=0.1, ref_adapter_name=None)
    assert seen == [model] and batch.old_per_token_logps is None and batch.ref_per_token_logps is not None


# Falling back.


def passes(trainer: Any, rows: Any = None, **inputs: Any) -> Any:
    model_inputs, batch = micro_batch(rows or group_rows(), masked=rows is None)
    result = trainer._get_per_token_logps_and_entropies(trainer.model, {**model_inputs, **inputs}, batch)[0]
    return result, batch


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(is_multimodal=True), 'multimodal'),
        (dict(use_liger_kernel=True), 'liger'),
        (dict(distributed=DistributedType.FSDP), 'FSDP'),
        (dict(template=SimpleNamespace(padding_free=False, sequence_parallel_size=2)), 'sequence_parallel'),
    ],
)
def test_options_that_have_a_path_of_their_own(changes, said, lines):
    distributed = changes.pop('distributed', DistributedType.NO)
    trainer = build_trainer(build('Qwen2'), **changes)
    trainer.accelerator.distributed_type = distributed
    sharing = trainer._find_sharing()
    assert not sharing.enabled and len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    'inputs, rows, said',
    [
        ({'pixel_values': torch.zeros(1)}, None, 'inputs besides token ids: pixel_values'),
        ({}, [(1, [1, 2, 3]), (1, [4, 5, 6])], 'shares too little'),
        ({'attention_mask': torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, [(1, [1, 2, 3, 4])] * 2, 'padding inside'),
        ({'position_ids': torch.tensor([[0, 1, 2, 9]] * 2)}, [(1, [1, 2, 3, 4])] * 2, 'positions of its own'),
    ],
)
def test_batches_that_are_computed_row_by_row(inputs, rows, said, lines):
    trainer = build_trainer(build('Qwen2'))
    if 'pixel_values' in inputs:
        trainer.model.forward = lambda pixel_values=None, forward=trainer.model.forward, **kwargs: forward(**kwargs)
    for _ in range(2):
        passes(trainer, rows, **inputs)
    assert len(lines) == 1 and said in lines[0]
    # The next batch is shared again.
    passes(trainer)
    assert 'computed over the trie' in lines[-1]


def test_a_model_that_would_not_be_exact(lines):
    trainer = build_trainer(build('Gemma2'))
    for _ in range(2):
        passes(trainer)
    assert lines == [
        'treepo: log-probs are computed row by row, not over the trie: Gemma2ForCausalLM: its attention has a soft cap.'
    ]


def test_a_difference_ends_it_for_the_run_and_is_named(lines, monkeypatch):
    """A model that looks at what was before in its row by itself, not by attention."""
    model = build('Qwen2')

    def mix(module: Any, inputs: Any, output: Any) -> Any:
        return output + output.cumsum(1) * 0.1

    model.model.embed_tokens.register_forward_hook(mix)
    trainer = build_trainer(model)
    first, batch = passes(trainer)
    again, _ = passes(trainer)
    assert torch.equal(first, again)
    plain, _ = passes(build_trainer(model, shared={'enabled': False}))
    assert torch.equal(first, plain)
    assert len(lines) == 1 and 'shares no prefixes' in lines[0] and 'differ from the plain path by up to' in lines[0]


def test_masks_that_would_take_too_much_memory(lines, monkeypatch):
    monkeypatch.setattr(attention, 'MAX_MASK_BYTES', 100)
    model = build('Qwen2')
    result, _ = passes(build_trainer(model))
    assert torch.equal(result, passes(build_trainer(model, shared={'enabled': False}))[0])
    assert len(lines) == 1 and 'no variable-length attention runs in torch.float64 here' in lines[0]
    # A batch before it fitted, and the kernel that was found then is the one that counts.
    monkeypatch.setattr(attention, 'VARLEN_DEVICES', ('cpu',))
    monkeypatch.setattr(attention, 'VARLEN_DTYPES', (torch.float64,))
    for works in (True, False):
        kind = torch.device('cpu'), torch.float64, 4, 8, 2
        monkeypatch.setattr(attention, '_varlen_works', {kind: works})
        assert attention.needs_masks(torch.device('cpu'), torch.float64) != works


def test_a_model_whose_attention_is_its_own(lines):
    model = build('Granite', logits_scaling=2.0)
    trainer = build_trainer(model)
    result, _ = passes(trainer)
    assert torch.equal(result, passes(build_trainer(model, shared={'enabled': False}))[0])
    assert 'GraniteForCausalLM: it changes its logits after the head' in lines[0]


def test_the_check_is_made_once_for_each_model(lines, monkeypatch):
    trainer = build_trainer(build('Qwen2'))
    checks = []
    check = trust.Sharing._check
    monkeypatch.setattr(trust.Sharing, '_check', lambda self, model, *a: checks.append(model) or check(self, model, *a))
    reference = build('Llama')
    for model in (trainer.model, trainer.model, reference, trainer.model, reference):
        inputs, batch = micro_batch(group_rows())
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(model, inputs, batch)
    assert checks == [trainer.model, reference]
    assert sum('computed over the trie' in line for line in lines) == 2


def test_ranks_make_the_same_number_of_forwards():
    """One has a batch that shares nothing; it goes along with the other's check."""
    calls: dict[str, int] = defaultdict(int)

    def rank(name: str, rows: Any, answers: list[list[Any]]) -> trust.Sharing:
        sharing = trust.Sharing(
            enabled=True, say=lambda line: None, warn=lambda line: None, gather=lambda mine: answers.pop(0)
        )

        def result(rows: Any = None) -> Any:
            calls[name] += 1
            return torch.ones(2, 2), None

        model = torch.nn.Linear(1, 1)
        sharing.run(model, rows, result, result, torch.ones(2, 2, dtype=torch.bool))
        return sharing

    rows = read_rows(*micro_batch(group_rows()), padding_free=False)
    rank('shares', rows, [[True, False], [None, None]])
    rank('does not', None, [[True, False], [None, None]])
    assert calls == {'shares': 3, 'does not': 3}
    assert not rank('hears of it', None, [[True, False], ['log-probs differ', None]]).enabled


def test_small_micro_batches_are_told_what_they_lose(lines):
    trainer = build_trainer(build('Qwen2').train(), per_device_train_batch_size=2)
    rows = group_rows()
    batches = [micro_batch(rows[i : i + 2], masked=False) for i in range(0, len(rows), 2)]
    trainer._say_what_micro_batches_share([{'model_inputs': inputs, 'grpo_batch': batch} for inputs, batch in batches])
    whole = len({tuple(row[: n + 1]) for _, row in rows for n in range(len(row))})
    tokens = sum(len(row) for _, row in rows)
    assert f'whole trees {tokens / whole:.2f}' in lines[0] and 'A multiple of 4' in lines[0]
    trainer.args.per_device_train_batch_size = 4
    trainer._say_what_micro_batches_share([{}, {}])
    assert len(lines) == 1
