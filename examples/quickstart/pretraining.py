"""What `make_model.py` does: a tokenizer, a small Qwen2 and its pre-training on demonstrations, single- or multi-turn.

A conversation is a list of `{'role': ..., 'content': ...}` in ms-swift's dataset format: user, assistant and tool.
"""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

START, EOS, PAD = '<|im_start|>', '<|im_end|>', '<|endoftext|>'
MAX_RESPONSE = 256
IGNORED = -100

Messages = list[dict[str, str]]
Tools = list[dict[str, Any]] | None
"""Schemas, as in the `tools` column of ms-swift's datasets."""
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`(input_ids, position_ids, labels)`, each [rows, row_tokens]; only answers carry loss."""

# No default system message, as in ms-swift's `chatml` template: training and serving must see the same prompt.
CHAT_TEMPLATE = (
    '{% for message in messages %}'
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ms-swift's agent template `hermes`: the schemas stand in a system message, a result is a user's turn.
TOOL_CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n\n\n# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{{ '</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n'
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n\' }}{% endif %}'
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Task:
    """A task module as pre-training needs it. Every module has

    `problems(split, seed)` and `distinct_problems(split, count, seed)`, of problems with a `prompt`, what the user says
    first, and a `solution`; `demonstrate(problem, rng)`, an answer or a whole conversation; and `STYLES`.

    A single-turn one has `is_correct(text, solution)` and `style_of(text)`. A multi-turn one has `reply(messages,
    problem)`, the message after an assistant's or None where the conversation is over, `succeeded(messages, problem)`
    and `style_of(messages)`. The constants and `drill` are for the modules that need them.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.is_multi_turn = hasattr(module, 'reply')
        self.problems = module.problems
        self.styles: tuple[str, ...] = module.STYLES
        self.vocab_size: int = getattr(module, 'VOCAB_SIZE', 320)
        self.steps: int = getattr(module, 'STEPS', 900)
        self.rows: int = getattr(module, 'ROWS', 4)
        self.row_tokens: int = getattr(module, 'ROW_TOKENS', 320)
        self.max_response: int = getattr(module, 'MAX_RESPONSE', MAX_RESPONSE)
        """Tokens of one turn."""
        self.p_drill: float = getattr(module, 'P_DRILL', 0.2)
        self.tools: Tools = getattr(module, 'TOOLS', None)

    @classmethod
    def load(cls, name: str) -> Task:
        """By the path of its file or by its module's name."""
        if name.endswith('.py'):
            path = Path(name).resolve()
            if not path.is_file():
                raise FileNotFoundError(f'--task {name}: there is no such file')
            sys.path.insert(0, str(path.parent))
            name = path.stem
        return cls(importlib.import_module(name))

    def demonstration(self, problem: Any, rng: random.Random) -> Messages:
        answer = self.module.demonstrate(problem, rng)
        return _single_turn(problem.prompt, answer) if isinstance(answer, str) else answer

    def conversations(self, seed: int) -> Iterator[tuple[Messages, Tools]]:
        """What the model is trained on, without end, and with which schemas; a drill is a single turn and has none."""
        rng = random.Random(f'demonstrations-{seed}')
        drill = getattr(self.module, 'drill', None)
        for problem in self.problems('pretrain', seed):
            if rng.random() < self.p_drill and drill is not None:
                yield _single_turn(self.module.DRILL_PROMPT, drill(rng)), None
            else:
                yield self.demonstration(problem, rng), self.tools

    def reply(self, messages: Messages, problem: Any) -> dict[str, str] | None:
        return self.module.reply(messages, problem) if self.is_multi_turn else None

    def succeeded(self, messages: Messages, problem: Any) -> bool:
        if self.is_multi_turn:
            return self.module.succeeded(messages, problem)
        return self.module.is_correct(messages[-1]['content'], problem.solution)

    def style_of(self, messages: Messages) -> str:
        return self.module.style_of(messages if self.is_multi_turn else messages[-1]['content'])


