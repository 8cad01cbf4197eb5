"""What integration tests share."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope='session')
def loaded() -> ForkServerContext:
    """Starts processes in which swift and our trainer are loaded already: that takes ten seconds of CPU, here once."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.integration.preload'])
    return context
