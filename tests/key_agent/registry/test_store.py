"""The registry, on SQLite and on PostgreSQL (conftest.py)."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from envelope.keys import NetworkService
from key_agent.registry.database import Database, RegistryError
from key_agent.registry.store import RefusedChangeError, Registry
from key_agent.registry.tables import metadata
from tests.key_agent.registry.conftest import POSTGRES_URL, needs_postgres
from tests.key_agent.registry.records import NOW_MS, S3, key_of, open_registry, with_services


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


async def test_the_migrations_lead_to_the_tables(url: str, registry: Registry) -> None:
    def differences() -> list[object]:
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                context = MigrationContext.configure(connection, opts={"compare_type": True})
                return list(compare_metadata(context, metadata))
        finally:
            engine.dispose()

    assert await asyncio.to_thread(differences) == []


async def test_sqlite_is_durable(directory: Path) -> None:
    database = await Database.open(f"sqlite:///{directory / 'registry.db'}")

    async def pragma(name: str) -> object:
        return await database.transact(lambda c: c.exec_driver_sql(f"PRAGMA {name}").scalar())

    assert await pragma("synchronous") == 2
    assert await pragma("journal_mode") == "wal"
    assert await pragma("foreign_keys") == 1
    await database.close()
    await database.close()
    with pytest.raises(RegistryError, match="closed"):
        await database.transact(lambda _: None)


async def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o750)  # noqa: PTH101
    with pytest.raises(RegistryError, match="chmod 700"):
        await Database.open(f"sqlite:///{tmp_path / 'registry.db'}")
    with pytest.raises(RegistryError, match="init"):
        await Database.open(f"sqlite:///{tmp_path / 'missing' / 'registry.db'}")


async def test_a_database_that_is_none_is_refused(directory: Path) -> None:
    tmp_path = directory
    (tmp_path / "registry.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(RegistryError, match="DatabaseError"):
        await Database.open(f"sqlite:///{tmp_path / 'registry.db'}")


async def test_another_tenants_or_environments_registry_is_refused(url: str, registry: Registry) -> None:
    await registry.close()
    for changes in ({"tenant_id": "globex"}, {"environment_id": "other"}):
        with pytest.raises(RefusedChangeError, match="belongs to"):
            await open_registry(url, **changes)
    again = await open_registry(url)
    await again.close()


async def test_a_full_disk_refuses_and_keeps_the_old_rows(directory: Path) -> None:
    tmp_path = directory
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    registry = await open_registry(url)
    await with_services(registry, S3)
    before = await registry.data_keys()

    def limit(c: Connection) -> None:
        c.exec_driver_sql("PRAGMA max_page_count = 1")

    await registry._database.transact(limit)

    async def add_many() -> None:
        for number in range(1000):
            owner = NetworkService("acme", f"s{number}")
            await registry.add_service(
                owner, proxy_id="p1", certificate_pem="x" * 2000, key=key_of(owner), now_ms=NOW_MS
            )

    with pytest.raises(RegistryError, match="full"):
        await add_many()
    kept = {key.key_id for key in await registry.data_keys()}
    assert {key.key_id for key in before} <= kept
    await registry.close()
    check = sqlite3.connect(tmp_path / "registry.db")
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check.close()


@needs_postgres
async def test_a_postgres_that_would_lose_commits_is_refused() -> None:
    assert POSTGRES_URL is not None
    with pytest.raises(RegistryError, match="synchronous_commit=off"):
        await Database.open(f"{POSTGRES_URL}?options=-csynchronous_commit%3Doff")


@needs_postgres
async def test_a_postgres_that_cut_the_connection_is_found_again() -> None:
    assert POSTGRES_URL is not None
    url = POSTGRES_URL
    database = await Database.open(url)
    pid = await database.transact(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar())

    def cut() -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        engine.dispose()

    await asyncio.to_thread(cut)
    again = await database.transact(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar())
    assert again != pid
    await database.close()