def _single_turn(prompt: str, answer: str) -> Messages:
    return [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]


# --- tokens ---


def make_tokenizer(task: Task, seed: int) -> Qwen2Tokenizer:
    """Byte-level BPE: ms-swift tokenizes a prompt piece by piece, and only bytes survive every way of cutting it.

    Qwen2's own rules for cutting text into words, because transformers 5 loads every tokenizer of a Qwen2 model with
    them. They keep each digit a token of its own, so that adding is the same task at every place.
    """
    blank = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD, extra_special_tokens=[START])
    blank.chat_template = TOOL_CHAT_TEMPLATE if task.tools is not None else CHAT_TEMPLATE
    rng = random.Random(f'tokenizer-{seed}')
    corpus = []
    for problem, _ in zip(task.problems('pretrain', seed), range(2000)):
        text = blank.apply_chat_template(task.demonstration(problem, rng), tools=task.tools, tokenize=False)
        corpus.append(text.replace(START, '').replace(EOS, '').removesuffix('\n'))
    tokenizer = blank.train_new_from_iterator(corpus, task.vocab_size, show_progress=False)
    tokenizer.chat_template = blank.chat_template
    return tokenizer


def encode_prompt(tokenizer: Qwen2Tokenizer, messages: Messages, tools: Tools) -> list[int]:
    """All that the model reads before its next turn."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def encode(tokenizer: Qwen2Tokenizer, messages: Messages, tools: Tools) -> tuple[list[int], list[int]]:
    """Token ids and labels. What the assistant says and the EOS after it carry loss, nothing else does."""
    ids: list[int] = []
    labels: list[int] = []
    done = ''
    for turn, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        text = tokenizer.apply_chat_template(messages[:turn], tools=tools, tokenize=False, add_generation_prompt=True)
        if not text.startswith(done):
            raise ValueError(f'the chat template rewrites the turns before message {turn}: {text!r}')
        # An answer is a piece of its own, as ms-swift cuts it: what is sampled never merges with what is around it.
        prompt = tokenizer.encode(text[len(done) :], add_special_tokens=False)
        answer = tokenizer.encode(message['content'], add_special_tokens=False) + [tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
        done = text + message['content'] + EOS
    return ids, labels


def check_tokens(folder: Path, conversations: list[tuple[Messages, Tools]]) -> None:
    """Raises unless ms-swift gives these conversations the same tokens, in training and at each turn of a rollout.

    `folder` holds the tokenizer and the model's config. ms-swift also learns to say a newline after the EOS, which a
    sampled turn never has.
    """
    from swift.model import get_processor
    from swift.template import get_template

    tokenizer = get_processor(str(folder), model_type='qwen2', download_model=False)
    template = get_template(tokenizer, template_type='chatml', agent_template='hermes')
    newline = tokenizer.encode('\n', add_special_tokens=False)

    def compare(what: str, ours: list[int], theirs: list[int]) -> None:
        if ours != theirs:
            shown = [tokenizer.decode([token for token in tokens if token >= 0]) for tokens in (ours, theirs)]
            raise ValueError(f"{what} differs from ms-swift's:\n  ours   {shown[0]!r}\n  theirs {shown[1]!r}")

    for messages, tools in conversations:
        ids, labels = encode(tokenizer, messages, tools)
        template.set_mode('train')
        encoded = template.encode({'messages': messages, 'tools': tools})
        compare('a training sequence', ids + newline, encoded['input_ids'])
        after_eos = [False] + [token == tokenizer.eos_token_id for token in encoded['labels'][:-1]]
        theirs = [IGNORED if skip else label for skip, label in zip(after_eos, encoded['labels'], strict=True)]
        compare('a label', labels + [IGNORED], theirs)
        template.set_mode('vllm')
        for turn, message in enumerate(messages):
            if message['role'] == 'assistant':
                asked = messages[:turn] + [{'role': 'assistant', 'content': None}]
                prompt = template.encode({'messages': asked, 'tools': tools})['input_ids']
                compare(f'the prompt of message {turn}', encode_prompt(tokenizer, messages[:turn], tools), prompt)
                compare(f'the training sequence up to message {turn}', ids[: len(prompt)], prompt)


# --- training ---


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    ids = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    # Heads of 32: the smallest that vLLM's CPU attention supports.
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            initializer_range=0.05,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
    return model


def make_batches(tokenizer: Qwen2Tokenizer, task: Task, *, steps: int, rows: int, seed: int) -> list[Batch]:
    """All batches of the run. Each row packs whole demonstrations, so that long and short answers share every batch
    and each token weighs the same: were batches sorted by length instead, short guesses would outweigh long counts.
    """
    stream = task.conversations(seed)
    packed: list[tuple[list[int], list[int], list[int]]] = []
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    while len(packed) < steps * rows:
        tokens, targets = encode(tokenizer, *next(stream))
        if len(tokens) > task.row_tokens:
            raise ValueError(f'a demonstration has {len(tokens)} tokens; ROW_TOKENS of its task is {task.row_tokens}')
        if len(ids) + len(tokens) > task.row_tokens:
            pad = task.row_tokens - len(ids)
            pads = [tokenizer.pad_token_id] * pad
            packed.append((ids + pads, positions + list(range(pad)), labels + [IGNORED] * pad))
            ids, positions, labels = [], [], []
        ids = ids + tokens
        positions = positions + list(range(len(tokens)))
        labels = labels + targets
    tensors = [torch.tensor(column) for column in zip(*packed, strict=True)]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def pretrain(model: Qwen2ForCausalLM, batches: list[Batch], *, lr: float) -> None:
    # Muon for the matrices: with AdamW alone, copying digits (two attention layers that must find each other) appears
    # only after two to three times as many steps.
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn='match_rms_adamw'),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    warmup = max(1, len(batches) // 30)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / len(batches))) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    smooth: float | None = None
    with tqdm(batches, desc='pre-training', unit='step') as progress:
        for input_ids, position_ids, labels in progress:
            # Positions that start again at 0 tell transformers where a demonstration ends; it masks attention across.
            loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            smooth = loss.item() if smooth is None else 0.9 * smooth + 0.1 * loss.item()
            progress.set_postfix(loss=f'{smooth:.3f}')


# --- sampling ---


@torch.inference_mode()
def generate(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """One answer a prompt at temperature 1, as token ids up to and including EOS."""
    model.eval()
    tokenizer.padding_side = 'left'
    inputs = tokenizer.pad({'input_ids': prompts}, return_tensors='pt')
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    answers = []
    for row in output[:, inputs['input_ids'].shape[1] :].tolist():
        answers.append(row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    return answers


def play(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, task: Task, problems: list[Any]
) -> tuple[list[Messages], list[list[list[int]]]]:
    """One whole conversation a problem, the open ones turn by turn together, and the token ids of the answers in it."""
    conversations: list[Messages] = [[{'role': 'user', 'content': problem.prompt}] for problem in problems]
    turns: list[list[list[int]]] = [[] for _ in problems]
    going = list(range(len(problems)))
    while going:
        prompts = [encode_prompt(tokenizer, conversations[index], task.tools) for index in going]
        answers = generate(model, tokenizer, prompts, task.max_response)
        still = []
        for index, answer in zip(going, answers, strict=True):
            messages = conversations[index]
            messages.append({'role': 'assistant', 'content': tokenizer.decode(answer, skip_special_tokens=True)})
            turns[index].append(answer)
            following = task.reply(messages, problems[index]) if answer[-1] == tokenizer.eos_token_id else None
            if following is not None:
                messages.append(following)
                still.append(index)
        going = still
    return conversations, turns
