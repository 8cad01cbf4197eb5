"""The whole loop on real vLLM and the real swift CLIs, without a GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import median

import pytest
import requests
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import QUICKSTART, ROOT, run_whole
from tests.flat import flat
from treepo_swift.config import TreeConfig
from treepo_swift.trainer.weight_sync import PROBE_TEXT
from treepo_swift.wire.note import RequestNote

CONFIGS = [
    flat(segment_length=32, max_depth=4),
    # Cuts inside segments, and policies that read log-probs and entropies.
    flat(
        segment_length=32,
        max_depth=4,
        root_divergence=1,
        branching='entropy',
        branch_temperature=0.5,
        fallback='random_token',
        fallback_candidates='any',
        after_answer='cut',
    ),
    flat(
        segment_length=32,
        max_depth=4,
        root_divergence=1,
        pacing='even',
        branching='logprob',
        fallback='min_logprob_token',
        budget='by_segment_tokens',
        budget_tokens=256,
    ),
    # Forks of live paths inside segments.
    flat(
        segment_length=32,
        max_depth=4,
        root_divergence=1,
        fork_position='max_entropy_token',
        fallback='max_entropy_token',
        fallback_candidates='any',
        fallback_cuts=2,
    ),
]


def logprobs_of(model_dir: Path, ids: list[int]) -> torch.Tensor:
    """Log-probs of ids[1:] under a saved model, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return table.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def post(port: int, notes: list[dict], messages: list[str], max_tokens: int) -> list[dict]:
    body = {
        'infer_requests': [
            {'messages': [{'role': 'user', 'content': text}], 'uuid': f'r{i}', 'data_dict': {'treepo': note}}
            for i, (text, note) in enumerate(zip(messages, notes))
        ],
        'request_config': {'max_tokens': max_tokens, 'temperature': 1.0, 'return_details': True, 'logprobs': True},
    }
    response = requests.post(f'http://127.0.0.1:{port}/infer/', json=body, timeout=200)
    assert response.status_code == 200, response.text
    return response.json()


def score(port: int, ids: list[int]) -> torch.Tensor:
    note = RequestNote(mode='probe', token_ids=ids).to_dict()
    return torch.tensor(post(port, [note], ['x'], 1)[0]['rollout_infos']['treepo']['logprobs'])


def test_training_on_trees(serve, train, model, tmp_path, capsys):
    """Trees grow, train, save tokens; the server follows every weight; tokens and log-probs are exact."""
    port = serve()
    evaluation = [
        '--val_dataset',
        str(model / 'heldout.jsonl'),
        '--eval_strategy',
        'steps',
        '--eval_steps',
        '2',
        '--per_device_eval_batch_size',
        '8',
        '--num_generations_eval',
        '1',
    ]
    result = train(port, *evaluation, steps=3, SAVE_STEPS='1')
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert 'weight sync is proven' in result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert 'treepo: each prompt grows one tree of W=8 answers.' in said
    assert 'computed over the trie' in said and 'shares no prefixes' not in said
    assert 'old log-probs are computed' not in said
    out = tmp_path / 'train'
    rows = [json.loads(line) for line in (out / 'logging.jsonl').read_text().splitlines()]
    rows = [
        {k: float(v) for k, v in row.items() if k.startswith('tree/') or k in ('reward', 'step_time')}
        for row in rows
        if 'tree/decoded_tokens' in row
    ]
    assert len(rows) == 3
    assert all(row['tree/trees'] == 8 and row['tree/failures'] == 0 for row in rows)
    assert all(0 < row['tree/decoded_tokens'] < row['tree/independent_tokens'] for row in rows)
    assert all(0.2 < row['tree/prefix_hit_rate'] < 1 for row in rows)
    # Prefixes are shared in training too, and no pass is spent on old log-probs.
    assert all(row['tree/train_token_ratio'] > 1.2 and 'tree/logprob_seconds' not in row for row in rows)
    evaluated = [
        row for row in map(json.loads, (out / 'logging.jsonl').read_text().splitlines()) if 'eval_reward' in row
    ]
    assert evaluated and all(float(row['eval_tree/failures']) == 0 for row in evaluated)
    assert {key for row in evaluated for key in row if 'tree/' in key} == {'eval_tree/failures'}
    share = median(row['tree/scheduler_cpu_share'] for row in rows)
    # The first comparison finds cold caches on both sides. Once proven, not every sync is compared.
    proof = sum(row.get('tree/proof_seconds', 0.0) for row in rows[1:]) / sum(row['step_time'] for row in rows[1:])
    with capsys.disabled():
        print(
            f"\nscheduler CPU time: {share:.1%} of a rollout's wall time; weight proof: {proof:.1%} of a step; "
            f'tokens saved: {[round(row["tree/saved_fraction"], 2) for row in rows]}'
        )
    assert share < 0.05
    assert TreeConfig.from_dict(yaml.safe_load((out / 'treepo_config.yaml').read_text())).max_depth == 8

    # The evaluation after step 3 sent the last weights. Every single tensor has moved, and the server with it.
    before, after = load_file(model / 'model.safetensors'), load_file(out / 'checkpoint-3' / 'model.safetensors')
    assert set(before) == set(after) and all(not torch.equal(before[name], after[name]) for name in before)
    ids = AutoTokenizer.from_pretrained(model).encode(PROBE_TEXT)
    served = score(port, ids)
    followed = (served - logprobs_of(out / 'checkpoint-3', ids)).abs().mean()
    stale = (served - logprobs_of(out / 'checkpoint-2', ids)).abs().mean()
    assert followed < 1e-4 and stale > 100 * followed

    for config in CONFIGS:
        exact_tokens(port, out / 'checkpoint-3', config)


