"""What the installed ms-swift and vLLM can do, found by looking for it once, at start.

Two kinds: `Need` can't be done without and is refused by name, with the versions that have it, before a model loads.
`VllmFeatures` and `SwiftFeatures` are used where they are there; the same trees grow without them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .versions import UnsupportedVersion, installed_version


@dataclass(frozen=True, slots=True)
class Need:
    """Something of another package that trees can't do without."""

    path: str
    """``module:Name``, ``module:Class.attribute``, or with a parameter: ``module:function(parameter)``."""
    purpose: str
    """What it is needed for, after "for"."""
    package: str = 'ms-swift'
    had_by: str = '4.5.3 and newer'
    """Versions that are known to have it."""


_VLLM = {'package': 'vllm', 'had_by': '0.20.2 and newer'}

SERVER_NEEDS = (
    Need('vllm.v1.engine.async_llm:AsyncLLM.generate(priority)', 'the order of trees', **_VLLM),
    Need('vllm.v1.engine.async_llm:AsyncLLM.generate(data_parallel_rank)', 'keeping a tree on one rank', **_VLLM),
    Need('vllm.sampling_params:RequestOutputKind.DELTA', 'segments of a request that runs on', **_VLLM),
    Need('vllm.sampling_params:RequestOutputKind.FINAL_ONLY', 'segments that end a path', **_VLLM),
    Need('vllm.sampling_params:SamplingParams.prompt_logprobs', 'the proof of weight syncs', **_VLLM),
    Need('swift.rollout:multi_turns', 'registering the scheduler'),
    Need('swift.rollout.multi_turn:MultiTurnScheduler.get_response_token_data', "the exact tokens of users' turns"),
    Need('swift.rollout.multi_turn:GYMScheduler', 'gym environments'),
    Need('swift.infer_engine.protocol:RolloutInferRequest', 'requests'),
    Need('swift.infer_engine.protocol:RolloutOutput', 'answers'),
    Need('swift.utils:remove_response', 'turns'),
    Need('swift.infer_engine:GRPOVllmEngine._prepare_generation_config', 'sampling parameters'),
    Need('swift.infer_engine:GRPOVllmEngine._add_stop_words', 'stop strings'),
    Need('swift.infer_engine:GRPOVllmEngine._get_stop_token_ids', 'stop strings'),
    Need('swift.infer_engine:GRPOVllmEngine._add_request', 'images'),
    Need('swift.infer_engine:GRPOVllmEngine._add_adapter', 'LoRA'),
    Need('swift.infer_engine:GRPOVllmEngine._get_grpo_lora_request_async', 'LoRA'),
)
"""Asked for where the plugin registers."""

_TRAINER = 'swift.rlhf_trainers.grpo_trainer:GRPOTrainer'
TRAINER_NEEDS = (
    Need('swift.trainers.trainer_factory:TrainerFactory.TRAINER_MAPPING', 'registering the trainer'),
    Need('swift.trainers.trainer_factory:TrainerFactory.TRAINING_ARGS_MAPPING', 'registering the arguments'),
    Need('swift.rlhf_trainers:VLLMInferClient.infer', 'dealing whole prompts out to servers'),
    Need('swift.rlhf_trainers.rollout_mixin:DataCache', '--async_generate'),
    Need('swift.template.utils:get_token_backed_response_ids', 'training on the tokens that were sampled'),
    Need('swift.template.base:Template._add_dynamic_eos', 'the loss mask that came with a rollout'),
    Need(f'{_TRAINER}.prepare_rollout', 'finding servers that grow trees'),
    Need(f'{_TRAINER}.samples2requests', 'sending the tree config'),
    Need(f'{_TRAINER}._server_rollout', '--async_generate'),
    Need(f'{_TRAINER}._engine_infer', '--async_generate'),
    Need(f'{_TRAINER}._prefetch', '--async_generate'),
    Need(f'{_TRAINER}._infer_single_or_multi_turn', 'trees in colocate mode'),
    Need(f'{_TRAINER}._move_model_to_vllm', 'the proof of weight syncs'),
    Need(f'{_TRAINER}._setup_teacher', '--loss_type real and fipo'),
    Need(f'{_TRAINER}._compute_rewards_per_func', 'rewards of trees'),
    Need(f'{_TRAINER}._compute_advantages', 'tree advantages'),
    Need(f'{_TRAINER}._postprocess_batch', 'advantages per segment'),
    Need(f'{_TRAINER}._prepare_batch_inputs', 'shared_prefix'),
    Need(f'{_TRAINER}.null_ref_context', 'shared_prefix'),
    Need(f'{_TRAINER}._get_per_token_logps_and_entropies', 'shared_prefix'),
    Need(f'{_TRAINER}._get_per_token_logps_and_entropies_single', 'shared_prefix'),
    Need(f'{_TRAINER}.split_by_mini_batches', 'advantages per segment'),
)
"""Asked for by the trainer's arguments."""

