"""Fixtures for all tests. What makes certificates: tests/pki.py; the clock: tests/fakes/clock.py."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from tests.fakes.clock import ManualClock
from tests.pki import Tenant, make_tenant


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
