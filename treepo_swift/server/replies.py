"""Turns and their replies: which tokens a hook kept, inserted or masked. The one owner of loss masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RolloutInferRequest

from treepo_swift.core.tree import Node, Path, response_ids, response_logprobs

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

    @classmethod
    def from_step(
        cls, result: Mapping[str, Any], sampled: list[int], logprobs: Sequence[float], prefix: Sequence[int]
    ) -> Reply:
        """The reply as `step` wants it: sampled tokens from its beginning, then inserted ones.

        Raises ``ValueError`` where `step` may not want that. `prefix` are the tokens with which the template begins
        every reply: swift's schedulers may write them into theirs; here they are in the prompt.
        """
        ids = _checked_ids(result.get('response_token_ids'), sampled)
        mask, kept = result.get('response_loss_mask'), _same(ids, sampled)
        if mask is None:
            mask = [1] * kept + [0] * (len(ids) - kept)
        if not isinstance(mask, list) or not all(value in (0, 1) for value in mask):
            raise ValueError(f'response_loss_mask={short(mask)}, allowed is a list of 0 and 1')
        if len(mask) != len(ids):
            raise ValueError(f'returned a response_loss_mask of {len(mask)} values for {len(ids)} response_token_ids')
        explicit = len(prefix)
        if explicit and ids[:explicit] == list(prefix) and not any(mask[:explicit]) and kept < explicit:
            ids, mask = ids[explicit:], mask[explicit:]
            kept = _same(ids, sampled)
        if any(mask[kept:]):
            raise ValueError(
                f'its response_loss_mask trains on token {mask.index(1, kept)} of response_token_ids, but only the '
                f'first {kept} were sampled'
            )
        given = result.get('rollout_logprobs')
        trained = [value for value, keep in zip(logprobs, mask) if keep]
        if given and list(given) != trained:
            raise ValueError(
                f'returned {len(given)} rollout_logprobs, which are not those of the {len(trained)} tokens that '
                'response_loss_mask trains on'
            )
        return cls(list(ids), [int(value) for value in mask], kept)

    @property
    def inserted(self) -> list[int]:
        """Tokens of `ids` that were not sampled."""
        return self.ids[self.sampled :]


def _checked_ids(ids: Any, sampled: list[int]) -> list[int]:
    ids = sampled if ids is None else ids
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f'response_token_ids={short(ids)}, allowed is a list of token ids')
    return ids


def _same(ids: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of `ids` are `sampled`, from the first on."""
    return next((i for i, (a, b) in enumerate(zip(ids, sampled)) if a != b), min(len(ids), len(sampled)))


def short(value: Any) -> str:
    """For an error: what a hook returned may be long."""
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'


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


def told_reward(ended: Turn | None) -> float | None:
    """The reward that a gym environment, or a hook that says so too, gave a trajectory with its last turn."""
    value = None if ended is None else ended.infos.get('total_reward')
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


# What is trained on.


def ended_turn(path: Path) -> Turn | None:
    """The turn with which a trajectory ended; None where no hook was asked about turns, and for placeholders."""
    assert path.stop is not None
    return None if path.stop.is_placeholder else data_of(path.leaf).ended


@dataclass(frozen=True, slots=True)
class Response:
    """All that a trajectory is trained on: a list for each of its assistant messages."""

    ids: list[list[int]]
    mask: list[list[int]]
    """Which of `ids` are trained on, 0 or 1."""
    logprobs: list[list[float]]
    """Of the tokens that are trained on."""

    @classmethod
    def of(cls, path: Path, *, prefix: Sequence[int], filler: int) -> Response:
        """`prefix` are the tokens with which the template begins every reply; `filler` is the one token of a
        placeholder, because swift needs a response to encode. Neither is trained on."""
        assert path.stop is not None
        if path.stop.is_placeholder:
            return cls([[filler]], [[0]], [[]])
        response, left = cls([], [], []), iter(response_logprobs(path.leaf))
        for replies in _messages(path):
            ids, mask, logprobs = list(prefix), [0] * len(prefix), []
            for reply in replies:
                ids += reply.ids
                mask += reply.mask
                sampled = list(islice(left, reply.sampled))
                masked = 0 in reply.mask[: reply.sampled]
                logprobs += [v for v, trained in zip(sampled, reply.mask) if trained] if masked else sampled
            response.ids.append(ids)
            response.mask.append(mask)
            response.logprobs.append(logprobs)
        return response


def loss_tokens(path: Path) -> list[int]:
    """How many tokens are trained on of each of a trajectory's segments."""
    segments = [node for node in path.leaf.lineage() if node.sampled]
    if ended_turn(path) is None:
        return [len(node.token_ids) for node in segments]
    trained = (value for replies in _messages(path) for reply in replies for value in reply.mask[: reply.sampled])
    return [sum(islice(trained, len(node.token_ids))) for node in segments]


def _messages(path: Path) -> list[list[Reply]]:
    """The replies that each assistant message of a trajectory is made of."""
    turn = ended_turn(path)
    if turn is None:
        return [[Reply.of(response_ids(path.leaf))]]
    return [replies for _, replies in turn.replies()]