_MEGATRON = 'swift.megatron.trainers.grpo_trainer:MegatronGRPOTrainer'
MEGATRON_NEEDS = (
    Need('swift.template.base:Template._add_dynamic_eos', 'the loss mask that came with a rollout'),
    Need('swift.megatron.utils:get_padding_to', 'the proof of weight syncs'),
    Need('swift.megatron.trainers.utils:gather_object(group)', 'advantages per segment'),
    Need(f'{_MEGATRON}._init_rollout_engine', 'finding servers that grow trees'),
    Need(f'{_MEGATRON}._setup_teacher', '--loss_type real and fipo'),
    Need(f'{_MEGATRON}.samples2requests', 'sending the tree config'),
    Need(f'{_MEGATRON}._colocate_rollout', 'trees in colocate mode'),
    Need(f'{_MEGATRON}._move_model_to_vllm', 'the proof of weight syncs'),
    Need(f'{_MEGATRON}.compute_per_token_logps', 'the proof of weight syncs'),
    Need(f'{_MEGATRON}._score_completions', 'rewards of trees'),
    Need(f'{_MEGATRON}._compute_advantages(kl_values)', 'tree advantages'),
    Need(f'{_MEGATRON}._generate_and_score_completions', 'advantages per segment'),
    Need(f'{_MEGATRON}._get_rollout_group', 'advantages per segment'),
    Need(f'{_MEGATRON}.compute_eval_metrics', 'failures of an evaluation'),
)
"""Asked for where the plugin registers in a process that has loaded Megatron-SWIFT; nowhere else."""


@dataclass(frozen=True, slots=True)
class VllmFeatures:
    """What makes a rollout cheaper, and is not in every version of vLLM."""

    stream_interval: Literal['request', 'engine', 'none']
    """Who may say that tokens come in chunks of a segment: a request (vLLM 0.27.1 and newer), only the whole engine, or
    nobody: then every token comes by itself, and costs the server's process time."""
    flat_logprobs: bool
    """Log-probs in a few lists instead of a dictionary a token."""
    skip_clone: bool
    """A request's parameters need not be copied by vLLM too."""
    token_inputs: bool
    """``{'type': 'token'}``: token ids that need no rendering."""
    metrics: bool
    """Counters of the engine that can be read in its process."""


@dataclass(frozen=True, slots=True)
class SwiftFeatures:
    """What is not in every version of ms-swift."""

    async_errors: bool
    """A rollout of ``--async_generate`` that fails is handed to all ranks (ms-swift 4.6.0 and newer)."""


@functools.cache
def vllm_features() -> VllmFeatures:
    """What the installed vLLM has."""
    by_request = _has('vllm.sampling_params:SamplingParams.stream_interval')
    by_engine = _has('vllm.v1.engine.output_processor:OutputProcessor(stream_interval)')
    return VllmFeatures(
        stream_interval='request' if by_request else 'engine' if by_engine else 'none',
        flat_logprobs=_has('vllm.sampling_params:SamplingParams.flat_logprobs'),
        skip_clone=_has('vllm.sampling_params:SamplingParams.skip_clone'),
        token_inputs=_has('vllm.inputs:tokens_input'),
        metrics=_has('vllm.v1.metrics.reader:get_metrics_snapshot'),
    )


def slow_streaming() -> str | None:
    """One sentence where this vLLM hands out every token by itself; None where it does not."""
    if vllm_features().stream_interval != 'none':
        return None
    return (
        f'vLLM {installed_version("vllm")} can not hand out tokens in chunks of a segment, so each comes by itself: '
        "the same trees, for more of the server's processor time. vLLM 0.20.2 to 0.32.0 can."
    )


@functools.cache
def swift_features() -> SwiftFeatures:
    """What the installed ms-swift has."""
    return SwiftFeatures(async_errors=_has('swift.rlhf_trainers.rollout_mixin:DataCache(error)'))


def require(needs: Iterable[Need]) -> None:
    """Raise `UnsupportedVersion` with every one of `needs` that is not there, and the versions that have it."""
    reasons = [(need, reason) for need in needs if (reason := why_missing(need.path)) is not None]
    if not reasons:
        return
    lines = [
        f'  {need.package} {installed_version(need.package)} lacks {need.path} ({reason}), needed for {need.purpose}: '
        f'{need.package} {need.had_by} have it.'
        for need, reason in reasons
    ]
    packages = dict.fromkeys(need.package for need, _ in reasons)
    raise UnsupportedVersion(
        'treepo_swift can not do without what is missing here:\n'
        + '\n'.join(lines)
        + f'\nInstall another version of {" and ".join(packages)}; docs/compatibility.md lists the pairs that were run.'
    )


def why_missing(path: str) -> str | None:
    """Why what `path` names (see `Need.path`) is not there; None where it is."""
    module, _, names = path.partition(':')
    names, _, parameter = names.removesuffix(')').partition('(')
    try:
        found: Any = importlib.import_module(module)
    except Exception as e:  # a package that is broken, by a missing library for instance, is missing too
        return f'the module does not load: {type(e).__name__}: {e}'
    for name in names.split('.'):
        try:
            found = getattr(found, name)
        except Exception as e:  # swift's and vLLM's packages import lazily
            return f'no {name!r}' if isinstance(e, AttributeError) else f'{type(e).__name__}: {e}'
    if parameter and parameter not in inspect.signature(found).parameters:
        return f'no parameter {parameter!r}'
    return None


def _has(path: str) -> bool:
    return why_missing(path) is None