def exact_tokens(port: int, weights: Path, config: TreeConfig) -> None:
    """Log-probs that the server reports are those of exactly these tokens after exactly this prompt."""
    note = RequestNote(config=config.to_dict(), num_generations=4).to_dict()
    prompts = ['What is the digit sum of 1234?'] * 4 + ['Sum the digits of 4321.'] * 4
    outputs = post(port, [note] * 8, prompts, config.max_response_tokens)
    assert [o['response']['id'] for o in outputs] == [f'r{i}' for i in range(8)]
    tokenizer = AutoTokenizer.from_pretrained(weights)
    for text, output in zip(prompts, outputs):
        prompt = tokenizer.encode(f'<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n')
        (ids,) = output['response_token_ids']
        assert output['response_loss_mask'] == [[1] * len(ids)]
        assert sum(output['rollout_infos']['tree']['tokens']) == len(ids)
        expected = logprobs_of(weights, prompt + ids)[len(prompt) - 1 :]
        assert torch.allclose(torch.tensor(output['rollout_logprobs'][0]), expected, atol=1e-3)
    reports = [o['rollout_infos']['tree'] for o in outputs]
    assert len({r['id'] for r in reports[:4]}) == 1 and reports[0]['id'] != reports[4]['id']
    for a, b in itertools.combinations(range(4), 2):
        shared = sum(
            1
            for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reports[a]['nodes'], reports[b]['nodes']))
        )
        ids = [outputs[i]['response_token_ids'][0] for i in (a, b)]
        tokens = sum(reports[a]['tokens'][:shared])
        assert ids[0][:tokens] == ids[1][:tokens] and reports[b]['tokens'][:shared] == reports[a]['tokens'][:shared]
    stats = reports[0]['stats']
    # Forks inside segments share less, of answers of a segment or two perhaps nothing.
    inside = config.fork_position.policy != 'boundary'
    assert 0 < stats['decoded_tokens'] and (inside or stats['decoded_tokens'] < stats['trajectory_tokens'])


def test_mistakes_of_the_trainer_stop_the_run_and_say_why(serve, train, tmp_path):
    """One server, two broken trainers: a sync that never arrives, and no plugin."""
    port = serve()
    plugin = tmp_path / 'lost_sync.py'
    plugin.write_text(
        'from swift.rlhf_trainers.vllm_client import VLLMClient\n'
        'VLLMClient.update_flattened_params = lambda self, metadatas, flattened_tensor: None\n'
    )
    script = tmp_path / 'train_lost_sync.sh'
    text = (QUICKSTART / 'train.sh').read_text().replace('$here', str(QUICKSTART))
    script.write_text(text.replace(f'"{QUICKSTART}/reward.py"', f'"{QUICKSTART}/reward.py" "{plugin}"'))
    result = train(port, script=script, steps=6)
    said = result.stdout + result.stderr
    assert result.returncode != 0, said[-2000:]
    # Which comparison is the first to see it depends on what the server held before, and how far the first steps move.
    found = (
        'the server holds other weights than the trainer already at the first sync',
        "the server does not sample from the trainer's weights",
        'the server has stopped following the trainer',
    )
    assert any(message in said for message in found), said[-3000:]
    assert 'TREEPO_CHECKS__VERIFY_WEIGHT_SYNC' in said

    bare = tmp_path / 'cpu_only.py'
    bare.write_text('from treepo_swift.compat import cpu\ncpu.apply()\n')
    plugin = '"$(treepo-swift plugin)"'
    assert plugin in text
    script.write_text(text.replace(plugin, f'"{bare}"'))
    result = train(port, script=script, steps=1)
    said = result.stdout + result.stderr
    assert result.returncode != 0, said[-2000:]
    assert 'the trainer runs without the plugin' in said and 'flat advantages' in said


@pytest.mark.parametrize(
    'env, message',
    [
        ({'TREEPO_SEGMENT_LENGTH': '0'}, 'segment_length=0: must be greater than or equal to 1'),
        ({'TREEPO_MAX_DEPTH': '99'}, '99 x 32 = 3168 tokens is over --vllm_max_model_len = 384'),
    ],
)
def test_bad_settings_of_the_server_are_refused_before_a_model_loads(env, message, environment):
    result = run_whole(
        ['bash', str(QUICKSTART / 'rollout.sh')],
        timeout=200,
        env={**environment, **env},
    )
    said = result.stdout + result.stderr
    assert result.returncode != 0 and message in said, said[-2000:]
    assert 'Setting max_model_len' not in said  # what swift prints when it sets the engine up


def test_a_sync_engine_is_refused(environment):
    result = run_whole(
        [
            'swift',
            'rollout',
            '--model',
            environment['MODEL'],
            '--model_type',
            'qwen2',
            '--template',
            'chatml',
            '--external_plugins',
            str(ROOT / 'plugin' / 'treepo_plugin.py'),
            '--multi_turn_scheduler',
            'treepo',
            '--vllm_use_async_engine',
            'false',
        ],
        timeout=200,
        env=environment,
    )
    assert result.returncode != 0 and 'please set vllm_use_async_engine to True' in result.stdout + result.stderr
