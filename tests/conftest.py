"""Settings of all tests."""

from __future__ import annotations

import logging
import os

from hypothesis import HealthCheck, settings

from treepo_swift.compat.quiet_exit import quiet_exit

quiet_exit()  # the verdict is the last thing to see

# A busy machine is no defect: no example has a deadline, and slow drawing of examples is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('local', PATIENT)
# CI tries the same examples every time: what is red there was broken by the change, and is red again in a second run.
# By hand they are random, so that new ones are found; those that fail are kept and tried first.
settings.register_profile('ci', PATIENT, derandomize=True, print_blob=True)
settings.load_profile('ci' if os.environ.get('CI') else 'local')


def pytest_unconfigure() -> None:
    """Hooks that ignore their cancellation leave tasks behind, of which asyncio would tell when the process ends."""
    logging.getLogger('asyncio').disabled = True
