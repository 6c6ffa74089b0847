"""Fixtures for all tests. What makes certificates: tests/pki.py; the clock: tests/fakes/clock.py.

Searching tests (hypothesis) search anew on each run; in CI they take the same examples each time, so that a
change is judged by itself and not by luck. None of them is judged by the time an example takes: that says how
busy the machine is.
"""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from tests import postgres
from tests.fakes.clock import ManualClock
from tests.pki import Tenant, make_tenant

settings.register_profile("here", deadline=None)
settings.register_profile("ci", derandomize=True, print_blob=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")
postgres.take_own_database()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def acme() -> Tenant:
    return make_tenant("acme")


@pytest.fixture(scope="session")
def globex() -> Tenant:
    """Another tenant, whose certificates must open nothing of acme's."""
    return make_tenant("globex")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What a test configures must not reach the next one."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()
