"""B-50: the manager's database dies in the midst of `incident open`. One incident afterwards, no half epoch.

1. PostgreSQL: a primary with a synchronous standby; the transaction is stopped after its first rows, then the
   primary is killed (kill -9), then the standby is promoted. The agent finds it by its URL, which names both.
2. SQLite has no server to be killed: there it is the agent that is killed while its transaction waits.
3. The other environments have databases of their own, which go on; they are served meanwhile.
"""

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from runtime.cli import CommandError
from tests.environments.site import EnvironmentsSite, SiteEnvironment, environments_site, until
from tests.postgres import Cluster

ALL = ("a", "b", "c")


@contextlib.contextmanager
def clusters(*names: str) -> Iterator[dict[str, Cluster]]:
    """Servers that are not made yet, in short directories: their sockets are Unix sockets."""
    directories = {name: Path(tempfile.mkdtemp(prefix=f"sg-{name}-")) for name in names}
    made = {name: Cluster(directory) for name, directory in directories.items()}
    try:
        yield made
    finally:
        for cluster in made.values():
            cluster.stop()
        for directory in directories.values():
            shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def united(directory: Path, urls: dict[str, str] | None) -> AsyncIterator[EnvironmentsSite]:
    async with (
        environments_site(
            directory, proxies_each=1, rhythm=(30, 33, 0.3), database_urls=urls, named=True
        ) as site,
        site.agents(),
        site.proxies(),
    ):
        await site.unite()
        await site.add_service("files")
        await until(lambda: all_serve(site), timeout_s=90)
        await until(lambda: in_step(site), timeout_s=90)
        yield site


async def all_serve(site: EnvironmentsSite, names: tuple[str, ...] = ALL) -> bool:
    answers = await asyncio.gather(
        *(site[name].proxies[0].call("keys/files/encrypt", {"plaintext": "AA=="}) for name in names)
    )
    return all(status == 200 for status, _ in answers)


async def position(one: SiteEnvironment) -> tuple[int, int, str]:
    found = await one.ask("env_list")
    return int(found["term"]), int(found["epoch"]), str(found["digest"])


async def in_step(site: EnvironmentsSite) -> bool:
    try:
        return len(set(await asyncio.gather(*(position(one) for one in site.environments.values())))) == 1
    except (AssertionError, CommandError):  # one of them is just coming back
        return False


async def opened(site: EnvironmentsSite, *, patience_s: float) -> dict[str, Any] | None:
    """The command as an administrator repeats it: always the same one. None: not yet."""
    try:
        async with asyncio.timeout(patience_s):
            return dict(
                await site["a"].ask(
                    "incident_open", environment="b", kind="runtime", reason="IR-2214", by="test",
                    idempotency_key="the same",
                )
            )  # fmt: skip
    except (AssertionError, CommandError, TimeoutError):  # its database is away, or its agent: the point
        return None


async def after_the_failure(site: EnvironmentsSite, before: tuple[int, int, str]) -> None:
    """Nothing of it was kept; repeated, it is one incident, in one epoch, in all."""
    assert (await position(site["b"])) == before
    assert (await position(site["c"])) == before
    await until(lambda: _answers(site["a"]), timeout_s=90)
    assert (await position(site["a"])) == before, "no half epoch"
    assert (await site["a"].ask("incident_list"))["incidents"] == []
    found: list[dict[str, Any]] = []

    async def done() -> bool:
        answer = await opened(site, patience_s=20)
        found.extend([] if answer is None else [answer])
        return answer is not None

    await until(done, timeout_s=90)
    again = await opened(site, patience_s=20)
    assert again is not None
    assert (found[0]["incident"], again["incident"], again["new"]) == ("inc-1", "inc-1", False)
    await until(lambda: in_step(site), timeout_s=60)
    for one in site.environments.values():
        listed = (await one.ask("incident_list"))["incidents"]
        assert [row["incident"] for row in listed] == ["inc-1"]
        assert (await one.ask("env_status", environment="b"))["state"] == "healing"
        states = {key["state"] for key in (await one.ask("key_list", service="files"))["keys"]}
        assert states == {"active", "compromised"}
    assert (await position(site["a"]))[1] == before[1] + 1, "one epoch"
    await until(lambda: all_serve(site, ("a", "c")), timeout_s=60)


async def _answers(one: SiteEnvironment) -> bool:
    with contextlib.suppress(Exception):
        await position(one)
        return True
    return False


async def test_b_50_postgresql_the_primary_is_killed_and_its_standby_promoted(tmp_path: Path) -> None:
    with clusters("a", "a2", "b", "c") as servers:
        for name in ALL:
            await asyncio.to_thread(servers[name].create)
        await asyncio.to_thread(servers["a2"].follow, servers["a"])
        urls = {name: servers[name].url for name in ALL}
        both = f"{servers['a'].directory},{servers['a2'].directory}"
        urls["a"] = (
            f"postgresql+psycopg://sealgate@/sealgate?host={both}&port=5432,5432&target_session_attrs=read-write"
        )
        async with united(tmp_path, urls) as site:
            before = await position(site["a"])
            engine = create_engine(servers["a"].url)
            with engine.connect() as other:
                other.execute(text("LOCK TABLE dek IN EXCLUSIVE MODE"))
                opening = asyncio.create_task(opened(site, patience_s=60), name="open")
                await until(lambda: _waits(engine), timeout_s=60)
                assert not opening.done(), "its first rows are written, its last are not"
                await asyncio.to_thread(servers["a"].kill)
                other.invalidate()
            engine.dispose()
            assert await all_serve(site, ("a", "c")), "serving does not depend on that database"
            await asyncio.to_thread(servers["a2"].promote)
            assert await opening is None, "nobody was told that it is done"
            await after_the_failure(site, before)
        kept = create_engine(servers["a2"].url)
        with kept.connect() as connection:
            rows = connection.execute(text("SELECT count(*) FROM shared_row WHERE kind = 'incident'"))
            assert rows.scalar_one() == 1
        kept.dispose()


async def _waits(engine: Engine) -> bool:
    """Whether a transaction of the agent's waits for the lock."""

    def look() -> bool:
        with engine.connect() as connection:
            found = connection.execute(
                text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'dek'::regclass")
            )
            return bool(found.scalar_one())

    return await asyncio.to_thread(look)


async def test_b_50_sqlite_the_agent_is_killed(tmp_path: Path) -> None:
    async with united(tmp_path, None) as site:
        a = site["a"]
        before = await position(a)
        with contextlib.closing(sqlite3.connect(a.state_dir / "registry.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            opening = asyncio.create_task(opened(site, patience_s=60), name="open")
            await until(lambda: _is_recorded(a), timeout_s=60)
            await a.agent.kill()
            other.execute("ROLLBACK")
        assert await opening is None
        assert await all_serve(site), "serving does not depend on the agent"
        await a.agent.start()
        await after_the_failure(site, before)


async def _is_recorded(one: SiteEnvironment) -> bool:
    """The agent has begun: its audit log says so, before anything is written."""
    return '"incident-open' in (one.state_dir / "audit.jsonl").read_text()
