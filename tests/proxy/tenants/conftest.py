"""The directory on real databases: SQLite, and PostgreSQL where SEALGATE_TEST_POSTGRES_URL names one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.tenants.directory import DirectoryStore
from tests.proxy.tenants.places import BOTH, Place, make_place


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with make_place(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def store(place: Place) -> Iterator[DirectoryStore]:
    with place.open() as store:
        yield store
