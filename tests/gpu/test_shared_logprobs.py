"""Log-probs over a trie on CUDA, where attention is one variable-length call per layer. Needs a GPU, torch and
transformers: `python -m pytest tests/gpu`. Skipped elsewhere."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
if not torch.cuda.is_available():
    pytest.skip('needs a GPU', allow_module_level=True)

import numpy as np

from treepo_swift.trainer.shared_prefix import attention
from treepo_swift.trainer.shared_prefix.logprobs import shared_logprobs, trie_logprobs
from treepo_swift.trainer.shared_prefix.trie import build_trie

VOCABULARY = 499
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)
NAMES = ('Qwen2', 'Qwen3', 'Llama')


def build(name: str, dtype: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(**SIZES, attn_implementation='sdpa')
    model = getattr(transformers, f'{name}ForCausalLM')(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if 'norm' in parameter_name else torch.nn.init.normal_(
                parameter
            )
    return model.to('cuda', dtype).eval()


def tree_rows() -> list[list[int]]:
    """Three prompts, answers of 1 to 900 tokens that fork anywhere, a duplicate and a prefix."""
    dice = random.Random(0)
    tokens = lambda n: [dice.randrange(1, VOCABULARY) for _ in range(n)]
    rows = []
    for prompt in (tokens(70), tokens(3), tokens(128)):
        answers = [tokens(dice.randrange(100, 900))]
        for _ in range(7):
            trunk = dice.choice(answers)
            answers.append(trunk[: dice.randrange(len(trunk))] + tokens(dice.randrange(1, 400)))
        rows += [prompt + answer for answer in answers]
    return [*rows, rows[3], rows[4][:90]]


def one_by_one(model: Any, rows: list[list[int]]) -> Any:
    found = []
    for row in rows:
        ids = torch.tensor([row], device='cuda')
        table = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(table.gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def with_gradients(model: Any, logprobs: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logprobs), device='cuda', dtype=logprobs.dtype) / len(logprobs)
    (weights * logprobs).sum().backward()
    return logprobs.detach().double(), {n: p.grad.double() for n, p in model.named_parameters()}


def relative(found: Any, wanted: Any) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize('name', NAMES)
def test_float32_equals_the_plain_path(name):
    """In float32, which the variable-length kernel does not take: padded attention, on the GPU."""
    model, rows = build(name, torch.float32), tree_rows()
    wanted, gradients = with_gradients(model, one_by_one(model, rows))
    found, own = with_gradients(model, torch.cat(shared_logprobs(model, rows)))
    assert relative(found, wanted) < 1e-5
    for parameter, gradient in gradients.items():
        assert relative(own[parameter], gradient) < 1e-4, parameter


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_is_no_further_from_the_truth_than_the_plain_path(name, checkpointing):
    """The truth is the same weights in float32. The plain path rounds as well: the trie may be off by as much."""
    model, rows = build(name, torch.bfloat16), tree_rows()
    exact = build(name, torch.bfloat16).float()
    truth, true_gradients = with_gradients(exact, one_by_one(exact, rows))
    plain, plain_gradients = with_gradients(model, one_by_one(model, rows))
    if checkpointing:
        model.train().gradient_checkpointing_enable({'use_reentrant': False})
    found, gradients = with_gradients(model, torch.cat(shared_logprobs(model, rows)))
    query = torch.zeros(1, 8, 64, device='cuda', dtype=torch.bfloat16)
    assert attention.can_use_varlen(query, query[:, :2]), 'the variable-length kernel was not used'
    gaps = {'values': (relative(found, truth), relative(plain, truth))}
    for parameter, gradient in true_gradients.items():
        gaps[parameter] = relative(gradients[parameter], gradient), relative(plain_gradients[parameter], gradient)
    print(f'{name}: largest relative error {max(ours for ours, _ in gaps.values()):.2g}, '
          f'of the plain path {max(theirs for _, theirs in gaps.values()):.2g}')  # fmt: skip
    for what, (ours, theirs) in gaps.items():
        assert ours < 1.5 * theirs + 1e-3, (what, ours, theirs)


def test_a_branch_knows_nothing_of_its_siblings():
    model, rows = build('Qwen2', torch.bfloat16), tree_rows()
    changed = [*rows]
    changed[2] = rows[2][:-20] + [1] * 60
    before, after = shared_logprobs(model, rows), shared_logprobs(model, changed)
    for i in set(range(len(rows))) - {2}:
        # The same rows in other places of the batch: a kernel may sum in another order.
        torch.testing.assert_close(after[i], before[i], rtol=0.05, atol=0.05)


def test_entropies_and_a_temperature():
    model, rows = build('Qwen2', torch.float32), tree_rows()
    asked = [np.arange(1, len(row)) for row in rows]
    found, entropies = trie_logprobs(model, build_trie(rows), asked, temperature=0.7, entropies=True)
    row, start = rows[5], sum(len(r) - 1 for r in rows[:5])
    table = (model(input_ids=torch.tensor([row], device='cuda')).logits[0, :-1] / 0.7).log_softmax(-1)
    ids = torch.tensor(row[1:], device='cuda')[:, None]
    torch.testing.assert_close(found[start : start + len(row) - 1], table.gather(-1, ids)[:, 0], rtol=1e-4, atol=1e-4)
    wanted = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(entropies[start : start + len(row) - 1], wanted, rtol=1e-4, atol=1e-4)
