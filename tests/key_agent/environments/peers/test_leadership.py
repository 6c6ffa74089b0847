"""Elections against three real etcd members; what a frozen or cut-off leader still believes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import override

import pytest

from key_agent.environments.peers.etcd import EtcdClient, EtcdError, EtcdSettings
from key_agent.environments.peers.leadership import MARGIN_S, Appointed, Candidate, Elected
from key_agent.environments.shared.terms import Holder
from runtime.clock import SystemClock
from tests.environments.fault_proxy import Fault, FaultProxy
from tests.etcd_cluster import EtcdCluster
from tests.key_agent.conftest import until

LEASE_S = 12
"""Whoever leads is trusted for all but MARGIN_S of it. Meanwhile etcd has to elect anew when its own leader
is killed (its election time-out is 1 s here, and again if nobody wins), on a machine that has other work.
"""
SHORT_LEASE_S = 3
"""Where nothing but the end of a lease is waited for. etcd rounds lower ones up."""
WAIT_S = LEASE_S + 40
"""A lease that could not be given back ends by itself."""


def settings(urls: tuple[str, ...], lease_s: int = LEASE_S) -> EtcdSettings:
    return EtcdSettings(urls=urls, lease_s=lease_s, keep_alive_s=0.5, request_timeout_s=0.5)


class Agent:
    """One that stands for election."""

    def __init__(
        self, name: str, urls: tuple[str, ...], clock: SystemClock, *, lease_s: int = LEASE_S
    ) -> None:
        self.name = name
        self.highest = 0
        self.may_lead = True
        self.terms: list[int] = []
        self.failure: Exception | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.client = EtcdClient(settings(urls, lease_s))
        self.leadership = Elected(
            self.client,
            settings(urls, lease_s),
            tenant="acme",
            candidate=Candidate(name, f"env-{name}"),
            clock=clock,
            highest_term=lambda: self.highest,
            may_lead=lambda: self.may_lead,
            elected=self._elected,
        )

    def term(self) -> int | None:
        return self.leadership.term

    async def _elected(self, term: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.terms.append(term)
        await self.hold.wait()

    @contextlib.asynccontextmanager
    async def standing(self) -> AsyncIterator["Agent"]:
        task = asyncio.create_task(self.leadership.run(), name=f"election:{self.name}")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            await self.client.close()


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[EtcdCluster]:
    async with EtcdCluster(tmp_path) as cluster:
        yield cluster


async def test_one_leads_and_the_next_follows_with_a_higher_term(etcd: EtcdCluster) -> None:
    clock = SystemClock()
    a, b = Agent("a", etcd.urls, clock), Agent("b", etcd.urls, clock)
    a.highest = 40  # terms that were appointed before etcd came
    async with b.standing():
        async with a.standing():
            await until(lambda: a.term() or b.term(), timeout_s=WAIT_S)
            first, second = (a, b) if a.term() else (b, a)
            await until(lambda: second.leadership.leader == first.name, timeout_s=WAIT_S)
            await until(lambda: first.terms, timeout_s=WAIT_S)
            assert second.term() is None
            assert first.term() == first.terms[-1]
            # Its environment is breached: it hands over, and does not come back.
            first.may_lead = False
            await until(second.term, timeout_s=WAIT_S)
            assert first.term() is None
            assert second.terms[-1] > first.terms[-1]
            assert all(term > 40 for term in a.terms)
            first.may_lead = True
            held = second.terms[-1]
        if second is a:  # it resigned when it ended
            await until(b.term, timeout_s=WAIT_S)
            assert b.terms[-1] > held


async def test_a_leader_cut_off_from_etcd_counts_itself_out_before_another_leads(etcd: EtcdCluster) -> None:
    """And one member killed changes nothing: the others are a majority."""
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(FaultProxy(int(url.rpartition(":")[2]))) for url in etcd.urls]
        a = Agent("a", tuple(f"http://127.0.0.1:{way.port}" for way in ways), clock)
        await stack.enter_async_context(a.standing())
        await until(a.term, timeout_s=WAIT_S)
        b = await stack.enter_async_context(Agent("b", etcd.urls, clock).standing())
        led = a.term()
        etcd.members[0].kill()
        killed_boot_s = clock.boot_s()
        await until(lambda: (a.leadership.proven_boot_s or 0) > killed_boot_s, timeout_s=WAIT_S)
        assert a.term() == led
        overlap = False

        def followed() -> bool:
            nonlocal overlap
            overlap = overlap or (a.term() is not None and b.term() is not None)
            return b.term() is not None

        for way in ways:
            way.inject(Fault.BLACK_HOLE)
        await until(followed, timeout_s=WAIT_S)
        assert not overlap
        assert a.term() is None
        assert b.terms[-1] > a.terms[-1]
        assert a.leadership.problem is not None
        for way in ways:
            way.inject(Fault.NONE)
        await until(lambda: a.leadership.problem is None and a.leadership.leader == "b", timeout_s=WAIT_S)
        assert a.term() is None


async def test_without_a_majority_nobody_leads(etcd: EtcdCluster) -> None:
    async with Agent("a", etcd.urls, SystemClock(), lease_s=SHORT_LEASE_S).standing() as a:
        await until(a.term, timeout_s=WAIT_S)
        for member in etcd.members[:2]:
            member.freeze()
        await until(lambda: a.term() is None, timeout_s=WAIT_S)
        for member in etcd.members[:2]:
            member.thaw()
        await until(a.term, timeout_s=WAIT_S)


async def test_nobody_leads_before_the_registry_knows_of_the_term(etcd: EtcdCluster) -> None:
    a = Agent("a", etcd.urls, SystemClock())
    a.hold.clear()
    async with a.standing():
        await until(lambda: a.terms, timeout_s=WAIT_S)
        assert (a.term(), a.leadership.proven_boot_s) == (None, None)
        a.hold.set()
        await until(a.term, timeout_s=WAIT_S)


async def test_a_term_that_cannot_be_used_is_given_back(etcd: EtcdCluster) -> None:
    """The registry does not take it (it is frozen, tampered with ...): another one leads."""
    clock = SystemClock()
    a = Agent("a", etcd.urls, clock, lease_s=SHORT_LEASE_S)
    a.failure = RuntimeError("the registry is gone")
    async with a.standing():
        await until(lambda: a.leadership.leader == "a", timeout_s=WAIT_S)
        assert a.term() is None
        async with Agent("b", etcd.urls, clock, lease_s=SHORT_LEASE_S).standing() as b:
            await until(b.term, timeout_s=WAIT_S)


class FrozenClock(SystemClock):
    """What a process sees that was stopped for a while: its boot clock has moved on, nothing else has."""

    stopped_s = 0.0

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self.stopped_s


async def test_what_a_frozen_process_believed_is_over_when_it_goes_on(etcd: EtcdCluster) -> None:
    clock = FrozenClock()
    async with Agent("a", etcd.urls, clock).standing() as a:
        await until(a.term, timeout_s=WAIT_S)
        clock.stopped_s += LEASE_S - MARGIN_S
        assert a.term() is None  # before anything else of it has run


async def test_a_silent_etcd_keeps_whoever_asks_about_a_term_no_longer_than_its_bound() -> None:
    """The shared registry is locked meanwhile; each member alone may take as long as all may together."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.read(-1)

    asked = Holder(term=9, start=1, agent="agent-a", environment="a", registry_key="", digest=b"")
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(await asyncio.start_server(silent, "127.0.0.1", 0))
            for _ in range(3)
        ]
        agent = Agent(
            "b",
            tuple(f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}" for one in servers),
            SystemClock(),
        )
        async with agent.client:
            with pytest.raises(EtcdError, match=r"more than 0.5 s together"):
                await agent.leadership.confirm(asked)


