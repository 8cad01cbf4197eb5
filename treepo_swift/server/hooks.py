"""Runs users' hooks so that a slow, hanging or raising one can only hurt its own path."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any

from treepo_swift.compat.maths import check_maths_in_processes
from treepo_swift.compat.thread_safety import let_math_verify_run_in_threads
from treepo_swift.core.failure import NodeFailure

MAX_HOOK_THREADS = 256
"""Hooks that may run at one time; one that hangs is not counted. swift's worker shares asyncio's default executor with
its command pipe, so hooks get threads of their own."""
IDLE_SECONDS = 20.0
"""How long a thread waits for another hook before it ends."""
CLOCK_SECONDS = 0.01
"""More than what a timer of the event loop may come too early."""
GRACE_SECONDS = 5.0
"""How long an async hook may take to end after it was cancelled."""
SLOW = 'Give what the hook waits for a time limit of its own, or raise faults.hook_timeout.'


class HookError(NodeFailure):
    """A user's hook raised, took too long or returned something that it may not return."""

    def __init__(
        self,
        hook: str,
        where: str,
        problem: str,
        *,
        kind: str = 'returned what it may not',
        remedy: str = 'Mend the hook; treepo asks it only once for each turn or segment.',
    ) -> None:
        """`problem` goes on after hook and place. `kind` is what errors have in common that are counted together."""
        super().__init__(f'{hook} {where}: {problem}', kind=f'{hook} {kind}', remedy=remedy)


class HungHooksError(RuntimeError):
    """So many hooks have not come back that the rollout stops."""


class HookRunner:
    """Calls hooks, plain ones in threads and async ones on the loop, each with a deadline from when it runs."""

    def __init__(self) -> None:
        let_math_verify_run_in_threads()
        check_maths_in_processes()
        self._threads = HookThreads(MAX_HOOK_THREADS)
        self._hung_tasks: dict[asyncio.Task[Any], str] = {}
        """Async hooks that did not end when they were cancelled, with their names."""
        self.returned = 0
        """Calls that have come back, in whatever way."""

    @property
    def hung(self) -> Counter[str]:
        """Hooks that have passed their deadline and have still not come back: how many of each name."""
        return Counter(self._hung_tasks.values()) + self._threads.hung

    def check_hung(self, limit: int) -> None:
        """Raise `HungHooksError` where more than `limit` hooks hang."""
        hung = self.hung
        if hung.total() > limit:
            ((name, count),) = hung.most_common(1)
            raise HungHooksError(
                f'{name}: {count} calls have passed faults.hook_timeout and have not come back. With all hooks '
                f'{hung.total()} hang, faults.max_hung_hooks={limit} are allowed. Give what the hook waits for a time '
                'limit of its own, and restart `swift rollout`: threads that hang can not be ended.'
            )

    async def call(self, hook: Callable[..., Any], *args: Any, timeout: float, where: str, name: str = '') -> Any:
        """Return what the hook returns; every way of failing becomes a `HookError` with its `name` and `where`."""
        name = name or getattr(hook, '__qualname__', repr(hook))
        try:
            if inspect.iscoroutinefunction(hook):
                return await self._on_the_loop(hook(*args), name, timeout)
            result = await self._threads.run(name, lambda: hook(*args), timeout)
            # A plain function may hand out a coroutine: a decorated async one, or a partial.
            return await self._on_the_loop(_awaited(result), name, timeout) if inspect.isawaitable(result) else result
        except TimeoutError as e:
            if not isinstance(e, DeadlinePassed):
                raise HookError(name, where, f'raised TimeoutError: {e}', kind='raised TimeoutError') from e
            problem = f'took more than hook_timeout={timeout:g} s'
            raise HookError(name, where, problem, kind='took more than hook_timeout', remedy=SLOW) from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            raise HookError(name, where, 'raised CancelledError', kind='raised CancelledError') from None
        except Exception as e:
            raised = f'raised {type(e).__name__}'
            raise HookError(name, where, f'{raised}: {e}', kind=raised) from e
        finally:
            self.returned += 1

    async def _on_the_loop(self, coroutine: Coroutine[Any, Any, Any], name: str, timeout: float) -> Any:
        task = asyncio.ensure_future(_without_exit(coroutine))
        task.add_done_callback(_look_away)
        try:
            await asyncio.wait({task}, timeout=timeout)
            if task.done():
                return task.result()
            raise DeadlinePassed
        finally:
            if not task.done():
                task.cancel()
                try:
                    await asyncio.wait({task}, timeout=min(timeout, GRACE_SECONDS))
                finally:
                    if not task.done():
                        self._hung_tasks[task] = name
                        task.add_done_callback(self._hung_tasks.pop)


def _look_away(task: asyncio.Task[Any]) -> None:
    """Nobody may ask what came of a hook, late or with its batch cancelled: asyncio would log its error as lost."""
    if not task.cancelled():
        task.exception()


