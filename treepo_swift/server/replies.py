"""Turns and their replies: which tokens a hook kept, inserted or masked. The one owner of loss masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RolloutInferRequest

from treepo_swift.core.tree import Node

from .engine import Prompt


@dataclass(frozen=True, slots=True)
class Reply:
    """What one turn added to an assistant message."""

    ids: list[int]
    """Sampled tokens, and behind them those that `step` inserted."""
    mask: list[int]
    """Which of `ids` are trained on; inserted ones never are."""
    sampled: int
    """How many of `ids` were sampled: the first ones."""

    @classmethod
    def of(cls, ids: list[int]) -> Reply:
        """What was sampled, as it is."""
        return cls(ids, [1] * len(ids), len(ids))


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that has ended, and what the next one begins with. The first turn begins with number 0, without a reply.

    `NodeData` holds it on the node at whose end a turn begins, and on the one at which a turn has ended.
    """

    number: int
    request: RolloutInferRequest
    """Its messages are text, and its uuid names the environment's state."""
    prompt: Prompt
    """Of the first turn; its engine inputs (images) are those that the next turn needs."""
    infos: dict[str, Any] = dataclasses.field(default_factory=dict)
    """``rollout_infos`` so far."""
    previous: Turn | None = None
    reply: Reply | None = None
    message: int = -1
    """Where in the messages the reply is."""
    choice: ChatCompletionResponseChoice | None = None
    """What the hooks were told, kept where turns may have to be played again."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to the reply."""
        return self.request.messages[: self.message + 1]

    @property
    def continues(self) -> bool:
        """Whether the next turn goes on in the same assistant message."""
        return self.reply is not None and self.message == len(self.request.messages) - 1

    def so_far(self) -> list[Turn]:
        """All turns with a reply, the first one first."""
        turns = []
        turn: Turn | None = self
        while turn is not None and turn.reply is not None:
            turns.append(turn)
            turn = turn.previous
        return turns[::-1]

    def replies(self) -> Iterator[tuple[int, list[Reply]]]:
        """For each assistant message that was sampled, where it is and what it is made of."""
        messages: dict[int, list[Reply]] = {}
        for turn in self.so_far():
            messages.setdefault(turn.message, []).append(turn.reply)
        yield from messages.items()

    def trained(self) -> list[int]:
        """For each token that was sampled on this path, whether it is trained on."""
        return [value for turn in self.so_far() for value in turn.reply.mask[: turn.reply.sampled]]


@dataclass(slots=True)
class NodeData:
    """What the server keeps of a node, in ``Node.data``."""

    begins: Turn | None = None
    """What the turn begins with that begins at the end of the node."""
    ended: Turn | None = None
    """The turn that ended here, whether or not another follows."""
    text: str | None = None
    """What the node's tokens add to the text of its turn, None until somebody asked (the exact thing is the ids)."""
    text_start: int = -1
    """Response tokens before `text`: where a segment was split since, the text is not the node's any more."""
    text_state: Any = None
    """What the text checks know at the end of the node, None until somebody asked."""


def data_of(node: Node) -> NodeData:
    """The server's data of a node, made where there is none yet."""
    if node.data is None:
        node.data = NodeData()
    return node.data
