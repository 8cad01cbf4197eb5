"""`RequestNote`: what the trainer says with a request, in ``RolloutInferRequest.data_dict['treepo']``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treepo_swift.config import TreeConfig

REQUEST_KEY = 'treepo'
PROTOCOL = 4
"""Raised when the note or the report changes its meaning, so that mixed versions refuse each other."""

MODES = ('tree', 'independent', 'probe')
KINDS: dict[str, tuple[type, ...]] = {
    'config': (dict, type(None)),
    'num_generations': (int, type(None)),
    'step': (int,),
    'progress': (float, int),
    'copy': (int, type(None)),
    'token_ids': (list, type(None)),
    'packed': (bool,),
}
"""What a note's values may be."""


class RefusedRequest(ValueError):
    """A request that can not be served as it is; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class RequestNote:
    """The trainer's wishes for one request. The trainer is the source of truth for the config."""

    mode: str = 'tree'
    """`tree`; `independent` sampling (evaluation); `probe`: score `token_ids` and tell about the engine."""
    config: dict[str, Any] | None = None
    num_generations: int | None = None
    """Trajectories per prompt: a prompt that occurs twice in a batch makes two trees of this width."""
    step: int = 0
    """The trainer's global step: it enters the seed, so that a prompt's next tree forks elsewhere."""
    progress: float = 0.0
    """Share of the training that is done, 0 to 1: scheduled temperatures follow it."""
    copy: int | None = None
    """Which of its prompt's trees in the whole batch this one is, 0 for the first, where the batch is dealt out to
    several engines: it enters the seed. None: counted among the requests that come together."""
    token_ids: list[int] | None = None
    packed: bool = False
    """Whether the trainer takes `PackedOutputs`."""
    trace: bool = False
    """Whether the trainer writes trees to disk: a `TreeTrace` goes with the share `trace.rate` of them."""
    protocol: int = PROTOCOL

    @property
    def group_size(self) -> int | None:
        """Requests that grow together; None: all of a prompt's."""
        return 1 if self.mode == 'independent' else self.num_generations

    def to_dict(self) -> dict[str, Any]:
        """Without what is as it is by default: a note goes with every request."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {f.name: given[f.name] for f in dataclasses.fields(self) if given[f.name] != f.default}
        return {**kept, 'mode': self.mode, 'protocol': self.protocol}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestNote:
        if values.get('protocol') != PROTOCOL:
            raise RefusedRequest(
                f'The trainer speaks treepo protocol {values.get("protocol")}, this server {PROTOCOL}: '
                'install the same treepo_swift version on both sides.'
            )
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise RefusedRequest(
                f'{", ".join(map(repr, unknown))} in a treepo request, which this version does not know: install the '
                'same treepo_swift version on both sides.'
            )
        note = cls(**values)
        if note.mode not in MODES:
            raise RefusedRequest(f'mode={note.mode!r} in a treepo request: allowed are {", ".join(MODES)}.')
        for name, allowed in KINDS.items():
            value = getattr(note, name)
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise RefusedRequest(f'{name}={value!r} in a treepo request: allowed is {allowed[0].__name__}.')
        if note.num_generations is not None and note.num_generations < 1:
            raise RefusedRequest(f'num_generations={note.num_generations} in a treepo request: allowed are 1 and more.')
        if not all(type(token) is int and token >= 0 for token in note.token_ids or []):
            raise RefusedRequest('token_ids in a treepo request: allowed are token ids.')
        return note

    def tree_config(self, default: TreeConfig) -> TreeConfig:
        return default if self.config is None else TreeConfig.from_dict(self.config, where="the trainer's TreeConfig")
