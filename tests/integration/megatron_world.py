"""Megatron-SWIFT's GRPO trainer around a tiny model: its own `__init__`, rollout, weight sync, rewards and batches.

Import it where `megatron_stub` is installed. What is not swift's: model, optimizer and bridge (which exports weights);
the rollout server, whose scheduler is real and whose engine speaks by a dice and scores with the weights it was sent.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import mpu
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.megatron.arguments import MegatronRLHFArguments
from swift.megatron.trainers import base, rollout_mixin
from swift.megatron.trainers.utils import gather_object
from swift.rlhf_trainers import utils
from swift.rollout import multi_turns

from tests.integration.colocate_fakes import Llm, SwiftEngine
from tests.integration.test_turn_tokens import TemplateEngine, make_template
from treepo_swift.server.scheduler import TreeRolloutScheduler
from treepo_swift.trainer.megatron import TreeMegatronGRPOTrainer

base.warmup_jit_function = lambda config, args: None
# There is no device to wait for, and none with memory to give back.
rollout_mixin.synchronize = rollout_mixin.aggressive_empty_cache = lambda: None
utils.aggressive_empty_cache = lambda: None
multi_turns['treepo'] = TreeRolloutScheduler
VOCABULARY = 330


class Model(torch.nn.Module):
    """Says the next token by the last one: in every layout a token has the same log-prob.

    The first pipeline stage embeds and the last has the head; swift sends what is between them.
    """

    received: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)
        self.config = SimpleNamespace(params_dtype=torch.float32, num_moe_experts=None)

    def set_input_tensor(self, hidden: torch.Tensor) -> None:
        self.received = hidden

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden, self.received = self.embed(input_ids) if self.received is None else self.received, None
        return self.head(hidden) if mpu.is_pipeline_last_stage() else hidden

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            rows = self.head(self.embed(torch.tensor(ids[:-1]))).log_softmax(-1)
        return rows[range(len(ids) - 1), ids[1:]].tolist()


class Client:
    """A rollout server with one engine, through JSON as over HTTP."""

    base_urls, num_servers, enable_lora, enable_multi_turn, use_gym_env = ['http://tree'], 1, False, True, False

    def __init__(self, scheduler: type[TreeRolloutScheduler] = TreeRolloutScheduler, **options: Any) -> None:
        self.sessions = [SimpleNamespace(hooks={'response': []}, mount=lambda scheme, adapter: None, post=self._post)]
        self.hosts = ['tree']
        self.model = Model()
        self.deaf = False
        """Whether weights that are sent are lost."""
        self.requests: list[RolloutInferRequest] = []
        self.outputs: list[RolloutOutput] = []
        template = new_template()
        engine = TemplateEngine(template)
        engine.info = dataclasses.replace(engine.info, dtype='float32')
        engine.score = self._score
        self.scheduler = scheduler(
            segment_engine=engine, tokenizer=template.tokenizer, template=template, max_turns=3, **options
        )

    async def _score(self, token_ids: list[int]) -> list[float]:
        return self.model.logprobs(token_ids)

    def _post(self, url: str, json: dict[str, Any], timeout: float | None = None) -> Any:
        """What a trainer with trees asks; swift's own calls `infer`, which is the same question."""
        outputs = type(self).infer(self, json['infer_requests'], json['request_config'])
        answer = [output.model_dump(mode='json') for output in outputs]
        return SimpleNamespace(status_code=200, json=lambda: answer, url=url)

    def infer(self, infer_requests: list[Any], request_config: Any = None, use_tqdm: bool = True) -> list[Any]:
        requests = [r if isinstance(r, dict) else dataclasses.asdict(r) for r in infer_requests]
        requests = [RolloutInferRequest(**r) for r in json.loads(json.dumps(requests))]
        asked = request_config if isinstance(request_config, RequestConfig) else RequestConfig(**request_config)
        for request in requests:  # unpacked: HTTP would do it
            request.data_dict.get('treepo', {}).pop('packed', None)
        outputs = asyncio.run(self.scheduler.rollout(requests, asked, use_tqdm=False))
        if requests[0].data_dict['treepo']['mode'] != 'probe':
            self.requests += requests
            self.outputs += outputs
        return [RolloutOutput(**json.loads(json.dumps(o.model_dump(mode='json')))) for o in outputs]

    def update_flattened_params(self, metadatas: Any, flattened: torch.Tensor) -> None:
        from swift.rlhf_trainers.utils import FlattenedTensorBucket

        bucket = FlattenedTensorBucket(metadata=metadatas, flattened_tensor=flattened)
        if not self.deaf:
            self.model.load_state_dict(bucket.reconstruct_tensors())

    def _nothing(self) -> None:
        pass

    get_engine_type = reset_mm_cache = reset_prefix_cache = reset_encoder_cache = _nothing
    process_weights_after_loading = _nothing


class Bridge:
    def export_weights(self, models: list[Model], target_device: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach().clone()) for name, parameter in models[0].named_parameters())


def new_template(*, padding_free: bool = False, context: int = 1) -> Any:
    """swift's, with its own `_add_dynamic_eos`."""
    template = copy.copy(make_template())
    template.__dict__.pop('_add_dynamic_eos', None)
    template.padding_free, template.sequence_parallel_size, template.use_megatron = padding_free, context, True
    template.set_mode('train')
    return template


class Trainer(TreeMegatronGRPOTrainer):
    """Without what needs Megatron's own model."""

    def prepare_model(self) -> None:
        model = Model()
        self.unwrapped_models = self.wrapped_models = self.peft_models = [model]
        self.config, self.ref_models, self.bridge = model.config, [model], Bridge()
        self.teacher_models = None

    def get_optimizer_and_scheduler(self) -> tuple[None, None]:
        return None, None

    def _load_checkpoint(self) -> None:
        self.state.iteration = 0


