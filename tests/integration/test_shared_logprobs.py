"""Log-probs over a trie equal those of one row at a time: values, entropies, and the gradient of every parameter."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import numpy as np
from torch.nn.functional import scaled_dot_product_attention

from treepo_swift.trainer.shared_prefix import attention, head
from treepo_swift.trainer.shared_prefix.logprobs import shared_logprobs, trie_logprobs
from treepo_swift.trainer.shared_prefix.reasons import NotShared
from treepo_swift.trainer.shared_prefix.trie import build_trie

VOCABULARY = 23
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
MODELS = {
    'Qwen2': {},
    'Qwen3': {},
    'Llama': {},
    'Mistral': {'sliding_window': None},
    'Gemma3': {'query_pre_attn_scalar': 8, 'sliding_window': 64},
}


def build(name: str, dtype: Any = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    suffix = 'TextConfig' if name == 'Gemma3' else 'Config'
    config = getattr(transformers, f'{name}{suffix}')(**{**SIZES, **MODELS.get(name, {}), **changes})
    model = getattr(transformers, f'{name}ForCausalLM')(config).to(dtype)
    for name, parameter in model.named_parameters():
        # A random model's biases and norms must not be all alike, or nobody would miss their gradients.
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if 'norm' in name else torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms and rotary tables in float32, whatever the weights are. Here in float64."""
    monkeypatch.setattr(torch, 'float32', torch.float64)
    monkeypatch.setattr(torch, 'float', torch.float64)
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)


