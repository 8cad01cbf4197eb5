"""What `swift rlhf` loads for a run of an arena: the task's reward, and a callback that measures and ends the run."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.rewards import ORM, orms

from treepo_swift.lab.arena.learn import accuracy, make_engine
from treepo_swift.lab.arena.runs import RUN_VARIABLE, Marks, Point
from treepo_swift.lab.arena.settings import Training
from treepo_swift.lab.arena.tasks import EOS, TASKS, Problem, decode, reward


class ArenaReward(ORM):
    def __call__(
        self, completions: list[str], solution: list[str], response_token_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        rewards = []
        for ids, right in zip(response_token_ids, solution, strict=True):
            # One turn, which trees hold as a list of turns.
            flat = ids[0] if ids and isinstance(ids[0], list) else ids
            rewards.append(reward(Problem('', 0, int(right)), decode(flat), ended=bool(flat) and flat[-1] == EOS))
        return rewards


class ArenaCallback(TrainerCallback):
    """Counts decoded tokens; writes a point of the curve at each mark, and ends the training at the last."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        run = json.loads(os.environ[RUN_VARIABLE])
        self.seed, self.training = run['seed'], Training(**run['training'])
        self.task, self.file = TASKS[run['task']], Path(run['curve'])
        self.heldout = list(itertools.islice(self.task.problems('heldout', 0), self.training.heldout))
        self.marks = Marks(self.training.tokens, self.training.marks)
        self.decoded = self.trained = 0.0
        self.seconds = self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(Point(0, 0, 0, 0.0, self.accuracy(0)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or 'completions/mean_length' not in logs:
            return
        answers = self.training.prompts * args.num_generations
        trained = float(logs['completions/mean_length']) * answers
        self.trained += trained
        self.decoded += float(logs.get('tree/decoded_tokens', trained))
        if self.marks.passed(self.decoded):
            self.write(
                Point(
                    round(self.decoded),
                    round(self.trained),
                    state.global_step,
                    round(self.seconds, 3),
                    self.accuracy(state.global_step),
                    float(logs['reward']),
                    float(logs['frac_reward_zero_std']),
                )
            )
        if self.decoded >= self.training.tokens:
            control.should_training_stop = True

    def accuracy(self, step: int) -> float:
        """As in the fast loop, by the same engine, so that the two differ in nothing but what they train."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        try:
            engine = make_engine(model, self.task, slots=len(self.heldout))
            return accuracy(engine, self.task, self.heldout, self.seed + step)
        finally:
            model.train(training)

    def write(self, point: Point) -> None:
        with self.file.open('a', encoding='utf-8') as file:
            file.write(json.dumps(vars(point)) + '\n')


orms['treepo_arena'] = ArenaReward
callbacks_map['treepo_arena'] = ArenaCallback
