"""The number game as an environment of ms-swift, which an external plugin registers by being imported.

swift rollout ... --external_plugins number_game.py --multi_turn_scheduler gym_scheduler --use_gym_env true
"""

from __future__ import annotations

from typing import Any

from number_game_task import MAX_GUESSES, OBSERVATION, answer, read_guess
from swift.infer_engine.protocol import RolloutInferRequest
from swift.rollout.gym_env import Env, envs
from swift.template import Messages


class NumberGame(Env):
    """Reward 1 for the guess that finds the number and 0 for any other; over after MAX_GUESSES, readable or not.

    Its state is two numbers, so a deep copy of it goes its own way.
    """

    def __init__(self, env_config: dict[str, Any]) -> None:
        super().__init__(env_config)
        self.number = 0
        self.guesses_left = MAX_GUESSES

    async def reset(self, config: RolloutInferRequest) -> tuple[str, dict[str, Any], str]:
        row_config = (config.data_dict or {}).get('env_config') or self.env_config
        if 'number' not in row_config:
            raise KeyError(f'NumberGame: env_config {row_config!r} has no "number"; write it in the dataset\'s rows')
        self.number = int(row_config['number'])
        self.guesses_left = MAX_GUESSES
        return OBSERVATION, {}, ''

    async def step(self, action: Messages) -> tuple[str, float, bool, dict[str, Any]]:
        said = answer(self.number, read_guess(action[-1]['content']))
        self.guesses_left -= 1
        found = said is None
        return said or '', float(found), found or self.guesses_left == 0, {'guesses_left': self.guesses_left}

    async def close(self) -> None:
        pass


envs['number_game'] = NumberGame
