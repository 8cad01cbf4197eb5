"""Images on the real loop: one in the prompt, and another that an environment shows between two turns."""

from __future__ import annotations

import json
import os
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import requests
import torch
import yaml
from PIL import Image

pytest.importorskip(
    'transformers.models.idefics3.image_processing_pil_idefics3',
    reason='this transformers has no Idefics3 that works without torchvision, of which the model here is a tiny one',
)

from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from tests.e2e.conftest import QUICKSTART, ROOT, Service, free_port, run_whole
from tests.e2e.vision import BOS, COLORS, EOS, QUESTION, make_dataset, make_model, make_pictures
from treepo_swift.wire.note import RequestNote

CONFIG = {'segment_length': 32, 'max_depth': 2, 'fork_at': 'both', 'stop': {'answer': 'none'}}
PLUGINS = [str(ROOT / 'plugin' / 'treepo_plugin.py'), str(ROOT / 'tests' / 'e2e' / 'vision_plugin.py')]
BOTH = ['--model_type', 'idefics3', '--template', 'idefics3', '--external_plugins', *PLUGINS]
TURN = CONFIG['segment_length'] * CONFIG['max_depth']
WIDTH, PROMPTS, STEPS = 4, len(COLORS) - 1, 2


def test_trees_with_images(tmp_path: Path) -> None:
    """Engine, trainer and trees see the same images: in the prompt and those that came with a second turn."""
    model, pictures = tmp_path / 'model', make_pictures(tmp_path / 'pictures')
    make_model(model)
    make_dataset(tmp_path / 'train.jsonl', pictures)
    (tmp_path / 'tree.yaml').write_text(yaml.safe_dump(CONFIG))
    port = free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith('TREEPO_')},
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'HF_HUB_OFFLINE': '1',
        'TRANSFORMERS_OFFLINE': '1',
        'USE_HF': '1',
        # So small a model gains nothing from threads, which wait for each other where the machine is busy.
        'OMP_NUM_THREADS': '1',
        'MODEL': str(model),
        'DATASET': str(tmp_path / 'train.jsonl'),
        'OUTPUT': str(tmp_path / 'train'),
        'TREEPO_CONFIG': str(tmp_path / 'tree.yaml'),
        'PORT': str(port),
        'GROUP_PORT': str(free_port()),
        'STEPS': str(STEPS),
        'SAVE_STEPS': '1',
    }
    serve = ['bash', str(QUICKSTART / 'rollout.sh'), *BOTH, '--multi_turn_scheduler', 'look_twice']
    with Service('The rollout server', serve, log=tmp_path / 'rollout.log', env=environment) as server:
        server.wait_for_health(port, timeout=240)
        train(environment)
        check_steps(tmp_path / 'train' / 'logging.jsonl')
        # The weights of the last step were never sent: it ended there.
        check_rollouts(port, tmp_path / 'train' / f'checkpoint-{STEPS - 1}', pictures)


def train(environment: dict[str, str]) -> None:
    options = {
        'reward_funcs': 'letters',
        'num_generations': WIDTH,
        'per_device_train_batch_size': WIDTH * PROMPTS,
        'max_completion_length': TURN,
        'vllm_server_pass_dataset': 'true',
        'log_rollout_offpolicy_metrics': 'true',
    }
    flags = [word for name, value in options.items() for word in (f'--{name}', str(value))]
    command = ['bash', str(QUICKSTART / 'train.sh'), *BOTH, *flags]
    result = run_whole(command, timeout=400, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def check_steps(log: Path) -> None:
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if 'tree/trees' in row]
    assert len(rows) == STEPS
    for row in rows:
        # Prompts differ by their first picture only.
        assert row['tree/trees'] == PROMPTS and row['tree/failures'] == 0 and row['num_turns'] == 2
        assert row['tree/forks'] > 0 and row['tree/prefix_hit_rate'] > 0
        assert row['tree/decoded_tokens'] < row['tree/independent_tokens']
        # The trainer scores what was sampled with the pictures that it was sampled from. With others it is about 0.2.
        assert row['rollout_correction/log_ppl_abs_diff'] < 1e-4


def check_rollouts(port: int, weights: Path, pictures: list[Path]) -> None:
    """One text with two pictures: two trees, whose log-probs are those of the pictures that each was shown."""
    *firsts, second = pictures
    shown = [[firsts[0], second], [firsts[1], second]] * WIDTH  # taking turns: only the pictures tell them apart
    outputs = post(port, shown)
    trees = [output['rollout_infos']['tree']['id'] for output in outputs]
    assert trees == trees[:2] * WIDTH and trees[0] != trees[1]
    scorer = Scorer(weights)
    gaps = []
    for output, mine, other in zip(outputs, shown, shown[::-1], strict=True):
        assert output['rollout_infos']['images'] == [b64encode(path.read_bytes()).decode() for path in mine]
        served = [torch.tensor(values) for values in output['rollout_logprobs']]
        for turn, expected in zip(served, scorer(output, mine), strict=True):
            assert torch.allclose(turn, expected, atol=1e-4)
        # The first token of each turn, had another picture been before it.
        gaps.append(
            [
                (served[0][0] - scorer(output, [other[0], second])[0][0]).abs(),
                (served[1][0] - scorer(output, [mine[0], mine[0]])[1][0]).abs(),
            ]
        )
    # Each picture changes what is said: it reached the engine, in its place.
    assert all(mean > 0.01 for mean in torch.tensor(gaps).mean(0))


def post(port: int, shown: list[list[Path]]) -> list[dict]:
    """One conversation for each pair of pictures; all of them begin with the same text."""
    note = RequestNote(config=CONFIG, num_generations=WIDTH).to_dict()
    body = {
        'infer_requests': [
            {
                'messages': [{'role': 'user', 'content': QUESTION}],
                'images': [str(first)],
                'uuid': f'r{i}',
                'data_dict': {'treepo': note, 'second': str(second)},
            }
            for i, (first, second) in enumerate(shown)
        ],
        'request_config': {'max_tokens': TURN, 'temperature': 1.0, 'return_details': True, 'logprobs': True},
    }
    response = requests.post(f'http://127.0.0.1:{port}/infer/', json=body, timeout=200)
    assert response.status_code == 200, response.text
    return response.json()


class Scorer:
    """Log-probs by transformers."""

    def __init__(self, weights: Path) -> None:
        self._processor = Idefics3Processor.from_pretrained(weights)
        self._model = Idefics3ForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, output: dict, pictures: list[Path]) -> list[torch.Tensor]:
        """For each turn those of its tokens, each given all that was said and shown before it."""
        questions = [message['content'] for message in output['messages'] if message['role'] == 'user']
        ids, pixels, places = [], [], []
        begin = BOS
        for question, picture, reply in zip(questions, pictures, output['response_token_ids'], strict=True):
            text = f'{begin}User:{question}{EOS}\nAssistant:'
            asked = self._processor(text=text, images=[Image.open(picture)], return_tensors='pt')
            pixels.append(asked['pixel_values'])
            ids += asked['input_ids'][0].tolist()
            places.append(slice(len(ids) - 1, len(ids) - 1 + len(reply)))
            ids += reply
            # The end of a turn is written once, by the model or by the template.
            begin = '\n' if reply[-1] == self._processor.tokenizer.eos_token_id else f'{EOS}\n'
        table = self._model(input_ids=torch.tensor([ids]), pixel_values=torch.cat(pixels, dim=1)).logits[0, :-1]
        logprobs = table.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        return [logprobs[place] for place in places]
