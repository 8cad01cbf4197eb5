"""The text of turns, decoded once per node: what stopping rules and hooks read. The exact thing is the ids."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from treepo_swift.core.messages import Segment
from treepo_swift.core.policies.stopping import TextChecker, TextState, first_stop_string
from treepo_swift.core.tree import Node, StopReason, last_ids

from .replies import data_of

TAIL_TOKENS = 8
"""Tokens decoded again before a segment, so that characters that span segments come out whole."""


class PathReader:
    """Reads paths of one batch: its engine's `decode`, its config's checks, its stop strings."""

    def __init__(self, decode: Callable[[Sequence[int]], str], checker: TextChecker, stops: Sequence[str]) -> None:
        self._decode = decode
        self._checker = checker
        self._stops = list(stops)

    def text(self, node: Node) -> str:
        """What the turn of `node` says up to its end."""
        return ''.join(self._own(part) for part in node.lineage(since=node.turn_start))

    def state(self, node: Node) -> TextState:
        """What the text checks know of the turn at the end of `node`; each character is looked at once per node."""
        if not self._checker.reads_text:
            return self._checker.start()
        unread = []
        current = node
        while not current.begins_turn and data_of(current).text_state is None:
            unread.append(current)
            current = current.parent
        state = self._checker.start() if current.begins_turn else data_of(current).text_state
        for part in reversed(unread):
            state = data_of(part).text_state = self._checker.feed(state, self._own(part))
        return state

    def answer_length(self, leaf: Node) -> int:
        """Tokens of `leaf` up to the one that completes the answer which `leaf` brought."""
        answers, before = self._checker.answers, self.state(leaf.parent).answer_state

        def complete(count: int) -> bool:
            return answers.feed(before, self._added(leaf.parent, leaf.token_ids[:count])).found

        return min(bisect_left(range(len(leaf.token_ids)), True, key=complete), len(leaf.token_ids))

    def cut_at_stop_string(self, prefix: Node, segment: Segment) -> Segment:
        """End the segment at a stop string that began in an earlier one.

        vLLM looks for stop strings in what one request sampled, so one that spans two segments is ours to find.
        """
        reach = max(map(len, self._stops), default=0) - 1
        if reach < 1 or prefix.begins_turn:
            return segment
        seam = self._end(prefix, reach)

        def complete(count: int) -> bool:
            text = seam + self._added(prefix, segment.token_ids[:count])[:reach]
            return first_stop_string(text, self._stops) is not None

        total = len(segment.token_ids)
        if not complete(total):
            return segment
        count = next(n for n in range(1, total + 1) if complete(n))
        return replace(
            segment,
            token_ids=segment.token_ids[:count],
            logprobs=segment.logprobs[:count],
            stop=StopReason.STOP_STRING,
            entropies=segment.entropies and segment.entropies[:count],
        )

    def _end(self, node: Node, count: int) -> str:
        """The last `count` characters up to the end of `node`."""
        text, current = '', node
        while not current.begins_turn and len(text) < count:
            text, current = self._own(current) + text, current.parent
        return text[-count:]

    def _own(self, node: Node) -> str:
        """What the tokens of `node` add to the text of its turn, decoded once."""
        data = data_of(node)
        if data.text is None or data.text_start != node.parent.length:
            data.text, data.text_start = self._added(node.parent, node.token_ids), node.parent.length
        return data.text

    def _added(self, prefix: Node, token_ids: Sequence[int]) -> str:
        """What `token_ids` add to the text of the path that ends in `prefix`."""
        tail = last_ids(prefix, TAIL_TOKENS)
        before = self._decode(tail).rstrip('\ufffd')
        return self._decode(tail + list(token_ids)).rstrip('\ufffd')[len(before) :]
