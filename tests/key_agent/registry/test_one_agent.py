"""Two agents never work with one registry, wherever their `state_dir` is."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text

from key_agent.explaining import explain_agent
from key_agent.registry.database import Database, RegistryInUseError
from runtime.cli import ExitCode
from tests.key_agent.conftest import Bench
from tests.key_agent.registry.conftest import POSTGRES_URL, needs_postgres


def _one(c: Connection) -> object:
    return c.scalar(text("SELECT 1"))


async def _terminate(pid: object) -> None:
    """As an administrator of the database would, or a failing network."""

    def work() -> None:
        assert POSTGRES_URL is not None
        engine = create_engine(POSTGRES_URL)
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        engine.dispose()

    await asyncio.to_thread(work)


async def _pid(database: Database) -> object:
    return await database.transact(lambda c: c.scalar(text("SELECT pg_backend_pid()")))


async def test_the_second_one_is_refused_until_the_first_has_gone(url: str) -> None:
    first = await Database.open(url, agent_id="hq")
    with pytest.raises(RegistryInUseError, match=r"another key agent works with it .agent hq on") as caught:
        await Database.open(url)
    assert "stop that one" in caught.value.next_step
    assert await first.transact(_one) == 1, "the first one does not notice"
    await first.close()
    second = await Database.open(url)
    assert await second.transact(_one) == 1
    await second.close()


async def test_two_names_of_one_file_are_one_registry(directory: Path) -> None:
    first = await Database.open(f"sqlite:///{directory / 'registry.db'}")
    other = directory / "other"
    other.mkdir(mode=0o700)
    (other / "r.db").symlink_to("../registry.db")
    with pytest.raises(RegistryInUseError):
        await Database.open(f"sqlite:///{other / 'r.db'}")
    await first.close()


async def test_an_agent_with_another_state_dir_does_not_start(url: str, bench: Bench, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    async with bench.agent(url=url) as (_, operations):
        await bench.provision(operations)
        with pytest.raises(RegistryInUseError) as caught:
            async with replace(bench, directory=elsewhere).agent(url=url):
                pass
        assert await operations.service_list()
    told = explain_agent(caught.value)
    assert (told.code, told.exit_code) == ("registry-in-use", ExitCode.UNAVAILABLE)


@needs_postgres
async def test_a_lost_connection_keeps_the_lease(url_of_postgres: str) -> None:
    database = await Database.open(url_of_postgres)
    await _terminate(await _pid(database))
    assert await database.transact(_one) == 1
    with pytest.raises(RegistryInUseError):
        await Database.open(url_of_postgres)
    await database.close()


@needs_postgres
async def test_a_session_left_inside_a_transaction_is_ended_by_who_takes_over(url_of_postgres: str) -> None:
    """Its agent is frozen, or its network died: the server holds its locks still."""
    database = await Database.open(url_of_postgres)
    instance = database._instance
    await database.close()
    twin = create_engine(url_of_postgres, connect_args={"application_name": f"sealgate-key-agent {instance}"})

    def hold() -> Connection:
        connection = twin.connect()
        # As the frozen one would: alive by its process, overdue by its renewals.
        connection.execute(
            text("UPDATE lease SET instance = :instance, renewed_boot_s = -100"), {"instance": instance}
        )
        connection.commit()
        connection.execute(text("SELECT * FROM lease FOR SHARE"))
        return connection

    held = await asyncio.to_thread(hold)
    async with asyncio.timeout(20):
        other = await Database.open(url_of_postgres)
    await other.transact(_one)
    await other.close()

    def gone() -> None:
        with pytest.raises(Exception, match="terminat"):
            held.execute(text("SELECT 1"))
        held.invalidate()
        held.close()
        twin.dispose()

    await asyncio.to_thread(gone)
