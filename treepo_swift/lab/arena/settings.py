"""What an arena's YAML says: a matrix of methods, learning rates and seeds, checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, Strict, ValidationError

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.config.errors import explained
from treepo_swift.config.kinds import Flag, Name, NotNegative, Positive, Section

from .tasks import TASKS, Task

VERSION = 1
"""Of the loop: runs of another version are not taken for runs of this one."""
SEGMENT, DEPTH = 8, 14
"""S and D of trees that say nothing else."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1)]


class Pretraining(Section):
    """Sizes of the model, and how it learns the demonstrations."""

    hidden: Positive = 96
    layers: Positive = 2
    heads: Positive = 3
    steps: Positive = 300
    rows: Positive = 48
    """Demonstrations of a step."""
    lr: Rate = 0.006
    seed: NotNegative = 0


class Method(Section):
    """A way to sample the answers of a prompt and to turn rewards into advantages."""

    independent: Flag = False
    """Answers that share nothing, as in plain GRPO; `tree` may then only name an advantage."""
    tree: dict[str, Any] = {}
    """A `TreeConfig`: what differs from segments of 8 tokens, depth 14, and the package's defaults."""
    prompts: Positive | None = None
    """Of a step, where they are not the matrix's."""
    width: Positive | None = None
    """Answers a prompt where they are not the matrix's."""
    learning_rates: Rates | None = None
    """Where the matrix's do not span this method's best."""

    def config(self, task: Task, width: int) -> TreeConfig:
        """Raises `ConfigError` where the tree asks for what the arena has not."""
        # Answers end with EOS; no text ends one.
        silent = {'stop': {'answer': 'none', 'repetition': 'none'}}
        if not self.independent:
            config = TreeConfig(**{'segment_length': SEGMENT, 'max_depth': DEPTH, **silent, **self.tree})
        elif unknown := sorted(set(self.tree) - {'advantage'}):
            raise ConfigError(f'independent answers have no tree, so {", ".join(unknown)} has no effect there.')
        else:
            config = TreeConfig(
                segment_length=task.max_answer,
                max_depth=1,
                root_divergence=width,
                fallback='root',
                **silent,
                **self.tree,
            )
        if 'stop' in self.tree:
            raise ConfigError('stop has no effect in an arena: its answers end with EOS or at a limit.')
        if config.fork_at == 'turn' and not task.tool:
            raise ConfigError(f"fork_at='turn': answers of {task.name} have one turn, so that nothing would fork.")
        if config.budget.policy == 'by_segment_tokens':
            raise ConfigError('budget.policy: by_segment_tokens shares tokens between prompts; an arena does not.')
        return config


class Training(Section):
    """What all runs of a matrix have in common."""

    tokens: Positive = 150_000
    """Decoded tokens of a run: it ends with the step that reaches them."""
    marks: Positive = 6
    """How often held-out accuracy is measured after the start, at even distances of decoded tokens."""
    prompts: Positive = 8
    """Of a step."""
    width: Positive = 8
    """W, answers a prompt."""
    heldout: Positive = 256
    """Held-out problems; each is answered once."""
    loss_type: Literal['grpo', 'dapo'] = 'grpo'
    """`grpo`: mean over the tokens of an answer, then over answers (swift's default). `dapo`: mean over all tokens."""


class Matrix(Section):
    """An arena."""

    task: Name
    methods: dict[Name, Method] = Field(min_length=1)
    """By name. The first is what others are compared with: let it be plain GRPO."""
    learning_rates: Rates
    seeds: Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], ...], Field(min_length=1)]
    """Of the runs that are reported."""
    tuning_seeds: tuple[Annotated[int, Strict(), Field(ge=0)], ...] = ()
    """With them every method runs at every rate on these first, and on `seeds` only at its best."""
    training: Training = Training()
    pretraining: Pretraining = Pretraining()
    loop: Literal['fast', 'swift'] = 'fast'
    """`fast`: in this process. `swift`: each run with a `swift rollout` and a `swift rlhf` of its own."""

    def __init__(self, **values: Any) -> None:
        """Raises `ConfigError`, which names every value that is wrong and what is allowed."""
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise explained(e, type(self), values) from None
        if self.task not in TASKS:
            raise ConfigError(f'task={self.task!r}: allowed are {", ".join(TASKS)}.')
        if self.loop == 'swift' and self.the_task.tool:
            raise ConfigError(f'loop: swift: {self.task} has a tool, which only the fast loop speaks for.')
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ConfigError(f'seeds and tuning_seeds share {both}: what tunes a rate may not be reported.')
        rates = {f'methods.{name}.learning_rates': self.rates_of(name) for name in self.methods}
        for name, several in {'seeds': self.seeds, 'tuning_seeds': self.tuning_seeds, **rates}.items():
            if len(set(several)) < len(several):
                raise ConfigError(f'{name} names a value twice.')
        if not self.tuning_seeds and any(len(several) > 1 for several in rates.values()):
            raise ConfigError('Several learning_rates need tuning_seeds, on which each method chooses its own.')
        for name in self.methods:
            try:
                self.config_of(name)
            except ConfigError as e:
                raise ConfigError(f'methods.{name}: {e}') from None

    @classmethod
    def read(cls, path: Path) -> Matrix:
        """Raises `ConfigError` or ``OSError``, which name the file."""
        try:
            values = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f'{path} is no YAML: {e}') from None
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f'{path}: a matrix is a mapping with the keys {", ".join(cls.model_fields)}.')
        try:
            return cls(**values)
        except ConfigError as e:
            raise ConfigError(f'{path}: {e}') from None

    @property
    def the_task(self) -> Task:
        return TASKS[self.task]

    def training_of(self, name: str) -> Training:
        """The matrix's, with the method's own prompts and width."""
        method = self.methods[name]
        own = {'prompts': method.prompts, 'width': method.width}
        return self.training.model_copy(update={key: value for key, value in own.items() if value is not None})

    def rates_of(self, name: str) -> tuple[float, ...]:
        return self.methods[name].learning_rates or self.learning_rates

    def config_of(self, name: str) -> TreeConfig:
        return self.methods[name].config(self.the_task, self.training_of(name).width)

    def key(self, name: str) -> str:
        """Of all that a method's runs depend on but rate and seed: results with another key are another arena's."""
        config = self.config_of(name).to_dict()
        del config['faults']  # no run depends on them
        known = {
            'version': VERSION,
            'task': asdict(self.the_task),
            'config': config,
            'training': self.training_of(name).model_dump(),
            'pretraining': self.pretraining.model_dump(),
        }
        if self.loop != 'fast':
            known['loop'] = self.loop
        return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=6).hexdigest()
