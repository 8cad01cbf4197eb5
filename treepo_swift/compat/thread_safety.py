"""Lets checks of mathematical answers run in the threads of plain hooks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

_MARK = '_treepo_threads'


def let_math_verify_run_in_threads() -> None:
    """Leave out math_verify's own time limit outside the main thread; a hook has one anyway (`hook_timeout`).

    math_verify stops a slow comparison by a signal, which only a main thread can have, and raises in any other. swift's
    `MathAccuracy`, and with it `MathTipsScheduler`, would fail in every hook. In main threads nothing changes.
    """
    if importlib.util.find_spec('math_verify') is None:
        return
    for name in ('math_verify.parser', 'math_verify.grader'):
        module: Any = importlib.import_module(name)
        if not hasattr(module.timeout, _MARK):
            module.timeout = _limited_in_main_thread(module.timeout)


def _limited_in_main_thread(timeout: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(timeout)
    def limit(timeout_seconds: int | None = 10) -> Any:
        in_main = threading.current_thread() is threading.main_thread()
        return timeout(timeout_seconds if in_main else None)

    setattr(limit, _MARK, True)
    return limit