class DeadlinePassed(TimeoutError):
    """Of ours; a hook may raise a TimeoutError of its own."""


async def _awaited(result: Any) -> Any:
    return await result


async def _without_exit(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except (Exception, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
        raise
    except BaseException as e:
        # In a task SystemExit would end swift's worker, and with it every later rollout; what else there is, the batch.
        raise RuntimeError(f'{type(e).__name__}({e})') from e


class _Call:
    """One call of a hook in a thread."""

    def __init__(self, name: str, work: Callable[[], Any], timeout: float) -> None:
        self.name, self.work, self.timeout = name, work, timeout
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.started: float | None = None
        """None while it waits for a thread."""
        self.returned = False

    @property
    def running(self) -> bool:
        return self.started is not None and not self.returned

    @property
    def seconds_left(self) -> float:
        return self.timeout if self.started is None else self.started + self.timeout - time.monotonic()

    def run(self) -> tuple[Any, Exception | None]:
        """Result or error."""
        try:
            return self.work(), None
        except BaseException as e:
            # Futures take no StopIteration, and SystemExit is nobody's here.
            if isinstance(e, Exception) and not isinstance(e, StopIteration):
                return None, e
            return None, RuntimeError(f'{type(e).__name__}({e})')

    def deliver(self, result: Any, error: Exception | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self._deliver, result, error)
        except RuntimeError:
            pass  # The loop is closed: nobody waits any more.

    def _deliver(self, result: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class HookThreads:
    """At most `limit` calls run at one time, each in a thread; the others queue up without a deadline.

    Threads are made when they are needed, used again, and end when nothing has come for a while. A call that has passed
    its deadline gives its place to another thread at once. Its own thread ends when the call returns, or is used again
    where there is no other. Threads are daemons: one that hangs does not keep the process alive.
    """

    def __init__(self, limit: int, name: str = 'treepo-hook', idle_seconds: float | None = None) -> None:
        self._limit = limit
        self._name = name
        self._idle_seconds = IDLE_SECONDS if idle_seconds is None else idle_seconds
        self._changed = threading.Condition()
        # All of these are touched under the condition's lock only.
        self._queue: deque[_Call] = deque()
        self._threads = 0
        """Those that run a call in time, or are idle."""
        self._idle = 0
        """Those of them that will take the next calls: new ones too."""
        self._hung: set[_Call] = set()
        """Calls that have passed their deadline and have not returned."""

    @property
    def hung(self) -> Counter[str]:
        """Calls that have passed their deadline and have not returned: how many of each name."""
        with self._changed:
            return Counter(call.name for call in self._hung)

    async def run(self, name: str, work: Callable[[], Any], timeout: float) -> Any:
        """What `work` returns. Raises `DeadlinePassed` when it has run for `timeout` seconds."""
        call = _Call(name, work, timeout)
        with self._changed:
            self._queue.append(call)
            self._serve_queue()
        try:
            left = timeout
            while left > 0:
                await asyncio.wait({call.future}, timeout=left)
                if call.future.done():
                    return call.future.result()
                left = call.seconds_left  # It may have begun, or not, while we waited.
            raise DeadlinePassed
        finally:
            call.future.cancel()
            self._leave(call)
            if call.running and call.seconds_left > 0:
                # Cancelled: those that queue up behind it are about to be, so that its place stays taken for now.
                call.loop.call_later(call.seconds_left + CLOCK_SECONDS, self._leave, call)

    def _serve_queue(self) -> None:
        """Wake an idle thread, or start one."""
        if len(self._queue) <= self._idle:
            self._changed.notify()
        elif self._threads < self._limit:
            self._threads += 1
            self._idle += 1
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _leave(self, call: _Call) -> None:
        """Nobody waits for `call` any more. Where its deadline has passed, another thread takes its place."""
        with self._changed:
            if call.started is None:
                self._queue.remove(call)
            elif call.running and call.seconds_left <= 0 and call not in self._hung:
                self._hung.add(call)
                self._threads -= 1
                if self._queue:
                    self._serve_queue()

    def _work(self) -> None:
        """What a thread does: one call after the other."""
        while (call := self._next_call()) is not None:
            outcome = call.run()
            with self._changed:
                call.returned = True
                if call in self._hung:
                    self._hung.remove(call)
                    if self._idle or self._threads >= self._limit:
                        return  # Its place was taken, or is not needed.
                    self._threads += 1
                self._idle += 1
            call.deliver(*outcome)

    def _next_call(self) -> _Call | None:
        with self._changed:
            came = self._changed.wait_for(lambda: self._queue, timeout=self._idle_seconds)
            self._idle -= 1
            if not came:
                self._threads -= 1
                return None
            call = self._queue.popleft()
            call.started = time.monotonic()
            return call
