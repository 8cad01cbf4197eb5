"""A progress bar that log lines do not tear."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextmanager
def progress(**options: Any) -> Iterator[Any]:
    """tqdm's bar. What loggers of this process say meanwhile stands above it, on lines of its own."""
    with tqdm(dynamic_ncols=True, **options) as bar, logging_redirect_tqdm(_on_the_console()):
        yield bar


def _on_the_console() -> list[logging.Logger]:
    """Loggers that write to the console by themselves, as swift's and vLLM's; and the one of all others."""
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [logging.root, *(logger for logger in named if any(map(_writes_to_console, logger.handlers)))]


def _writes_to_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
