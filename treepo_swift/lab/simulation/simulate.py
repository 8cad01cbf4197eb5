"""`simulate`: one batch, from its setup to its result."""

from __future__ import annotations

import math
from dataclasses import replace

from .model import EngineModel
from .result import Result
from .server import SimulatedServer, expected_tokens
from .setup import Setup


def simulate(model: EngineModel, setup: Setup) -> Result:
    """Grow the trees of a batch on ``servers x data_parallel`` engines of one kind. One seed, one result.

    Raises:
        ValueError: the KV cache can not hold one response.
    """
    own = {name: getattr(setup, name) for name in ('max_sequences', 'kv_tokens', 'block_size') if getattr(setup, name)}
    model = replace(model, **own)
    longest = setup.prompt_tokens + setup.max_response
    if 0 < model.kv_tokens < longest:
        raise ValueError(
            f'kv_tokens={model.kv_tokens}: the KV cache must hold a prompt of {setup.prompt_tokens} and a '
            f'response of {setup.max_response} tokens, {longest} in all.'
        )
    places = _places(model, setup)
    servers = [
        SimulatedServer(model, setup, range(first, setup.prompts, setup.servers), places=places)
        for first in range(min(setup.servers, setup.prompts))
    ]
    for server in servers:
        server.run()
    return Result.of(servers, engines=setup.servers * setup.data_parallel)


def _places(model: EngineModel, setup: Setup) -> float:
    """Most trees of an engine at a time."""
    waits = setup.admission and setup.schedule != 'independent' and setup.config.budget.policy != 'by_segment_tokens'
    if not waits or not model.kv_tokens:
        return math.inf
    return max(model.kv_tokens // expected_tokens(setup), 1)
