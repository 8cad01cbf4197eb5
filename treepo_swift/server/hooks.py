"""Runs users' hooks so that a slow, hanging or raising one can only hurt its own path."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from treepo_swift.compat.thread_safety import let_math_verify_run_in_threads

MAX_HOOK_THREADS = 256
"""swift's worker shares asyncio's default executor with its command pipe, so hooks get threads of their own."""


class HookError(RuntimeError):
    """A user's hook raised, took too long or returned something that it may not return."""


class HookRunner:
    """Calls hooks, sync ones in a thread pool and async ones on the loop, each with a deadline."""

    def __init__(self) -> None:
        let_math_verify_run_in_threads()
        self._pool = ThreadPoolExecutor(MAX_HOOK_THREADS, thread_name_prefix='treepo-hook')

    async def call(self, hook: Callable[..., Any], *args: Any, timeout: float, where: str, name: str = '') -> Any:
        """Return what the hook returns; every way of failing becomes a `HookError` with its `name` and `where`."""
        name = name or getattr(hook, '__qualname__', repr(hook))
        try:
            return await asyncio.wait_for(self._result(hook, args), timeout)
        except TimeoutError:
            raise HookError(f'{name} {where}: took more than hook_timeout={timeout:g} s') from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            raise HookError(f'{name} {where}: raised CancelledError') from None
        except (Exception, SystemExit) as e:
            # SystemExit in a task would end swift's worker, and with it every later rollout.
            raise HookError(f'{name} {where}: raised {type(e).__name__}: {e}') from e

    async def _result(self, hook: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if inspect.iscoroutinefunction(hook):
            return await hook(*args)
        result = await asyncio.get_running_loop().run_in_executor(self._pool, _contained, hook, args)
        # A plain function may hand out a coroutine: a decorated async one, or a partial.
        return await result if inspect.isawaitable(result) else result


def _contained(hook: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return hook(*args)
    except SystemExit as e:
        raise RuntimeError(f'SystemExit({e.code})') from e
