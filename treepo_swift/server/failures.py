"""What a batch does about whatever goes wrong: one policy, from a node's deadline to the batch's one error.

1. A node has a deadline: a hook `faults.hook_timeout` from when it runs (`HookRunner`), the engine
   `faults.stall_timeout` without a word to anybody (`Silence`).
2. What the engine could not give is asked for again, as a new request with a new id, at most `faults.max_retries` times
   in a row (`FailurePolicy.segments`, `score`). Hooks are not asked again: they may have changed something.
3. What fails for good is a `NodeFailure`. It costs its tree that path, and the search grows another from a healthy
   sibling (`TreeSearch.fail`).
4. What can't be grown at all becomes a masked placeholder, which is in no baseline (`TreeSearch.give_up`).
5. Where more than `faults.max_failure_fraction` of a batch are such, it ends with one error that counts the causes,
   each with its owner and what to do (`FailurePolicy.check`).

Only two things end a batch at once: an engine that is gone (`EngineGone`), and hooks that hang in numbers
(`HungHooksError`).
"""

from __future__ import annotations

import asyncio
import math
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from pathlib import Path

from treepo_swift.config import ConfigError
from treepo_swift.config.sections import Faults
from treepo_swift.core.failure import NodeFailure
from treepo_swift.core.inert import inert
from treepo_swift.core.messages import Segment
from treepo_swift.core.search import TreeSearch
from treepo_swift.core.tree import StopReason
from treepo_swift.wire.note import RefusedRequest

from .engine import EngineError, EngineGone, SegmentEngine
from .hooks import HookRunner, HungHooksError
from .silence import EngineSilent, Silence

SHOWN = 3
"""Kinds that a message names."""
UNKNOWN = 'a tree gave up'


class RolloutError(RuntimeError):
    """A rollout that can not be delivered; the message says why and what to do."""


EXPECTED = (RolloutError, EngineGone, HungHooksError, NodeFailure, ConfigError, RefusedRequest)
"""Whose messages say all that there is to say."""


class FailurePolicy:
    """Of one batch."""

    def __init__(
        self,
        faults: Faults,
        *,
        engine: SegmentEngine,
        hooks: HookRunner,
        warn_once: Callable[[str, str], None],
        watches_engine: bool = True,
    ) -> None:
        """`warn_once(kind, message)` logs the first message of a kind, at once. `watches_engine` is false where
        somebody else ends what stands still."""
        self._faults = faults
        self._hooks = hooks
        self._warn_once = warn_once
        self._watches_engine = watches_engine
        self._segments = 0
        self._silence = Silence(faults.stall_timeout, lambda: self._segments + engine.answers)
        self._paths: Counter[str] = Counter()
        self._trajectories: Counter[str] = Counter()
        self._examples: dict[str, NodeFailure] = {}
        """The first of each kind."""
        self._kinds: dict[str, str] = {}
        """Of all messages of this batch."""

    # Deadlines and retries.

    def watching(self) -> AbstractAsyncContextManager[None]:
        """Within the block nodes have their deadline."""
        return self._silence.watched() if self._watches_engine else nullcontext()

    async def segments(
        self, ask: Callable[[int], AsyncGenerator[Segment, None]], max_tokens: int
    ) -> AsyncGenerator[Segment, None]:
        """`max_tokens` of the engine: ``ask(tokens)`` makes a new request for what is still missing.

        Raises:
            EngineError: it failed once more often than it may in a row.
            EngineGone: there is nobody to ask again.
        """
        left, errors = max_tokens, 0
        while left:
            try:
                async with aclosing(ask(left)) as stream:
                    while (segment := await self._silence.next_of(stream)) is not None:
                        check_segment(segment, left)
                        self._segments += 1
                        errors = 0
                        left -= len(segment.token_ids)
                        yield segment
                if left:
                    raise EngineError('the engine ended a request before its path had ended')
            except EngineGone:
                raise
            except (Exception, asyncio.CancelledError) as e:
                error = self._engine_error(e)
                errors += 1
                if errors > self._faults.max_retries:
                    tried = f'{error} (after {errors} attempts)' if errors > 1 else str(error)
                    raise EngineError(tried, kind=error.kind, remedy=error.remedy) from e

    def _engine_error(self, error: BaseException) -> EngineError:
        """What a request raised, as the engine's failure; our own cancellation is none."""
        if isinstance(error, EngineError):
            return error
        if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
            raise error
        if isinstance(error, EngineSilent):
            return EngineError(
                f'the engine has said nothing to anybody for faults.stall_timeout={self._faults.stall_timeout:g} s',
                kind='the engine fell silent',
                remedy='See in the log of the engine what it does, and restart it. Where it only is that slow, raise '
                'faults.stall_timeout.',
            )
        name = type(error).__name__
        return EngineError(f'the engine raised {name}: {error}', kind=f'the engine raised {name}')

    # Keeping count.

    def path_failed(self, failure: NodeFailure) -> None:
        """A path failed, or could not begin. Raises `HungHooksError` where so many hooks hang that the batch ends."""
        self._add(failure)
        self.tell_hung()
        self._hooks.check_hung(self._faults.max_hung_hooks)

    def release_failed(self, failure: NodeFailure) -> None:
        """A state's end hurts no path any more."""
        self._warn_once(failure.kind, str(failure))
        self.tell_hung()

    def tree_ended(self, search: TreeSearch) -> None:
        """Count the trajectories that it does not have."""
        if search.failure is not None and str(search.failure) not in self._kinds:
            self._add(search.failure)
        for path in search.tree.trajectories:
            if path.stop is StopReason.FAILED:
                message = path.error or ''
                if search.last_error and message.endswith(search.last_error):
                    message = search.last_error
                self._trajectories[self._kinds.get(message, UNKNOWN)] += 1

    def tell_hung(self) -> None:
        """Warn of hooks that hang, once each."""
        for name, count in self._hooks.hung.items():
            self._warn_once(
                f'{name} hangs',
                f'{name}: {count} calls have passed hook_timeout and have not come back. Others run in their place; '
                'tree/hung_hooks counts them.',
            )

    def summary(self) -> str | None:
        """One sentence about the batch; None where nothing failed."""
        if not self._paths:
            return None
        kinds = [self._told(kind, n) for kind, n in self._paths.most_common(SHOWN)]
        rest = len(self._paths) - len(kinds)
        more = f'; and {rest} other kinds' if rest else ''
        return f'{self._paths.total()} paths failed in this batch: {"; ".join(kinds)}{more}'

    def check(self, total: int) -> None:
        """When all trees have ended: raise where too many hooks hang, or where more than the allowed share of the
        batch's `total` trajectories failed (`RolloutError`)."""
        self._hooks.check_hung(self._faults.max_hung_hooks)
        failed, allowed = self._trajectories.total(), self._faults.max_failure_fraction
        if failed > allowed * total:
            causes = ''.join(f'\n  {self._told(kind, n)}' for kind, n in self._trajectories.most_common(SHOWN))
            raise RolloutError(
                f'{failed} of {total} trajectories failed, more than faults.max_failure_fraction={allowed:g}. Most '
                f'common causes:{causes}'
            )

    def _add(self, failure: NodeFailure) -> None:
        self._paths[failure.kind] += 1
        self._kinds[str(failure)] = failure.kind
        self._examples.setdefault(failure.kind, failure)
        self._warn_once(failure.kind, str(failure))

    def _told(self, kind: str, count: int) -> str:
        if kind not in self._examples:
            return f'{count} x {kind}'
        example = self._examples[kind]
        told = '' if str(example) == kind else f', e.g. {example}'
        return f'{count} x {kind}{told}. What to do: {example.remedy}'


