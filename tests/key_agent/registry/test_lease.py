"""Who may write: the arithmetic of the lease, without databases; and two processes that want it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from key_agent.registry import lease
from key_agent.registry.database import Database, RegistryError, RegistryInUseError
from key_agent.registry.lease import LEASE_S, LOOK_S, RENEW_S, TRUST_S, Holding, Process, Watch
from tests.fakes.clock import ManualClock

HERE = Process.own()
ELSEWHERE = replace(HERE, machine="another/pid:[1]", host="another")


def _holding(process: Process = ELSEWHERE, **changes: object) -> Holding:
    made = Holding(
        term=3,
        instance="a",
        agent_id="hq",
        process=process,
        renewals=7,
        renewed_boot_s=100.0,
        since_ms=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_there_is_a_time_at_which_nobody_leads() -> None:
    assert RENEW_S * 3 <= TRUST_S < LEASE_S - LOOK_S / 2
    assert LEASE_S + 2 * LOOK_S < 15, "taken over within 15 s of a kill"


def test_what_nobody_holds_is_free() -> None:
    assert Watch(HERE).may_take(None, 0.0)
    assert Watch(HERE).may_take(_holding(instance=""), 0.0)


def test_on_another_machine_only_watching_tells() -> None:
    watch = Watch(HERE)
    assert not watch.may_take(_holding(), 1000.0)
    assert not watch.may_take(_holding(), 1000.0 + LEASE_S - 0.1)
    before = watch.is_alive
    assert not watch.may_take(_holding(renewals=8), 1000.0 + LEASE_S)
    assert (before, watch.is_alive) == (False, True)
    assert not watch.may_take(_holding(renewals=8), 1000.0 + 2 * LEASE_S - 0.1)
    assert not watch.may_take(_holding(term=4, renewals=8), 1000.0 + 2 * LEASE_S)
    assert watch.may_take(_holding(term=4, renewals=8), 1000.0 + 3 * LEASE_S)


def test_on_this_machine_it_is_seen_at_once() -> None:
    alive = _holding(HERE, renewed_boot_s=100.0)
    watch = Watch(HERE)
    assert not watch.may_take(alive, 100.0 + LEASE_S - 0.1)
    assert watch.is_alive
    assert watch.may_take(alive, 100.0 + LEASE_S), "its renewal is overdue"
    assert Watch(HERE).may_take(_holding(replace(HERE, started="0")), 100.0), "the pid is another's by now"
    assert not Watch(HERE).may_take(_holding(replace(ELSEWHERE, pid=2**22 + 1)), 100.0)


def test_a_process_that_is_dead_and_not_reaped_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        process = replace(HERE, pid=child.pid, started=lease._started(child.pid) or "")
        assert not process.is_gone(HERE)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.is_gone(HERE)
    finally:
        child.kill()
        child.communicate()
    assert process.is_gone(HERE)


# On both databases.


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    made = await Database.open(url, agent_id="hq")
    yield made
    await made.close()


async def test_terms_rise_and_the_deposed_one_keeps_nothing(url: str, database: Database) -> None:
    assert database.term == 1
    seen = await database.read_lease()
    assert seen is not None
    assert seen.agent_id == "hq"
    # As if it had been frozen: another takes the lease.
    await database.transact(
        lambda c: lease.take(
            c, seen, instance="other", agent_id="spare", here=ELSEWHERE, boot_s=0.0, now_ms=1
        )
    )
    with pytest.raises(RegistryInUseError, match=r"taken it over .agent spare on another, process .*term 2"):
        await database.transact(lambda c: c.execute(text("DELETE FROM environment")))
    async with asyncio.timeout(30):
        await database.deposed.wait()
    with pytest.raises(RegistryInUseError):
        await database.transact(lambda _: None)
    leads = database.leads
    assert not leads
    await database.close()  # and it does not release what is another's
    with pytest.raises(RegistryInUseError, match="spare"):
        async with asyncio.timeout(30):
            await _impatient(url)


async def _impatient(url: str) -> None:
    """The lease above is never renewed; here somebody does it."""
    renewing = subprocess.Popen([sys.executable, "-c", _RENEW, url], env=_environment())  # noqa: ASYNC220
    try:
        await Database.open(url)
    finally:
        renewing.kill()
        await asyncio.to_thread(renewing.wait)


async def test_what_was_begun_before_the_take_over_is_not_kept(url: str, database: Database) -> None:
    """The term is looked for inside of each transaction, not before it."""
    await database.transact(lambda c: c.execute(text("UPDATE lease SET term = term + 1, instance = 'x'")))
    with pytest.raises(RegistryInUseError):
        await database.transact(lambda c: c.execute(text("UPDATE lease SET agent_id = 'mine'")))
    engine_free = await _agent_id(url)
    assert engine_free == "hq"


async def _agent_id(url: str) -> str:
    def look() -> str:
        from sqlalchemy import create_engine

        engine = create_engine(url)
        try:
            with engine.connect() as c:
                return str(c.scalar(text("SELECT agent_id FROM lease")))
        finally:
            engine.dispose()

    return await asyncio.to_thread(look)


async def test_a_lease_that_is_not_renewed_is_not_relied_on(url: str) -> None:
    clock = ManualClock()
    database = await Database.open(url, clock=clock)
    assert database._renewing is not None
    database._renewing.cancel()
    leads = []
    for step_s in (0.0, TRUST_S - 0.1, 0.2):
        await clock.advance(step_s)
        leads.append(database.leads)
    assert leads == [True, True, False]
    assert await database.transact(lambda _: 7) == 7, "the registry itself still says that it is ours"
    await database.close()


_HOLD = (
    "import asyncio, sys\n"
    "from key_agent.registry.database import Database\n"
    "async def main():\n"
    "    database = await Database.open(sys.argv[1], agent_id='first')\n"
    "    print('open', flush=True)\n"
    "    await asyncio.Event().wait()\n"
    "asyncio.run(main())\n"
)
_RENEW = (
    "import sys, time\n"
    "from sqlalchemy import create_engine, text\n"
    "engine = create_engine(sys.argv[1])\n"
    "while True:\n"
    "    with engine.begin() as c: c.execute(text('UPDATE lease SET renewals = renewals + 1'))\n"
    "    time.sleep(0.5)\n"
)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


@contextmanager
def _holder(url: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, url], stdout=subprocess.PIPE, env=_environment())
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


async def _patiently(_: Holding | RegistryError) -> None:
    """Stand by."""


async def test_who_stands_by_leads_as_soon_as_the_other_is_dead(url: str) -> None:
    seen: list[Holding] = []
    stood_by = asyncio.Event()

    async def on_standby(holding: Holding | RegistryError) -> None:
        assert isinstance(holding, Holding)
        seen.append(holding)
        stood_by.set()

    with _holder(url) as first:
        waiting = asyncio.create_task(Database.open(url, agent_id="second", on_standby=on_standby))
        await stood_by.wait()
        assert seen[0].agent_id == "first"
        first.kill()
        async with asyncio.timeout(30):
            database = await waiting
    assert database.term == seen[0].term + 1
    await database.close()


async def test_a_frozen_leader_is_followed_and_finds_out(url: str) -> None:
    with _holder(url) as first:
        first.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(60):
            database = await Database.open(url, agent_id="second", on_standby=_patiently)
        first.send_signal(signal.SIGCONT)
        # The first one renews when it wakes, in vain: the lease stays with the second.
        term = database.term
        for _ in range(3):
            await asyncio.sleep(RENEW_S / 2)
            await database.transact(lambda _: None)
        holding = await database.read_lease()
        assert holding is not None
        assert (holding.agent_id, holding.term) == ("second", term)
        await database.close()


async def test_a_closed_one_is_followed_at_once(url: str) -> None:
    first = await Database.open(url)
    await first.close()
    with pytest.raises(RegistryError, match="closed"):
        await first.transact(lambda _: None)
    second = await Database.open(url)
    assert second.term == 2
    await second.close()
