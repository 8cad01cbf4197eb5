"""Lets a command's result be the last thing on the screen.

Libraries under vLLM are bound to Python by nanobind, which counts what they leak when the interpreter has ended and
prints twenty lines of it after everything that a user wants to read.
"""

from __future__ import annotations

import atexit
import os
import sys


def quiet_exit() -> None:
    """What is printed to stderr after all exit handlers have run is dropped. Call it before other modules register
    theirs: the handler that is registered first runs last. Tracebacks are printed before that."""
    atexit.register(_drop_stderr)


def _drop_stderr() -> None:
    try:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except (OSError, ValueError):
        pass  # stderr is closed already, so nothing would be seen
