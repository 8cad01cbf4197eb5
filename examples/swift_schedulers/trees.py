"""ms-swift's own multi-turn schedulers as trees: an external plugin for `swift rollout`.

    swift rollout ... --external_plugins plugin/treepo_plugin.py examples/swift_schedulers/trees.py \
        --multi_turn_scheduler math_tips_tree --max_turns 2
"""

from __future__ import annotations

import sys
from pathlib import Path

from swift.rewards.orm import MathAccuracy
from swift.rollout import multi_turns
from swift.rollout.multi_turn import MathTipsScheduler

from treepo_swift import TreeRolloutScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
from agent_tools import calculate


class MathTipsTree(TreeRolloutScheduler, MathTipsScheduler):
    """swift's class as it is: a wrong answer is taken back, and the model goes on behind a masked doubt."""


class ThinkingTipsTree(TreeRolloutScheduler):
    """What `ThinkingModelTipsScheduler` does: a wrong answer is told once, and the model answers again.

    swift makes a sample of every round, with the thinking of earlier rounds taken out. Here a trajectory stays one
    sample with all that the model thought: taking something out would rewrite what it sampled from.
    """

    tips_prompt = 'The answer is not correct, It seems You made a mistake, you need to recheck very carefully.'

    def check_finished(self, infer_request, response_choice, current_turn):
        right = MathAccuracy()([response_choice.message.content], [infer_request.data_dict['solution']])[0]
        return right == 1 or current_turn == 2 or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request, response_choice, current_turn):
        infer_request.messages.append({'role': 'user', 'content': self.tips_prompt})
        return {'infer_request': infer_request}


class ToolCallTree(TreeRolloutScheduler):
    """What the tool-call scheduler of swift's example plugin does: ReAct, with the result in the same message.

    Generate with ``--stop_words Observation:``. Tools other than the calculator are yours to add.
    """

    def check_finished(self, infer_request, response_choice, current_turn):
        done = 'Action Input:' not in response_choice.message.content
        return done or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request, response_choice, current_turn):
        action_input = response_choice.message.content.rpartition('Action Input:')[2].partition('\n')[0]
        said = f' {calculate(action_input)}\n'
        infer_request.messages[-1]['content'] += said
        sampled, added = response_choice.token_ids, self.tokenizer.encode(said, add_special_tokens=False)
        return {
            'infer_request': infer_request,
            'response_token_ids': sampled + added,
            'response_loss_mask': [1] * len(sampled) + [0] * len(added),
            'rollout_infos': {f'tool_{current_turn}': said.strip()},
        }


multi_turns['math_tips_tree'] = MathTipsTree
multi_turns['thinking_tips_tree'] = ThinkingTipsTree
multi_turns['tool_call_tree'] = ToolCallTree
