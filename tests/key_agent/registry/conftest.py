"""Registries on SQLite, and on the PostgreSQL that SEALGATE_TEST_POSTGRES_URL names.

That one's content is dropped: give it a database of its own.
"""

import os
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

POSTGRES_URL = os.environ.get("SEALGATE_TEST_POSTGRES_URL")

needs_postgres = pytest.mark.skipif(
    POSTGRES_URL is None, reason="SEALGATE_TEST_POSTGRES_URL names no PostgreSQL to test with"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def url(request: pytest.FixtureRequest, directory: Path) -> str:
    """An empty one."""
    if request.param == "sqlite":
        return f"sqlite:///{directory / 'registry.db'}"
    return _emptied()


@pytest.fixture
def url_of_postgres() -> str:
    """The same, of PostgreSQL alone; for tests with `needs_postgres`."""
    return _emptied()


def _emptied() -> str:
    assert POSTGRES_URL is not None
    engine = create_engine(POSTGRES_URL)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return POSTGRES_URL
