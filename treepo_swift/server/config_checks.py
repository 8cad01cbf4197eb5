"""What a config asks for and this server can not give. Raised before a tree grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.core.forks import check_policies
from treepo_swift.core.policies.stopping import TextChecker
from treepo_swift.wire.groups import Group

from .engine import EngineInfo


def check_config(
    config: TreeConfig, info: EngineInfo, max_turns: int | None, warn_once: Callable[[str, str], None]
) -> None:
    """Raise `ConfigError` or ``ValueError`` where trees of `config` can not grow here."""
    config.check_fits(info.max_model_len, '--vllm_max_model_len')
    check_named(config)
    if config.fork_at == 'turn' and config.pacing == 'even' and not max_turns:
        raise ConfigError(
            "pacing='even' with fork_at='turn': forks are spread over the turns, whose number "
            'nobody gave. Start `swift rollout` with --max_turns, or set pacing to {turn: width}.'
        )
    for key, count in config.entropy_logprobs.items():
        if count > info.max_logprobs:
            raise ConfigError(
                f'{key}={count}: this server returns at most {info.max_logprobs} log-probs per token. Lower it, or '
                'start `swift rollout` with --vllm_engine_kwargs \'{"max_logprobs": ...}\'.'
            )
    if config.segment_length % info.block_size:
        warn_once(
            'segment_length',
            f"segment_length={config.segment_length} is not a multiple of the engine's KV block of "
            f'{info.block_size} tokens: every fork computes the tokens of its last, partial block again. '
            'Set segment_length to a multiple of it, or --vllm_engine_kwargs \'{"block_size": ...}\' to a divisor.',
        )


def check_named(config: TreeConfig) -> None:
    """Raise where the config names a policy, a detector or a setting of theirs that does not exist."""
    check_policies(config)
    TextChecker(config)


def check_budget(config: TreeConfig, groups: Sequence[Group]) -> None:
    """Raise `ConfigError` where the batch's tokens do not give every tree a first segment."""
    trees = sum(len(group.members) > 1 for group in groups)
    needed = trees * config.segment_length
    budget = config.budget
    if budget.policy == 'by_segment_tokens' and budget.tokens < needed:
        raise ConfigError(
            f'budget.tokens={budget.tokens}: {trees} prompts of a batch need at least a '
            f'segment of {config.segment_length} tokens each, {needed} in all.'
        )