async def test_an_etcd_that_answers_nonsense_gives_nobody_a_term() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"succeeded": true, "header": {"revision": -1}}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with EtcdClient(settings((url,))) as client:
            with pytest.raises(EtcdError):
                await client.create("/key", b"value", 7)
            with pytest.raises(EtcdError):
                await client.keep_alive(7)


def test_who_is_appointed_leads() -> None:
    current: tuple[int, str] | None = None
    leadership = Appointed("a", lambda: current)
    assert leadership.term is None
    for found, term in (((3, "b"), None), ((4, "a"), 4), (None, None)):
        current = found
        assert leadership.term == term
    assert leadership.proven_boot_s is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"urls": ()}, "at least one"),
        ({"urls": ("http://etcd.example:2379",)}, "https"),
        ({"urls": ("https://etcd.example:2379",)}, "ca_file"),
        ({"urls": ("http://127.0.0.1:1",), "key_file": Path("k")}, "belong together"),
        ({"urls": ("http://127.0.0.1:1",), "keep_alive_s": 6.0}, "a third"),
        ({"urls": ("http://127.0.0.1:1",), "request_timeout_s": 9.0}, "at most keep_alive_s"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, object], word: str) -> None:
    make: Callable[..., EtcdSettings] = EtcdSettings
    with pytest.raises(ValueError, match=word):
        make(**fields)
