"""A tiny vision-language model of random weights and pictures to show it, made on the spot: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

BOS, EOS, PAD, IMAGE = '<|begin_of_text|>', '<end_of_utterance>', '<pad>', '<image>'
AROUND, GLOBAL = '<fake_token_around_image>', '<global-img>'
SIDE, PATCH, SCALE = 56, 14, 2
IMAGE_TOKENS = (SIDE // PATCH) ** 2 // SCALE**2

QUESTION = f'{IMAGE}What is it?'
COLORS = ('red', 'lime', 'blue', 'yellow', 'black')


def make_model(folder: Path, seed: int = 0) -> None:
    """Save an Idefics3 (a SigLIP-like tower and a Llama) with its tokenizer and processor.

    This architecture works in vLLM, in transformers without torchvision, and in swift.
    """
    torch.manual_seed(seed)
    tokenizer = _make_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    # Without splitting an image is one square tile, so that nothing is padded and no attention mask is needed.
    image_processor = Idefics3ImageProcessorPil(
        size={'longest_edge': SIDE}, max_image_size={'longest_edge': SIDE}, do_image_splitting=False
    )
    processor = Idefics3Processor(image_processor=image_processor, tokenizer=tokenizer, image_seq_len=IMAGE_TOKENS)
    tower = {
        'hidden_size': 64,
        'intermediate_size': 128,
        'num_hidden_layers': 2,
        'num_attention_heads': 2,
        'image_size': SIDE,
        'patch_size': PATCH,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special,
    )
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=tower,
            text_config=text,
            scale_factor=SCALE,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            tie_word_embeddings=False,
            **special,
        )
    ).float()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            # Wide enough for an image to change what is said by more than rounding does.
            torch.nn.init.normal_(parameter, std=0.1)
    _never_say(model, tokenizer.convert_tokens_to_ids([PAD, BOS, IMAGE, AROUND, GLOBAL]))
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **special)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[PAD, BOS, EOS, IMAGE, AROUND, GLOBAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f'User:What is it?\nAssistant: It is {color}.' for color in COLORS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side='left'
    )


@torch.no_grad()
def _never_say(model: Idefics3ForConditionalGeneration, token_ids: list[int]) -> None:
    """Make tokens that stand for an image impossible to sample: the trainer would look for their images.

    Channel 0 of the residual stream is 1 at every text token, and only the head reads it, for these tokens only.
    """
    text = model.model.text_model
    text.embed_tokens.weight[:, 0] = 1
    for layer in text.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[token_ids, 0] = -100


def make_pictures(folder: Path) -> list[Path]:
    """One picture for each of COLORS."""
    folder.mkdir(parents=True)
    pictures = [folder / f'{color}.png' for color in COLORS]
    for color, picture in zip(COLORS, pictures, strict=True):
        Image.new('RGB', (48, 48), color).save(picture)
    return pictures


def make_dataset(path: Path, pictures: list[Path]) -> None:
    """Prompts that differ by their picture only: each of `pictures` but the last.

    That one is in every row's column `second`, to be shown after the first answer.
    """
    *firsts, second = map(str, pictures)
    rows = [
        {'messages': [{'role': 'user', 'content': QUESTION}], 'images': [first], 'second': second} for first in firsts
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
