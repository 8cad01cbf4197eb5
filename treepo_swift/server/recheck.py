"""The scheduler of ms-swift's example plugin, for command lines that name it: ask again until there is an answer."""

from __future__ import annotations

from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RolloutInferRequest

from treepo_swift.core.policies.stopping import has_boxed_answer

from .scheduler import TreeRolloutScheduler


class RecheckScheduler(TreeRolloutScheduler):
    r"""A reply without a complete ``\boxed{...}`` is said to be wrong; before the last turn, an answer is demanded.

    The last turn is the sixth, or ``--max_turns`` says which.
    """

    recheck = 'The answer is not correct, It seems You made a mistake, you need to recheck very carefully.'
    demand = 'In this round of responses, you must generate an answer.'

    def __init__(self, infer_engine: Any = None, max_turns: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(infer_engine, max_turns or 6, *args, **kwargs)

    def check_finished(
        self, infer_request: RolloutInferRequest, response_choice: ChatCompletionResponseChoice, current_turn: int
    ) -> bool:
        return has_boxed_answer(response_choice.message.content)

    def step(
        self, infer_request: RolloutInferRequest, response_choice: ChatCompletionResponseChoice, current_turn: int
    ) -> dict[str, Any]:
        is_last = current_turn + 1 == self.max_turns
        infer_request.messages.append({'role': 'user', 'content': self.demand if is_last else self.recheck})
        return {'infer_request': infer_request}
