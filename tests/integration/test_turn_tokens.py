"""What the engine saw is what the trainer trains on, token by token: swift's template and encoding on both sides."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest

pytest.importorskip('swift')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.model import get_processor
from swift.rl_core.data import OnPolicySample
from swift.rlhf_trainers.utils import encode_sample
from swift.rollout.multi_turn import MathTipsScheduler
from swift.template import get_template
from transformers import Qwen2Config, Qwen2Tokenizer

from tests.flat import flat
from tests.integration.fake_engine import FakeEngine
from treepo_swift.core.search import Segment
from treepo_swift.core.tree import StopReason
from treepo_swift.server.engine import Prompt
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.trainer.trees import train_on_samples_only
from treepo_swift.wire.note import RequestNote

TOOLS = [{'type': 'function', 'function': {'name': 'add', 'description': 'Adds.', 'parameters': {}}}]


@lru_cache
def make_template(agent_template: str = 'hermes') -> Any:
    words = ['user assistant system tool <tool_call> {"name": "add"} </tool_call> The answer is 7. Think again. ' * 4]
    blank = Qwen2Tokenizer(
        eos_token='<|im_end|>', pad_token='<|endoftext|>', extra_special_tokens=['<|im_start|>', '<think>']
    )
    with tempfile.TemporaryDirectory() as folder:
        blank.train_new_from_iterator(words, 320, show_progress=False).save_pretrained(folder)
        Qwen2Config(vocab_size=320, hidden_size=32, num_attention_heads=1).save_pretrained(folder)
        tokenizer = get_processor(folder, model_type='qwen2', download_model=False)
    template = get_template(tokenizer, template_type='chatml', agent_template=agent_template)
    train_on_samples_only(template)
    return template


class TemplateEngine(FakeEngine):
    """Speaks random tokens of a real tokenizer; prompts and replies go through swift's template as with vLLM."""

    def __init__(self, template: Any) -> None:
        super().__init__(speak=self._speak)
        self.template = template

    def _speak(self, context: list[int], max_tokens: int, seed: int) -> Segment:
        dice = random.Random(f'{context}{seed}')
        eos = self.template.tokenizer.eos_token_id
        ids = [dice.choice([*range(5, 300), *[eos] * 40]) for _ in range(max_tokens)]
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        return Segment(ids, [-1.0] * len(ids), StopReason.EOS if ids[-1] == eos else None)

    async def encode(self, request: RolloutInferRequest) -> Prompt:
        self.template.set_mode('vllm')
        inputs = self.template.encode(request, True)
        return Prompt(list(inputs['input_ids']), inputs)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.template.tokenizer.decode(list(token_ids))

    def completion(self, prompt: Prompt, response_ids: list[int], *, first: bool = True) -> str:
        return self.template.decode_generate_ids(
            list(response_ids), first_token=first, template_inputs=prompt.inputs['template_inputs']
        )


class Users(TreeRolloutScheduler):
    role, says = 'user', 'Think again.'

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn == 3

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': self.role, 'content': self.says})
        return {'infer_request': infer_request}


class Tools(Users):
    role, says = 'tool', '7 <|im_end|>'


class FewShot(Users):
    """Of its first turn nothing is trained on, and half of it is taken back."""

    def step(self, infer_request, response_choice, current_turn):
        if current_turn > 1:
            return super().step(infer_request, response_choice, current_turn)
        ids = response_choice.token_ids[: max(len(response_choice.token_ids) // 2, 1)]
        infer_request.messages[-1]['content'] = self.tokenizer.decode(ids)
        infer_request.messages.append({'role': 'user', 'content': self.says})
        return {'infer_request': infer_request, 'response_token_ids': ids, 'response_loss_mask': [0] * len(ids)}


class Tips(TreeRolloutScheduler, MathTipsScheduler):
    pass


@pytest.mark.parametrize('agent_template', ['hermes', 'react_en'])
@pytest.mark.parametrize('prefix', ['', '<think>\n'])
@pytest.mark.parametrize('scheduler', [Users, Tools, FewShot, Tips])
def test_the_trainer_encodes_what_the_engine_saw(scheduler, prefix, agent_template):
    template = make_template(agent_template)
    options = {'response_prefix': prefix} if prefix else {}
    engine = TemplateEngine(template)
    target = scheduler(
        segment_engine=engine,
        tokenizer=template.tokenizer,
        template=template,
        acc_function=lambda completions, solutions: [0.0],
    )
    note = RequestNote(config=flat(segment_length=8, max_depth=4, answer='none').to_dict()).to_dict()
    batch = [
        RolloutInferRequest(
            messages=[{'role': 'user', 'content': 'What is 3 + 4?'}],
            tools=TOOLS,
            uuid=f'r{index}',
            chat_template_kwargs=options,
            data_dict={'treepo': note, 'solution': '7'},
        )
        for index in range(8)
    ]
    outputs = asyncio.run(target.rollout(batch, RequestConfig(max_tokens=32, seed=3), use_tqdm=False))
    assert len({str(o.response_token_ids) for o in outputs}) > 4
    for output in outputs:
        check(template, engine, output, options)


def check(template: Any, engine: TemplateEngine, output: RolloutOutput, options: dict[str, str]) -> None:
    messages = [{'role': 'user', 'content': 'What is 3 + 4?'}]
    sample = OnPolicySample(messages=messages, tools=TOOLS, extra={'chat_template_kwargs': options} if options else {})
    sample.apply_rollout_output(rollout_output=output)
    template.set_mode('train')
    encoded = encode_sample(sample, template)
    ids, labels = list(encoded['input_ids']), list(encoded['labels'])
    trained = [token for token, label in zip(ids, labels) if label != -100]
    assert trained == [
        token
        for turn, mask in zip(output.response_token_ids, output.response_loss_mask)
        for token, kept in zip(turn, mask)
        if kept
    ]
    assert len(trained) == sum(map(len, output.rollout_logprobs)) == sum(output.rollout_infos['tree']['tokens'])
    # The last turn was sampled from exactly what stands before it.
    last = output.response_token_ids[-1]
    assert ids[-len(last) :] == last
    assert any(ids[: len(ids) - count] in engine.inputs for count in range(1, len(last) + 1))
