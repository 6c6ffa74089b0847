"""PostgreSQL dies, or the way to it: nothing acknowledged is lost and no command is half done. The agent
goes on by itself, with its lease.
"""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from envelope.keys import NetworkService
from key_agent.registry.database import RegistryError
from tests.key_agent.conftest import Bench, until
from tests.key_agent.registry.records import BOX, NOW_MS, S3, add_service, key_of, open_registry
from tests.key_agent.registry.relay import Relay
from tests.postgres import Cluster, running

WRITERS = 4
KILLS = 3


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    try:
        with running() as made:
            yield made
    except FileNotFoundError as error:
        pytest.skip(str(error))


@asynccontextmanager
async def relayed(cluster: Cluster) -> AsyncIterator[tuple[Relay, str]]:
    directory = Path(tempfile.mkdtemp(prefix="sealgate-relay-"))
    relay = Relay(cluster.directory)
    try:
        yield relay, await relay.open(directory)
    finally:
        await relay.close()
        shutil.rmtree(directory)


async def test_kill_9_of_the_server_under_load_loses_nothing_and_halves_nothing(cluster: Cluster) -> None:
    """Many at once, each telling what was acknowledged to it; the same registry goes on after each kill."""
    registry = await open_registry(cluster.url)
    await add_service(registry, S3)
    acknowledged: set[str] = set()
    refused: set[str] = set()

    async def write(writer: int, life: int, dead: asyncio.Event) -> None:
        number = 0
        while not dead.is_set():
            owner = NetworkService("acme", f"w{writer}-{life}-{number}")
            try:
                await registry.add_service(
                    owner, proxy_id="p1", certificate_pem="PEM", key=key_of(owner), now_ms=NOW_MS
                )
            except RegistryError:
                refused.add(str(owner))
            else:
                acknowledged.add(str(owner))
            number += 1

    for life in range(KILLS):
        dead = asyncio.Event()
        enough = len(acknowledged) + 40
        async with asyncio.TaskGroup() as group:
            for writer in range(WRITERS):
                group.create_task(write(writer, life, dead), name=f"writer-{writer}")
            await until(lambda enough=enough: len(acknowledged) >= enough)  # type: ignore[misc]
            await asyncio.to_thread(cluster.kill)
            before = len(refused)
            await until(lambda before=before: len(refused) > before)  # type: ignore[misc]
            dead.set()
        await asyncio.to_thread(cluster.start)
        book = await registry.book()
        held = {str(link.owner) for link in book.links}
        keys = {str(key.owner) for key in await registry.data_keys()}
        sound = {str(key.owner) for key in await registry.wrapped_keys("k1")}
        assert acknowledged <= held
        assert held == keys == sound, "service, link, key and wrap: all of them or none"
        assert len(held - acknowledged - {str(S3)}) <= life + 1, "at most the one without an answer, per kill"
    assert registry.term == 1
    await registry.close()


async def test_the_agent_survives_its_database(bench: Bench, cluster: Cluster) -> None:
    async with bench.agent(url=cluster.url) as (agent, operations):
        await bench.provision(operations)
        keys = await agent.registry.data_keys()
        pushes = len(bench.proxy().accepted)
        await asyncio.to_thread(cluster.kill)
        with pytest.raises(RegistryError, match="connection"):
            await operations.rotate(service="s3")
        with pytest.raises(RegistryError):
            await operations.service_remove(service="s3")
        assert bench.proxy().valid_keys(S3), "a command that failed took nothing back"
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p1") >= 1)
        await until(lambda: any("lease" in reason for reason in agent.reasons_not_ready()))
        assert len(bench.proxy().accepted) == pushes

        await asyncio.to_thread(cluster.start)
        await until(lambda: len(bench.proxy().accepted) > pushes)  # no time passes on the agent's clock
        await until(lambda: not agent.reasons_not_ready())
        assert agent.registry.term == 1
        assert not agent.registry.deposed.is_set()
        assert await agent.registry.data_keys() == keys
        await operations.rotate(service="s3")
        assert len(await agent.registry.data_keys()) == len(keys) + 1


async def test_a_server_that_stands_still_delays_no_withdrawal(bench: Bench, cluster: Cluster) -> None:
    """It takes connections and answers nothing, as with a hung disk."""
    async with bench.agent(url=cluster.url) as (agent, operations):
        await bench.provision(operations)
        kek = agent.consent.kek
        assert kek is not None
        frozen = cluster.processes()
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
        try:
            bench.source.destroy(kek)
            await bench.clock.advance(5)
            await until(lambda: not bench.proxy().valid_keys(S3))
            await until(lambda: any("lease" in reason for reason in agent.reasons_not_ready()))
            assert not agent.registry.leads
        finally:
            for process in frozen:
                os.kill(process, signal.SIGCONT)
        await until(lambda: agent.registry.leads)
        await until(lambda: not any("does not know" in reason for reason in agent.reasons_not_ready()))


async def test_a_change_whose_answer_was_lost_is_followed_all_the_same(
    bench: Bench, cluster: Cluster
) -> None:
    """A service's removal was committed and nobody heard of it: its keys are taken back by themselves."""
    async with relayed(cluster) as (relay, url), bench.agent(url=url) as (agent, operations):
        await bench.provision(operations)
        await bench.provision(operations, "box")
        relay.lose_the_next_commit(after=b"UPDATE network_service")
        with pytest.raises(RegistryError, match="it may have been kept"):
            await operations.service_remove(service="s3")
        assert relay.lost.is_set()
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert bench.proxy().valid_keys(BOX)
        assert agent.registry.term == 1


async def test_a_command_amid_which_the_connection_dies_is_whole_or_nothing_and_can_be_repeated(
    cluster: Cluster,
) -> None:
    async with relayed(cluster) as (relay, url):
        registry = await open_registry(url)
        await add_service(registry, S3)

        def cut_amid(c: Connection) -> None:
            registry._database._loop.call_soon_threadsafe(relay.cut)
            for _ in range(1000):
                c.execute(text("UPDATE proxy SET url = url || 'x'"))

        with pytest.raises(RegistryError) as caught:
            await registry._database.transact(cut_amid)
        assert "may have been kept" not in str(caught.value), "it was not committing"
        assert (await registry.book()).proxies["p1"].url == "https://p.example"
        await add_service(registry, BOX)
        assert BOX in (await registry.book()).services
        assert registry.term == 1
        await registry.close()
