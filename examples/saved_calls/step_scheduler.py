"""One step a turn, as a scheduler of ms-swift and as trees: an external plugin for `swift rollout`."""

from __future__ import annotations

import sys
from pathlib import Path

from swift.rollout import multi_turns
from swift.rollout.multi_turn import MultiTurnScheduler

from treepo_swift import TreeRolloutScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent))
from one_step_a_turn import ANSWER_NOW, GO_ON, is_boxed


class OneStep(MultiTurnScheduler):
    """Says 'Go on.' until there is an answer, and demands one before the last turn, which is ``--max_turns``."""

    def check_finished(self, infer_request, response_choice, current_turn):
        return is_boxed(response_choice.message.content) or super().check_finished(
            infer_request, response_choice, current_turn
        )

    def step(self, infer_request, response_choice, current_turn):
        is_last = current_turn + 1 == self.max_turns
        infer_request.messages.append({'role': 'user', 'content': ANSWER_NOW if is_last else GO_ON})
        return {'infer_request': infer_request}


class OneStepTree(TreeRolloutScheduler, OneStep):
    """The same turns, grown as trees."""


multi_turns['one_step'] = OneStep
multi_turns['one_step_tree'] = OneStepTree
