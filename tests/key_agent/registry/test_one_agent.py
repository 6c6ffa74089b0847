"""Two agents never work with one registry, wherever their `state_dir` is."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text

from key_agent.api import explain_agent
from key_agent.registry.database import Database, RegistryError, RegistryInUseError
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
    first = await Database.open(url)
    with pytest.raises(RegistryInUseError, match="another key agent") as caught:
        await Database.open(url)
    assert "stop that one" in caught.value.next_step
    assert await first.transact(_one) == 1, "the first one does not notice"
    await first.close()
    second = await Database.open(url)
    assert await second.transact(_one) == 1
    await second.close()


async def test_a_killed_one_leaves_no_lock(url: str) -> None:
    script = (
        "import asyncio, sys, time\n"
        "from key_agent.registry.database import Database\n"
        "async def main():\n"
        "    database = await Database.open(sys.argv[1])\n"
        "    print('open', flush=True); time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    holder = subprocess.Popen(  # noqa: ASYNC220 - starting it takes no time
        [sys.executable, "-c", script, url],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert holder.stdout is not None
    assert await asyncio.to_thread(holder.stdout.readline) == b"open\n"
    with pytest.raises(RegistryInUseError):
        await Database.open(url)
    holder.kill()
    await asyncio.to_thread(holder.wait)
    holder.stdout.close()
    await (await Database.open(url)).close()


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
async def test_who_holds_it_is_said(url_of_postgres: str) -> None:
    first = await Database.open(url_of_postgres)
    with pytest.raises(
        RegistryInUseError, match=r"on the database server itself, since 20|from [0-9a-f.:]+, since"
    ):
        await Database.open(url_of_postgres)
    await first.close()


@needs_postgres
async def test_a_lost_connection_takes_its_lock_again(url_of_postgres: str) -> None:
    database = await Database.open(url_of_postgres)
    await _terminate(await _pid(database))
    assert await database.transact(_one) == 1
    with pytest.raises(RegistryInUseError):
        await Database.open(url_of_postgres)
    await database.close()


@needs_postgres
async def test_ones_own_lost_session_does_not_lock_one_out(url_of_postgres: str) -> None:
    """The network died, the server keeps the old session and its lock: the new one ends it."""
    database = await Database.open(url_of_postgres)
    twin = create_engine(
        url_of_postgres, connect_args={"application_name": f"sealgate-key-agent {database._instance}"}
    )

    def hold() -> Connection:
        connection = twin.connect()
        connection.execute(
            text("SELECT pg_advisory_lock(hashtextextended('sealgate key agent in ' || current_schema(), 0))")
        )
        return connection

    lost = asyncio.create_task(asyncio.to_thread(hold))
    await asyncio.sleep(0)
    await _waits_for_the_lock(url_of_postgres)
    await _terminate(await _pid(database))
    held = await lost
    assert await database.transact(_one) == 1

    def gone() -> None:
        with pytest.raises(Exception, match="terminat"):
            held.execute(text("SELECT 1"))
        held.invalidate()
        held.close()
        twin.dispose()

    await asyncio.to_thread(gone)
    await database.close()


async def _waits_for_the_lock(url: str) -> None:
    def look() -> bool:
        with engine.connect() as connection:
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            return bool(connection.scalar(text(query)))

    engine = create_engine(url)
    deadline_s = time.monotonic() + 20
    while not await asyncio.to_thread(look):
        assert time.monotonic() < deadline_s
    engine.dispose()


@needs_postgres
async def test_one_that_another_came_after_does_not_write_again(url_of_postgres: str) -> None:
    """What it holds in memory may be old: only a new start reads the registry anew."""
    database = await Database.open(url_of_postgres)
    await database.transact(_one)
    pid = await _pid(database)
    opening = asyncio.create_task(_opened_as_soon_as_possible(url_of_postgres))
    await _terminate(pid)
    other = await opening
    with pytest.raises(RegistryInUseError, match="another key agent works"):
        await database.transact(_one)
    await other.close()
    for _ in range(2):
        with pytest.raises(RegistryInUseError, match="while this one's connection was lost"):
            await database.transact(_one)
    await database.close()
    await (await Database.open(url_of_postgres)).close()


async def _opened_as_soon_as_possible(url: str) -> Database:
    async with asyncio.timeout(20):
        while True:
            try:
                return await Database.open(url)
            except RegistryError:
                continue
