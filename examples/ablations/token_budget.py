"""A swift plugin with one callback, `token_budget`: save at marks of decoded tokens, and stop at the last.

Steps of different methods decode different amounts, so runs of equal steps are not runs of equal cost. Environment:
TOKEN_MARKS="50000,100000" (the last one ends the run), TOKEN_POINTS=file, one JSON line per mark that was passed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback
from transformers import TrainerControl, TrainerState


class TokenBudget(TrainerCallback):
    """Needs ``--logging_steps 1`` and one rollout per step: it counts what each step's log says."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self.marks = sorted(int(mark) for mark in os.environ['TOKEN_MARKS'].split(','))
        self.points = Path(os.environ['TOKEN_POINTS'])
        self.tokens = 0

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if 'completions/mean_length' not in logs:
            return  # the summary at the end of training
        # A tree server says what it decoded; without trees every token of every answer was decoded.
        plain = logs['completions/mean_length'] * args.generation_batch_size
        self.tokens += round(float(logs.get('tree/decoded_tokens', plain)))
        passed = [mark for mark in self.marks if mark <= self.tokens]
        if passed:
            self.marks = self.marks[len(passed) :]
            with self.points.open('a') as file:
                for mark in passed:
                    file.write(json.dumps({'mark': mark, 'tokens': self.tokens, 'step': state.global_step}) + '\n')
            control.should_save = True
            control.should_training_stop = not self.marks


callbacks_map['token_budget'] = TokenBudget
