"""What counts as an answer. Detectors read each character once, on immutable states that forks may share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from treepo_swift.config import TreeConfig
from treepo_swift.core.registry import Registry

AnswerFunction = Callable[[str], bool]
"""A user's rule: whether the response so far, given whole, holds an answer."""


class AnswerState(Protocol):
    """What a detector knows after the text so far. Immutable: paths that fork go on from the same one."""

    @property
    def found(self) -> bool:
        """Whether the text holds an answer. Once true, it stays true."""


class AnswerDetector(Protocol):
    """Looks for an answer in a text that arrives in pieces; how it is cut into pieces changes nothing."""

    def start(self) -> Any:
        """The state (`AnswerState`) before any text."""

    def feed(self, state: Any, text: str) -> Any:
        """The state after `text` has followed what led to `state`, which itself stays as it is."""


answer_detectors: Registry[Callable[[TreeConfig], AnswerDetector]] = Registry('answer detector')


def register_answer(name: str) -> Callable[[AnswerFunction], AnswerFunction]:
    """Decorator: make a plain function available as ``answer: <name>``.

    It is called at each segment boundary of a path with the path's whole response so far, until it returns True;
    from then on the path has an answer. So it sees the text up to boundaries only, and costs as much as the whole
    text each time: what needs to be faster is an `AnswerDetector`, filed with ``answer_detectors.register(name)``.
    """

    def add(function: AnswerFunction) -> AnswerFunction:
        @functools.wraps(function, assigned=('__module__', '__qualname__'))
        def make(config: TreeConfig) -> AnswerDetector:
            return WholeTextDetector(name, function)

        answer_detectors.register(name)(make)
        return function

    return add


@dataclass(frozen=True, slots=True)
class WholeTextState:
    text: str
    found: bool


class WholeTextDetector:
    """Asks a plain function about the whole text at every piece, until it says True."""

    def __init__(self, name: str, function: AnswerFunction) -> None:
        self.name = name
        self.function = function

    def start(self) -> WholeTextState:
        return WholeTextState('', False)

    def feed(self, state: WholeTextState, text: str) -> WholeTextState:
        if state.found:
            return state
        whole = state.text + text
        found = self.function(whole)
        if not isinstance(found, bool):
            # Also catches an async function, whose coroutine would always be true.
            raise TypeError(
                f'answer detector {self.name!r} ({getattr(self.function, "__name__", self.function)}): '
                f'returned {found!r}, allowed are True and False.'
            )
        return WholeTextState('' if found else whole, found)


BOXED = '\\boxed{'
_PIECE = re.compile(r'(?P<boxed>\\boxed\{)|(?P<cut>\\(?:|b|bo|box|boxe|boxed)\Z)|\\.|[{}]', re.DOTALL)
"""What matters inside a box. `cut` may become `boxed` when more text comes."""


@dataclass(frozen=True, slots=True)
class BoxedState:
    carry: str = ''
    """End of the text that can only be understood with what follows."""
    started: bool = False
    """Whether a first box was opened; nothing before it matters."""
    plain: int | None = None
    """Open plain braces inside the innermost open box that has content; None where no such box is open."""
    blank: bool = False
    """Whether a box without content (yet) is open inside that."""
    found: bool = False


class BoxedDetector:
    r"""A complete, non-empty ``\boxed{...}``: braces balanced, ``\{`` and ``\}`` not counted.

    A box that holds another box or a brace has content, so only the innermost open box can be empty, and the
    first one with content that closes is the answer: two numbers replace the stack of open braces.
    Blanks alone are no content: after ``\boxed{ }`` the search goes on.
    """

    def start(self) -> BoxedState:
        return BoxedState()

    def feed(self, state: BoxedState, text: str) -> BoxedState:
        if state.found:
            return state
        text, end = state.carry + text, 0
        plain, blank = state.plain, state.blank
        if not state.started:
            end = text.find(BOXED)
            if end < 0:
                return BoxedState(text[1 - len(BOXED) :])
            end, blank = end + len(BOXED), True
        for piece in _PIECE.finditer(text, end):
            if blank and not _is_blank(text[end : piece.start()]):
                plain, blank = 0, False
            end = piece.end()
            if piece['cut'] is not None:
                return BoxedState(piece['cut'], True, plain, blank)
            if piece[0] == '}':
                if blank:
                    blank = False
                elif plain == 0:
                    return BoxedState(found=True)
                elif plain is not None:
                    plain -= 1
                continue
            if blank:
                plain, blank = 0, False
            if piece['boxed'] is not None:
                blank = True
            elif piece[0] == '{' and plain is not None:
                plain += 1
        if blank and not _is_blank(text[end:]):
            plain, blank = 0, False
        return BoxedState('', True, plain, blank)


@dataclass(frozen=True, slots=True)
class TagState:
    carry: str = ''
    """End of the text in which the next tag may have begun."""
    inside: bool = False
    blank: bool = True
    """Whether what is known to be inside is blank so far."""
    found: bool = False


class TagDetector:
    """Text that is not blank between an opening and a closing tag, as ``<answer>(.*?)</answer>`` matches it.

    The first closing tag after an opening one ends it: tags do not nest, and an opening tag between the two is text
    like any other. After an empty or blank pair the search goes on behind its closing tag. Both tags may be the same.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self.opening = opening
        self.closing = closing

    def start(self) -> TagState:
        return TagState()

    def feed(self, state: TagState, text: str) -> TagState:
        if state.found:
            return state
        text, begin = state.carry + text, 0
        inside, blank = state.inside, state.blank
        while True:
            tag = self.closing if inside else self.opening
            at = text.find(tag, begin)
            # Without a tag, all but what may be its beginning is settled.
            settled = at if at >= 0 else max(begin, len(text) - len(tag) + 1)
            if inside:
                blank = blank and _is_blank(text[begin:settled])
            if at < 0:
                return TagState(text[settled:], inside, blank)
            if inside and not blank:
                return TagState(found=True)
            inside, blank, begin = not inside, True, at + len(tag)


@dataclass(frozen=True, slots=True)
class NeverState:
    found: bool = False


class NeverDetector:
    """No text holds an answer."""

    def start(self) -> NeverState:
        return NeverState()

    def feed(self, state: NeverState, text: str) -> NeverState:
        return state


@answer_detectors.register('boxed')
def _boxed(config: TreeConfig) -> BoxedDetector:
    return BoxedDetector()


@answer_detectors.register('tags')
def _tags(config: TreeConfig) -> TagDetector:
    return TagDetector(*config.stop.answer.tags)


@answer_detectors.register('none')
def _none(config: TreeConfig) -> NeverDetector:
    return NeverDetector()


def has_boxed_answer(text: str) -> bool:
    r"""Whether `text`, taken whole, holds a complete, non-empty ``\boxed{...}`` (see `BoxedDetector`)."""
    detector = BoxedDetector()
    return detector.feed(detector.start(), text).found


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