def defaults() -> dict[str, Any]:
    """What swift's Megatron arguments are when nobody sets them."""
    values = {}
    for field in dataclasses.fields(MegatronRLHFArguments):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def arguments(world: int, folder: str, **changes: Any) -> SimpleNamespace:
    given = dict(
        rlhf_type='grpo',
        task_type='causal_lm',
        vllm_mode='server',
        max_completion_length=32,
        num_generations=4,
        temperature=1.0,
        micro_batch_size=1,
        global_batch_size=8,
        beta=0.0,
        loss_type='grpo',
        scale_rewards='group',
        kl_in_reward=False,
        train_iters=10,
        padding_free=False,
        check_model=False,
        callbacks=[],
        report_to=[],
        stop_words=None,
        reward_funcs=[tokens_that_are_even],
        output_dir=folder,
        model_info=SimpleNamespace(model_dir='model'),
        num_microbatches=1,
        calculate_per_token_loss=False,
    )
    args = {**defaults(), **given, **changes}
    args['generation_batch_size'], args['steps_per_generation'] = MegatronRLHFArguments.resolve_generation_batch_size(
        args['generation_batch_size'],
        args['steps_per_generation'],
        args['global_batch_size'],
        args['num_generations'],
    )
    args['per_device_generation_batch_size'] = args['generation_batch_size'] // world
    return SimpleNamespace(**args)


def tokens_that_are_even(completions: list[str], response_token_ids: list[Any], **kwargs: Any) -> list[float]:
    """A reward that any answer has, and that differs between most."""
    flat = [
        [t for turn in ids for t in turn] if ids and isinstance(ids[0], list) else ids for ids in response_token_ids
    ]
    return [round(sum(t % 2 == 0 for t in ids) / max(len(ids), 1), 2) for ids in flat]


def build(
    world: int, folder: str, *, client: Any = None, template: Any = None, cls: type[Trainer] = Trainer, **changes: Any
) -> Trainer:
    args = arguments(world, folder, **changes)
    template = template or new_template(padding_free=args.padding_free)
    trainer = cls(args, template, vllm_client=client)
    trainer.device = torch.device('cpu')
    return trainer


def prompts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {'messages': [{'role': 'user', 'content': f'What is {i} + 4?'}], 'solution': str(i + 4)}
        for i in range(first, first + count)
    ]


def step(trainer: Trainer, data: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one step, as swift's own `train_step` asks for them."""
    size = trainer.micro_batch_size
    batches = iter([list(data[i : i + size]) for i in range(0, len(data), size)])
    return list(trainer._replace_data_iterator(batches))


def learn(trainer: Trainer, batches: Sequence[dict[str, Any]], rate: float = 0.5) -> tuple[list[float], dict[str, Any]]:
    """One step down the gradient of swift's loss; the losses, and what is logged."""
    model = trainer.unwrapped_models[0]
    losses, logged = [], {}
    for data in batches:
        output, loss_of = trainer.forward_step(iter([dict(data)]), model)
        loss, metrics = loss_of(output)
        loss.backward()
        losses.append(loss.item())
        logged.update({**metrics, **logged})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    trainer.state.iteration += 1
    return losses, logged


def token_advantages(batches: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Of the loss tokens of every row that has a sample."""
    rows = []
    for data in batches:
        batch = data['grpo_batch']
        rows += [values[mask].tolist() for values, mask in zip(batch.advantages, batch.completion_mask, strict=True)]
    return rows


def files(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


class Executor:
    def __init__(self, llm: Llm) -> None:
        self.llm = llm

    @property
    def is_sleeping(self) -> bool:
        return self.llm.sleeps


class Colocated(Trainer):
    """With an engine in the process that is stepped: it speaks bytes, and scores with the weights that were loaded."""

    lost = False
    """Whether the engine gets no weights any more."""

    def _prepare_vllm_engine(self) -> Any:
        llm = Llm()
        llm.reset_mm_cache = llm.reset_prefix_cache = llm.reset_encoder_cache = lambda: None
        self.awake = {'weights', 'kv_cache'}

        def sleep(level: int) -> None:
            self.awake.clear()
            llm.sleeps = True

        def wake_up(tags: list[str]) -> None:
            self.awake.update(tags)
            llm.sleeps = len(self.awake) < 2

        llm.sleep, llm.wake_up = sleep, wake_up
        engine = SwiftEngine(llm)
        engine.template.max_length = None
        engine.inner_model_executor = Executor(llm)
        self.engine_model = Model()
        return engine

    def _plant_here(self, asked: Any) -> None:
        super()._plant_here(asked)
        self.request_config.seed = 7  # without one vLLM throws dice, and this engine repeats itself
        self.trees_here.score = self._engines_score

    def _engines_score(self, token_ids: list[int]) -> list[float]:
        assert self.awake == {'weights', 'kv_cache'}
        return self.engine_model.logprobs(token_ids)

    def _export_and_load_weights(self) -> None:
        assert 'weights' in self.awake and (self.args.sleep_level == 0 or 'kv_cache' not in self.awake)
        if not self.lost:
            self.engine_model.load_state_dict(dict(self.bridge.export_weights(self.unwrapped_models)))

    def _compute_advantages(self, samples: list[Any], rewards: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mine = [
            (s.request_id, s.rollout_infos['tree'], r, s.finish_reason, s.response_token_ids)
            for s, r in zip(samples, rewards[:, 0].tolist(), strict=True)
        ]
        self.everyone = gather_object(mine)
        self.rows = gather_object(mine, group=self._get_rollout_group())
        return super()._compute_advantages(samples, rewards, **kwargs)