def assert_same_gradients(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    for parameter, gradient in found.items():
        scale = wanted[parameter].abs().max().item()
        assert scale > 0, parameter
        torch.testing.assert_close(gradient, wanted[parameter], rtol=tolerance, atol=tolerance * scale, msg=parameter)


def tree_rows(seed: int = 0) -> list[list[int]]:
    """Two prompts, answers that fork at several places; a duplicate, a prefix of another row, a placeholder."""
    dice = random.Random(seed)
    tokens = lambda n: [dice.randrange(1, VOCABULARY) for _ in range(n)]
    first, second = tokens(5), tokens(3)
    trunk = tokens(6)
    rows = [first + trunk[:cut] + tokens(length) for cut, length in ((6, 9), (6, 4), (3, 7), (0, 5))]
    rows += [second + tokens(20), second + tokens(2), [0], rows[0], rows[1][:9]]
    dice.shuffle(rows)
    return rows


def one_by_one(model: Any, rows: list[list[int]], temperature: float = 1.0) -> tuple[Any, Any]:
    """What swift computes, without padding."""
    logprobs, entropies = [], []
    for row in rows:
        ids = torch.tensor([row])
        table = (model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
        logprobs.append(table.gather(-1, ids[0, 1:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def asked_for(rows: list[list[int]]) -> list[Any]:
    return [np.arange(1, len(row)) for row in rows]


def gradients(model: Any, logprobs: Any) -> dict[str, Any]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    (weights * logprobs).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('implementation', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', MODELS)
def test_values_and_every_gradient_equal_the_plain_path(name, implementation, doubles):
    model = build(name)
    model.set_attn_implementation(implementation)
    rows = tree_rows()
    expected, entropies = one_by_one(model, rows, 0.7)
    wanted = gradients(model, expected)
    trie = build_trie(rows)
    found, found_entropies = trie_logprobs(model, trie, asked_for(rows), temperature=0.7, entropies=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_entropies, entropies, rtol=1e-9, atol=1e-12)
    assert found.requires_grad and not found_entropies.requires_grad
    assert_same_gradients(gradients(model, found), wanted, 1e-9)


@pytest.mark.parametrize('name', MODELS)
def test_stock_norms_and_rotary_tables(name):
    """In float32, with weights in float64."""
    model, rows = build(name), tree_rows(6)
    expected, _ = one_by_one(model, rows)
    wanted = gradients(model, expected)
    found = torch.cat(shared_logprobs(model, rows))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(model, found), wanted, 1e-6)


@pytest.mark.parametrize('name', ['Qwen2', 'Llama'])
def test_float32_is_as_close_as_float32_can_be(name):
    model, rows = build(name, torch.float32), tree_rows(3)
    expected, _ = one_by_one(model, rows)
    found = shared_logprobs(model, rows)
    assert [len(values) for values in found] == [len(row) - 1 for row in rows]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(4))
def test_many_trees(seed):
    model, rows = build('Qwen2', num_hidden_layers=1), [row for s in range(6) for row in tree_rows(10 * seed + s)]
    torch.testing.assert_close(torch.cat(shared_logprobs(model, rows)), one_by_one(model, rows)[0])


@pytest.mark.parametrize('name', ['Qwen3', 'Gemma3'])
def test_a_branch_knows_nothing_of_its_siblings(name):
    model, rows = build(name), [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 9], [4, 2, 3]]
    before = shared_logprobs(model, rows)
    after = shared_logprobs(model, [[1, 2, 3, 4, 10, 11, 12, 13], *rows[1:]])
    for i in range(1, 4):
        torch.testing.assert_close(after[i], before[i], rtol=1e-12, atol=1e-13)
    assert (after[0][:3] - before[0][:3]).abs().max() < 1e-12 and after[0][3] != before[0][3]


@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing(reentrant, doubles):
    model, rows = build('Qwen2').train(), tree_rows(1)
    wanted = gradients(model, one_by_one(model, rows)[0])
    model.gradient_checkpointing_enable({'use_reentrant': reentrant})
    model.enable_input_require_grads()
    found = torch.cat(shared_logprobs(model, rows))
    assert_same_gradients(gradients(model, found), wanted, 1e-9)


def test_the_head_in_pieces(monkeypatch, doubles):
    model, rows = build('Qwen2', tie_word_embeddings=True), tree_rows(2)
    expected, entropies = one_by_one(model, rows)
    wanted = gradients(model, expected)
    monkeypatch.setattr(head, 'MAX_LOGITS', 3 * VOCABULARY)
    seen = []
    piece = head.SharedHead._piece
    monkeypatch.setattr(head.SharedHead, '_piece', lambda self, h, *a: seen.append(h.shape[1]) or piece(self, h, *a))
    found, found_entropies = trie_logprobs(model, build_trie(rows), asked_for(rows), entropies=True)
    assert max(seen) == 3 and len(seen) > 10
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_entropies, entropies)
    assert_same_gradients(gradients(model, found), wanted, 1e-9)


def test_only_what_is_asked_for_reaches_the_head():
    model, rows = build('Llama'), [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]]
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
    found, _ = trie_logprobs(model, build_trie(rows), [np.array([4]), np.array([3])])
    assert sizes == [2]  # the parents: 4 of the first row, 3 of the second
    expected, _ = one_by_one(model, rows)
    torch.testing.assert_close(found, expected[[3, 6]])


def test_lora():
    peft = pytest.importorskip('peft')
    model, rows = build('Qwen2'), tree_rows(4)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=['q_proj', 'down_proj', 'lm_head'], lora_dropout=0.1)
    model = peft.get_peft_model(model, config).double()
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(NotShared, match='dropout is active .*--lora_dropout 0'):
        shared_logprobs(model.train(), rows)
    torch.testing.assert_close(torch.cat(shared_logprobs(model.eval(), rows)), one_by_one(model, rows)[0])


def test_a_forward_without_a_layout_is_what_it_was():
    model, rows = build('Qwen2'), tree_rows()
    before = one_by_one(model, rows[:2])[0]
    shared_logprobs(model, rows)
    assert torch.equal(one_by_one(model, rows[:2])[0], before)
    assert 'forward' not in model.lm_head.__dict__


@pytest.mark.parametrize(
    'name, changes, said',
    [
        ('Qwen2', {'attention_dropout': 0.1}, 'attention dropout is active'),
        ('Mistral', {'sliding_window': 8}, 'window of 8 tokens'),
        ('Qwen2', {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1}, 'window of 8 tokens'),
        ('Llama', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}}, 'rope_type dynamic'),
        ('Gemma2', {}, 'soft cap'),
        ('Granite', {'logits_scaling': 2.0}, 'changes its logits'),
        ('OPT', {'word_embed_proj_dim': 32, 'ffn_dim': 48}, 'no rotary positions'),
        ('Qwen3Next', {'layer_types': ['linear_attention', 'full_attention'], 'num_hidden_layers': 2}, 'linear_att'),
    ],
)
def test_models_that_would_not_be_exact_are_refused(name, changes, said):
    model = build(name, **changes).train()
    with pytest.raises(NotShared, match=said):
        shared_logprobs(model, tree_rows())


