"""`Setup`: the batch that is simulated, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from treepo_swift.config import TreeConfig
from treepo_swift.lab.lengths import LengthDistribution

SCHEDULES = ('independent', 'lockstep', 'stream')


@dataclass(frozen=True)
class Setup:
    """A batch of prompts on rollout servers that are all alike."""

    config: TreeConfig
    schedule: str
    """`stream` (a path is a request), `lockstep` (a segment is one), or `independent`: every answer is one request."""
    prompts: int
    width: int
    """Trajectories of a prompt."""
    prompt_tokens: int
    lengths: LengthDistribution
    """Of responses that nothing cuts short."""
    max_tokens: int = 0
    """Most tokens of a response; 0: D x S."""
    servers: int = 1
    """Prompts are dealt out to them one by one; each has an event loop of its own."""
    data_parallel: int = 1
    """Engines of a server."""
    priority: bool = False
    """Engines take the requests of the oldest tree first, otherwise in the order in which they come."""
    admission: bool = True
    """A tree waits until its expected tokens fit the KV cache."""
    max_sequences: int = 0
    """As `EngineModel.max_sequences`, and the next two likewise, where an engine was started otherwise; 0: as there."""
    kv_tokens: int = 0
    block_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f'schedule={self.schedule!r}: must be {", ".join(SCHEDULES[:-1])} or {SCHEDULES[-1]}.')
        for name in ('prompts', 'width', 'prompt_tokens', 'servers', 'data_parallel'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1.')
        for name in ('max_tokens', 'max_sequences', 'kv_tokens', 'block_size'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 0.')

    @property
    def max_response(self) -> int:
        return self.max_tokens or self.config.max_response_tokens

    @cached_property
    def tree_config(self) -> TreeConfig:
        """What a tree grows by. Independent answers are a tree of one segment that forks at the root only."""
        if self.schedule != 'independent':
            return self.config
        return TreeConfig(segment_length=self.max_response, max_depth=1, root_divergence=self.width)
