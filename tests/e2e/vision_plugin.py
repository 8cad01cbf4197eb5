"""External plugin of test_images.py, for `swift rollout` and `swift rlhf`: a scheduler, a reward, a mended template."""

from __future__ import annotations

from typing import Any

import torch
from swift.rewards import ORM, orms
from swift.rollout import multi_turns
from swift.template import Template
from swift.template.templates.idefics3 import Idefics3Template
from swift.template.utils import findall

from treepo_swift.server.scheduler import TreeRolloutScheduler

SECOND_QUESTION = '<image>And this?'


class LookTwice(TreeRolloutScheduler):
    """Two turns: the second begins with another picture, which is in the dataset's column `second`."""

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn == 2

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': SECOND_QUESTION})
        infer_request.images.append(infer_request.data_dict['second'])
        # The trainer's own sample has the first picture only.
        return {'infer_request': infer_request, 'rollout_infos': {'images': list(infer_request.images)}}


class Letters(ORM):
    """The share of letters in the last answer: a reward that a model of random weights varies."""

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def encode(template: Idefics3Template, inputs: Any) -> dict[str, Any]:
    """The trainer's `Idefics3Template._encode` for any vocabulary, any number of turns and any tokens.

    swift 4.6.0 expects the 8B model's id of `<image>` (128257), and finds the pictures' places by decoding the
    conversation and encoding it again, which gives other tokens than were sampled, and no loss mask.
    """
    encoded = Template._encode(template, inputs)
    places = findall(encoded['input_ids'], template.config.image_token_id)
    # For its log of prompts swift encodes messages without their images.
    if inputs.images:
        looks = [
            template.processor(text='<image>', images=[image], return_tensors='pt', add_special_tokens=False)
            for image in inputs.images
        ]
        tokens = [look['input_ids'][0].tolist() for _, look in zip(places, looks, strict=True)]
        encoded['input_ids'], encoded['labels'], encoded['loss_scale'] = template._extend_tokens(
            encoded['input_ids'], encoded['labels'], encoded['loss_scale'], places, tokens.__getitem__
        )
        encoded['pixel_values'] = torch.cat([look['pixel_values'] for look in looks], dim=1)
    return encoded


multi_turns['look_twice'] = LookTwice
orms['letters'] = Letters
# Not a subclass: swift pickles the template's class for the server's worker, which has no plugins yet when it reads it.
Idefics3Template._encode = encode
