"""When the text of a path says that it should stop. Model output is hostile input: every check is linear in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.config.sections import LoopRepetition, NoAnswer, WindowRepetition
from treepo_swift.core.tree import Path, StopReason

from .answers import NeverDetector, answer_detectors, has_boxed_answer
from .loops import LoopDetector
from .repetition import RepetitionDetector, has_repetition

__all__ = [
    'TextChecker',
    'TextState',
    'check_text',
    'first_reason',
    'first_stop_string',
    'has_boxed_answer',
    'has_repetition',
    'text_verdict',
]


@dataclass(frozen=True, slots=True, eq=False)
class TextState:
    """What is known about a response's text so far. Immutable: paths that fork go on from the same one."""

    answer_state: Any
    """The answer detector's."""
    repetition_state: Any
    """None where repetition is not looked for."""

    @property
    def answer(self) -> bool:
        """Whether the text holds an answer."""
        return bool(self.answer_state.found)

    @property
    def repetition(self) -> bool:
        """Whether the text repeats itself."""
        return self.repetition_state is not None and self.repetition_state.found


class RepetitionRule(Protocol):
    """Looks for repetition in a text that arrives in pieces, on immutable states that forks share."""

    def start(self) -> Any:
        """The state before any text; `found` says whether the text repeats itself."""

    def feed(self, state: Any, text: str) -> Any:
        """The state after `text` has followed what led to `state`, which itself stays as it is."""


def repetition_detector(config: TreeConfig) -> RepetitionRule | None:
    """What looks for the repetition that `config` names, None for none."""
    rule = config.stop.repetition
    if isinstance(rule, LoopRepetition):
        near = rule.near_characters or None
        return LoopDetector(repeats=rule.repeats, characters=rule.characters, near_characters=near)
    if isinstance(rule, WindowRepetition):
        return RepetitionDetector(rule.length, rule.count)
    return None


def needs_eos(config: TreeConfig) -> bool:
    """Whether an answer counts only where EOS follows it."""
    return not isinstance(config.stop.answer, NoAnswer) and config.stop.answer.needs_eos


class TextChecker:
    """Looks for what `config` asks for in texts that arrive in pieces; how they are cut into pieces changes nothing.

    (But for answer functions of `register_answer`, which see the text where it is cut.)
    """

    def __init__(self, config: TreeConfig) -> None:
        name = config.stop.answer.detector
        try:
            make = answer_detectors[name]
        except ValueError as e:
            raise ConfigError(f'stop.answer.detector={name!r}: {e} `register_answer` adds your own.') from None
        self.answers = make(config)
        self.repetitions = repetition_detector(config)

    @property
    def reads_text(self) -> bool:
        """Whether anything is looked for."""
        return self.repetitions is not None or not isinstance(self.answers, NeverDetector)

    def start(self) -> TextState:
        """The state before any text."""
        return TextState(self.answers.start(), self.repetitions.start() if self.repetitions else None)

    def feed(self, state: TextState, text: str) -> TextState:
        """The state after `text` has followed what led to `state`, which itself stays as it is."""
        answer = self.answers.feed(state.answer_state, text)
        repetition = self.repetitions.feed(state.repetition_state, text) if self.repetitions else None
        return TextState(answer, repetition)


@lru_cache(maxsize=8)
def _ranks(stop_order: tuple[str, ...]) -> dict[StopReason, int]:
    return {reason: rank for rank, reason in enumerate(dict.fromkeys([*map(StopReason, stop_order), *StopReason]))}


def first_reason(reasons: Iterable[StopReason], config: TreeConfig) -> StopReason | None:
    """The one that counts of several stop reasons that hold at once, None where there is none."""
    return min(reasons, key=_ranks(config.stop.order).__getitem__, default=None)


def text_verdict(state: TextState, path: Path, config: TreeConfig) -> StopReason | None:
    """Why a path should stop by what its text checks know, None where it should not."""
    answered = state.answer and (path.stop is StopReason.EOS or not needs_eos(config))
    reasons = ([StopReason.ANSWER] if answered else []) + ([StopReason.REPETITION] if state.repetition else [])
    return first_reason(reasons, config)


def check_text(text: str, config: TreeConfig) -> StopReason | None:
    """Whether a whole response holds an answer (which comes first) or repeats itself.

    `stop.answer.needs_eos` and `stop.order` are the search's to apply: they depend on more than the text.
    """
    checker = TextChecker(config)
    state = checker.feed(checker.start(), text)
    if state.answer:
        return StopReason.ANSWER
    return StopReason.REPETITION if state.repetition else None


def first_stop_string(text: str, stops: Sequence[str]) -> str | None:
    """The stop string that is complete first in `text`, or None."""
    found = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    return min(found)[1] if found else None
