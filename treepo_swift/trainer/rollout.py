"""What the trainer asks of the rollout servers: whether they grow trees, trajectories, and log-probs after a sync."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.rlhf_trainers import VLLMInferClient

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.wire.note import REQUEST_KEY, RequestNote


def rollout_note(config: TreeConfig, *, width: int, step: int, max_steps: int, evaluates: bool) -> RequestNote:
    """What goes with every request of a rollout: trees of `width`, or independent answers for an evaluation."""
    if evaluates and not config.eval_trees:
        # The step makes the seeds of two evaluations differ; the config says how long an answer may be.
        return RequestNote(mode='independent', packed=True, config=config.to_note(), step=step)
    return RequestNote(
        packed=True,
        config=config.to_note(),
        num_generations=width,
        step=step,
        progress=min(step / max(max_steps, 1), 1.0),
    )


def probe_servers(
    client: VLLMInferClient, *, token_ids: list[int] | None = None, config: TreeConfig | None = None
) -> list[dict[str, Any] | None]:
    """One probe for each server (the client deals requests out evenly); None where it knows no probes.

    A server scores `token_ids`, and raises where it can not follow `config`.
    """
    note = RequestNote(mode='probe', token_ids=token_ids, config=None if config is None else config.to_note()).to_dict()
    request = RolloutInferRequest(messages=[{'role': 'user', 'content': 'probe'}], data_dict={REQUEST_KEY: note})
    request_config = asdict(RequestConfig(max_tokens=1, return_details=True))
    outputs = client.infer([asdict(request)] * client.num_servers, request_config, use_tqdm=False)
    return [getattr(output, 'rollout_infos', {}).get(REQUEST_KEY) for output in outputs]


def find_trees(client: VLLMInferClient) -> list[tuple[str, dict[str, Any]]]:
    """(url, engine info) of every server; empty where none grows trees."""
    answers = probe_servers(client)
    if any(answers) and not all(answers):
        plain = [url for url, answer in zip(client.base_urls, answers, strict=True) if not answer]
        raise ConfigError(
            f'Some rollout servers grow trees and others do not: {", ".join(plain)} '
            'need --multi_turn_scheduler treepo too.'
        )
    return [(url, answer['engine']) for url, answer in zip(client.base_urls, answers, strict=True) if answer]
