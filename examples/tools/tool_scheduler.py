"""Tool calls as trees: an external plugin for `swift rollout`. Whatever the model writes is read, never run."""

from __future__ import annotations

import sys
from pathlib import Path

from swift.rollout import multi_turns

from treepo_swift import TreeRolloutScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent))
from agent_tools import parse_call, run_call
from tool_task import tools


class ToolTree(TreeRolloutScheduler):
    """A turn with a tool call is followed by the tool's result, which is masked; one without is the last.

    The result is a message of the role `tool`: swift's agent template (``--agent_template hermes``) writes it.
    """

    def check_finished(self, infer_request, response_choice, current_turn):
        no_call = parse_call(response_choice.message.content) is None
        return no_call or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request, response_choice, current_turn):
        said = run_call(parse_call(response_choice.message.content), tools())
        infer_request.messages.append({'role': 'tool', 'content': said})
        return {'infer_request': infer_request, 'rollout_infos': {f'tool_{current_turn}': said}}


multi_turns['tool_tree'] = ToolTree
