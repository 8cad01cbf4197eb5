"""External plugin that says where a GRPO step's time goes: one JSON line a step in the file that STEP_CLOCK names.

Time is exclusive: what runs within another part counts for itself only. It works with swift's trainer and with the
trees' trainer, and changes nothing that they compute. Where STEP_ROWS names a folder, the rows of each micro-batch go
there too, as `treepo-swift bench --train --rows FILE` reads them (not with --padding_free).
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from swift.rlhf_trainers import GRPOTrainer
from transformers import TrainerCallback

PARTS = {
    '_generate_completions': 'rollout',
    '_move_model_to_vllm': 'weight sync',
    '_verify_weight_sync': 'weight proof',
    '_compute_rewards_per_func': 'rewards',
    'compute_loss': 'loss',
}


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str):
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._running[-1] if self._running else 'rest'] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """What has been counted since the last time."""
        self._turn()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def watch(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        found = getattr(owner, method, None)
        if found is None:
            return

        @wraps(found)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args)):
                return found(*args, **kwargs)

        setattr(owner, method, timed)


class WriteSteps(TrainerCallback):
    def __init__(self, clock: Clock, path: str, trainer: Any) -> None:
        self._clock, self._path, self._trainer = clock, path, trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._clock.watch(self._trainer.optimizer, 'step', 'optimizer')  # before, there is none

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with open(self._path, 'a') as file:
            file.write(json.dumps({'step': state.global_step, **self._clock.take()}) + '\n')


def watch(trainer: Any) -> None:
    clock = Clock()
    for method, part in PARTS.items():
        clock.watch(trainer, method, part)

    def log_probs(model: Any, *args: Any) -> str:
        if torch.is_grad_enabled():
            return 'policy forward'
        return 'old log-probs' if model is trainer.model and not trainer.beta else 'old and reference log-probs'

    clock.watch(trainer, '_get_per_token_logps_and_entropies_single', log_probs)
    if folder := os.environ.get('STEP_ROWS'):
        keep_rows(trainer, Path(folder))
    clock.watch(trainer.accelerator, 'backward', 'backward')
    trainer.add_callback(WriteSteps(clock, os.environ['STEP_CLOCK'], trainer))


def keep_rows(trainer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compute_loss = trainer.compute_loss

    def compute_loss_and_keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = inputs[0] if isinstance(inputs, list) else inputs
        rows = []
        trained = batch['grpo_batch'].completion_mask
        for ids, present, mask in zip(*(batch['model_inputs'][k] for k in ('input_ids', 'attention_mask')), trained):
            prompt = int(present[: -len(mask)].sum()) + int(mask.int().argmax())
            rows.append([prompt, ids[present.bool()].tolist()])
        path = folder / f'{len(list(folder.iterdir()))}.json'
        path.write_text(json.dumps(rows))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss_and_keep


train = GRPOTrainer.train


@wraps(train)
def watched_train(self: Any, *args: Any, **kwargs: Any) -> Any:
    watch(self)
    return train(self, *args, **kwargs)


GRPOTrainer.train = watched_train
