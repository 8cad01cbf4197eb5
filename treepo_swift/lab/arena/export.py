"""An arena's model, tokenizer and problems as files that swift and vLLM read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from .tasks import ALPHABET, EOS, PAD, Task

PAD_TOKEN, EOS_TOKEN = '<pad>', '<eos>'
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def export_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """The weights, and a tokenizer of one token a character with the ids of `tasks`; swift's template is `dummy`."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    known = {PAD_TOKEN: PAD, EOS_TOKEN: EOS} | {character: index for index, character in enumerate(ALPHABET, 2)}
    # The alphabet has no token for what is unknown; nothing but the tasks' own text is ever encoded.
    made = Tokenizer(models.WordLevel(known, unk_token=PAD_TOKEN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, chat_template=CHAT_TEMPLATE
    )


def export_problems(task: Task, seed: int, count: int, file: Path) -> None:
    """The first `count` problems that a run of `seed` trains on, in their order."""
    with file.open('w', encoding='utf-8') as rows:
        for problem in itertools.islice(task.problems('train', seed), count):
            row = {'messages': [{'role': 'user', 'content': problem.prompt}], 'solution': str(problem.solution)}
            rows.write(json.dumps(row) + '\n')
