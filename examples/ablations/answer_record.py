"""A swift plugin with one reward, `recorded_digit_sum`: the quickstart's, and a record of every trained trajectory.

A log has the stop reasons but not the last tokens: a path whose last segment holds an answer and EOS is reported as
`answer`. ANSWER_RECORD=file gets a JSON line per trajectory. Load it after the quickstart's `reward.py`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from reward import DigitSum
from swift.rewards import orms


class RecordedDigitSum(DigitSum):
    def __call__(
        self,
        completions: list[str],
        solution: list[str],
        *,
        trainer_state: Any,
        response_token_ids: list[list[list[int]]],
        rollout_infos: list[dict[str, Any]],
        **kwargs,
    ) -> list[float]:
        rewards = super().__call__(completions, solution)
        with open(os.environ['ANSWER_RECORD'], 'a') as file:
            for text, turns, infos, reward in zip(completions, response_token_ids, rollout_infos, rewards, strict=True):
                row = {
                    'step': trainer_state.global_step,
                    'stop': infos['tree']['stop'],
                    'token_ids': turns[-1],
                    'reward': reward,
                    'text': text,
                }
                file.write(json.dumps(row) + '\n')
        return rewards


orms['recorded_digit_sum'] = RecordedDigitSum