async def score(engine: SegmentEngine, token_ids: list[int], faults: Faults) -> list[float]:
    """`SegmentEngine.score` with the deadline and the retries of segments: that a weight sync can't be proven at once
    is no reason to end a training.

    Raises:
        EngineError: it failed once more often than it may.
        EngineGone: there is nobody to ask again.
    """
    errors = 0
    while True:
        try:
            async with asyncio.timeout(faults.stall_timeout):
                return await engine.score(token_ids)
        except EngineGone:
            raise
        except Exception as e:
            errors += 1
            if errors > faults.max_retries:
                said = f'{type(e).__name__}: {e}' if str(e) else type(e).__name__
                raise EngineError(
                    f'the engine could not score {len(token_ids)} tokens: {said} (after {errors} attempts)'
                ) from e


def check_segment(segment: Segment, most: int) -> None:
    """Raise `EngineError` for a segment that no tree may be grown with: without a token, with more than `most`, or with
    log-probs that do not fit them or are not finite."""
    tokens, values = len(segment.token_ids), segment.logprobs
    if tokens != len(values):
        raise EngineError(
            f'the engine returned {tokens} tokens with {len(values)} log-probs',
            kind='the engine returned log-probs that do not fit its tokens',
        )
    if not tokens and segment.stop is None:
        raise EngineError('the engine returned a segment without a token')
    if tokens > most:
        raise EngineError(f'the engine returned {tokens} tokens where {most} were asked for')
    if not all(map(math.isfinite, values)):
        raise EngineError(
            'the engine returned a log-prob that is not finite',
            kind='the engine returned a log-prob that is not finite',
            remedy='The weights have probably diverged: resume from an earlier checkpoint with a lower learning rate. '
            'At the first step it is the model or its dtype.',
        )


def described(error: BaseException) -> str:
    """What the trainer is told of an error that ended a rollout: never a bare name, and never a traceback alone."""
    name, text = type(error).__name__, inert(str(error)).strip()
    if isinstance(error, EXPECTED):
        return f'{name}: {text}'
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = ''.join(f' at {Path(frame.filename).name}:{frame.lineno}, in {frame.name}' for frame in place)
    return (
        f'The rollout ended with an error that treepo did not expect: {name}{": " if text else ""}{text}{where}. '
        'Nothing of this batch is left. The log of `swift rollout` has the whole traceback: please report it.'
    )