def test_groups_cost_no_more_than_one_call_or_one_call_each(monkeypatch):
    dice = random.Random(0)
    rows = [[0] * dice.randrange(1, 60) + [i + 1] * dice.randrange(1, 90) for i in range(40)]
    chains = build_trie(rows).chains

    def cost(groups: Any) -> int:
        return sum(
            attention.CALL_COST + len(g) * max(c.length for c in g) * max(len(c.path) for c in g) for g in groups
        )

    groups = attention.group_chains(chains)
    assert sorted(c.start for g in groups for c in g) == [c.start for c in chains]
    assert cost(groups) <= min(cost([chains]), cost([[c] for c in chains])) and 1 < len(groups) < len(chains)


@pytest.fixture
def varlen_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel of variable-length attention needs a GPU. Here its documented meaning stands in: causal, aligned at
    the end."""
    from torch.nn.attention import varlen

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
        assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
        found = []
        for i in range(len(cu_q) - 1):
            mine, seen = q[cu_q[i] : cu_q[i + 1]], slice(cu_k[i], cu_k[i + 1])
            mask = torch.ones(len(mine), len(k[seen])).tril(len(k[seen]) - len(mine)).bool()
            parts = [part.transpose(0, 1) for part in (mine, k[seen], v[seen])]
            found.append(scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa))
        return torch.cat([part.transpose(0, 1) for part in found])

    monkeypatch.setattr(varlen, 'varlen_attn', varlen_attn)
    return varlen_attn


def test_a_kernel_is_tried_outside_of_checkpointed_layers(varlen_attn, monkeypatch):
    """The trial's backward is within the first layer's forward; there it must not start a recomputation."""
    monkeypatch.setattr(attention, 'VARLEN_DEVICES', ('cpu',))
    monkeypatch.setattr(attention, 'VARLEN_DTYPES', (torch.float64,))
    monkeypatch.setattr(attention, '_varlen_works', {})
    model, rows = build('Qwen2').train(), tree_rows(5)
    model.gradient_checkpointing_enable({'use_reentrant': False})
    found = torch.cat(shared_logprobs(model, rows))
    assert list(attention._varlen_works.values()) == [True] and found.requires_grad
    torch.testing.assert_close(found, one_by_one(model, rows)[0])


def test_the_head_is_computed_once_where_its_weight_is_gone_later(monkeypatch):
    """ZeRO-3 marks its parameters with `ds_id`, and has them whole only while their module runs."""
    monkeypatch.setattr(head, 'MAX_LOGITS', 3 * VOCABULARY)
    model, rows = build('Qwen2'), tree_rows(7)
    calls: list[int] = []
    output = model.get_output_embeddings()
    forward = type(output).forward
    monkeypatch.setattr(
        type(output), 'forward', lambda self, x: (calls.append(1) if self is output else 0, forward(self, x))[1]
    )
    wanted = gradients(model, torch.cat(shared_logprobs(model, rows)))
    twice = len(calls)
    calls.clear()
    output.weight.ds_id = 0
    assert_same_gradients(gradients(model, torch.cat(shared_logprobs(model, rows))), wanted, 1e-9)
    assert len(calls) > 3 and twice == 2 * len(calls)


def test_variable_length_attention_is_asked_for_each_chain_with_its_path(varlen_attn, monkeypatch):
    from torch.nn.attention import varlen

    model, rows = build('Qwen2'), tree_rows(5)
    query, key = torch.zeros(1, 4, 8, dtype=torch.float64), torch.zeros(1, 2, 8, dtype=torch.float64)
    assert not attention.can_use_varlen(query, key) and attention._try_varlen(query, key)
    expected = shared_logprobs(model, rows)
    monkeypatch.setattr(attention, 'can_use_varlen', lambda query, key: True)
    torch.testing.assert_close(torch.cat(shared_logprobs(model, rows)), torch.cat(expected))
    # Wrong values, wrong gradients, and none at all.
    for wrong in (
        lambda *args, **kwargs: args[0],
        lambda q, k, v, *args, **kwargs: varlen_attn(q, k.detach() + 0 * k, v, *args, **kwargs),
        lambda *args, **kwargs: varlen_attn(*args, **kwargs).detach(),
    ):
        monkeypatch.setattr(varlen, 'varlen_attn', wrong)
        assert not attention._try_varlen(query, key)
