"""The lb-agent between real agents (their peering and their signed rows), real servers and a real HAProxy."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import override

import msgspec
import pytest
from cryptography import x509

from envelope.certificates import Role
from key_agent.environments.incidents.acknowledgements import LB_ACK_PATH, LbAck
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute
from key_agent.environments.shared.documents import EnvironmentBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.lb_agent import LbAgent
from key_agent.load_balancing.settings import AgentAddress, Settings
from key_agent.load_balancing.sights import LbStatus, Word
from runtime.clock import SystemClock
from tests.environments.members import Member, MembersSite, members
from tests.key_agent.conftest import until
from tests.key_agent.load_balancing.balanced import (
    Caller,
    DataPlane,
    haproxy_running,
    planes_running,
    settings_for,
    until_answers,
)
from tests.key_agent.push.revocation_lists import make_list, write_lists
from tests.pki import make_tenant, write_certificate, write_credential


class World:
    def __init__(self, site: MembersSite, planes: list[DataPlane], settings: Settings) -> None:
        self.site = site
        self.planes = {plane.name: plane for plane in planes}
        self.settings = settings
        self.acks: list[tuple[str, LbAck]] = []
        self.agent = LbAgent(settings, root=site.tenant.root.certificate, clock=SystemClock())

    def says(self, name: str) -> str:
        return self.agent.line(name).strip()

    async def state(self, name: str, state: EnvironmentState) -> None:
        def change(draft: Draft) -> None:
            body: EnvironmentBody = draft.shared.environments[name]
            draft.put(
                Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=state, since_ms=draft.now_ms)
            )

        await self.site["a"].change(change)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    tenant = make_tenant("acme")
    acks: list[tuple[str, LbAck]] = []

    def prepare(member: Member) -> None:
        async def take(call: PeerCall) -> bytes:
            assert call.agent_id == "lb-1"
            acks.append((member.name, msgspec.json.decode(call.body, type=LbAck)))
            return b"{}"

        member.environments.routes.append(
            PeerRoute("POST", LB_ACK_PATH, take, members_only=False, roles=frozenset({Role.BALANCER}))
        )

    async with members(tmp_path, tenant, "abc", prepare=prepare) as site:
        await site.unite()
        planes = [DataPlane(name) for name in "abc"]
        root_file = write_certificate(tenant.root.certificate, tmp_path / "root.pem")
        files = write_credential(tenant.balancer("lb-1"), tmp_path, "lb")
        base = settings_for(planes, tmp_path)
        mine = msgspec.structs.replace(
            base.lb_agent, root_certificate_file=root_file, certificate_file=files[0], key_file=files[1]
        )
        agents = tuple(
            AgentAddress(
                id=member.agent_id,
                url=member.url,
                registry_key=member.peering.view.environments[member.name].registry_key,
            )
            for member in (site["a"], site["b"])
        )
        settings = msgspec.structs.replace(base, lb_agent=mine, agents=agents)
        async with planes_running(planes):
            world = World(site, planes, settings)
            world.acks = acks
            task = asyncio.create_task(world.agent.run())
            try:
                yield world
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_the_worst_of_both_is_answered_and_acknowledged(world: World) -> None:
    await until(lambda: {world.says(name) for name in "abc"} == {"up ready 100%"})
    world.planes["b"].serves, world.planes["b"].state = False, "healing"
    await until(lambda: world.says("b") == "down #healing")
    world.planes["b"].serves = True
    await until(lambda: world.says("b") == "up ready 100%")
    await world.state("c", EnvironmentState.HEALING)
    await until(lambda: world.says("c") == "down #healing")
    epoch = world.site["a"].peering.view.epoch
    await until(lambda: {name for name, ack in world.acks if ack.epoch >= epoch} == {"a", "b"})
    assert next(ack for _, ack in world.acks if ack.epoch >= epoch).answers["c"] == "down #healing"
    assert world.says("d") == "down #unknown"
    await world.state("c", EnvironmentState.REJOINING)
    await until(lambda: world.says("c") == "down #rejoining")
    await world.state("c", EnvironmentState.DRAINING)
    await until(lambda: world.says("c") == "drain")


async def test_a_server_that_says_what_has_no_bottom_says_nothing(world: World) -> None:
    """Its word is unauthenticated, and must not end the companion, which speaks for all the others."""
    await until(lambda: world.says("b") == "up ready 100%")
    for says in (b'{"x":' + b"[" * 60_000, b"\xff\xfe", b"[]"):
        world.planes["b"].says = says
        await until(lambda: world.says("b").startswith("down"))
        world.planes["b"].says = None
        await until(lambda: world.says("b") == "up ready 100%")


async def test_one_agent_that_is_silent_hides_nothing(world: World) -> None:
    await until(lambda: world.says("a") == "up ready 100%")
    await world.site["b"].stop()
    await world.state("c", EnvironmentState.HEALING)
    await until(lambda: world.says("c") == "down #healing")
    assert world.says("a") == "up ready 100%"


async def test_without_a_word_of_any_agent_everything_is_down(world: World) -> None:
    await until(lambda: world.says("a") == "up ready 100%")
    for member in world.site.members.values():
        await member.stop()
    world.agent._clock = _Ahead(world.settings.lb_agent.stale_s + 1)
    assert {world.says(name) for name in "abc"} == {"down #unknown"}


class _Ahead(SystemClock):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self._seconds


async def test_rows_that_nobody_signed_move_nothing(world: World, tmp_path: Path) -> None:
    """An lb-agent whose settings name other keys believes no agent at all."""
    other = tuple(
        msgspec.structs.replace(agent, registry_key=world.settings.agents[1 - index].registry_key)
        for index, agent in enumerate(world.settings.agents)
    )
    mine = msgspec.structs.replace(world.settings.lb_agent, port=0, state_file=tmp_path / "other.rows")
    doubting = LbAgent(
        msgspec.structs.replace(world.settings, agents=other, lb_agent=mine),
        root=world.site.tenant.root.certificate,
        clock=SystemClock(),
    )
    task = asyncio.create_task(doubting.run())
    await until(lambda: world.says("a") == "up ready 100%")
    await until(lambda: {one.word for one in doubting.status().agents} == {Word.DOUBTED})
    assert doubting.line("a") == "down #unknown\n"
    told = doubting.status()
    assert told.stale == "no agent's rows were believed since this program began"
    assert all(one.cause and one.heard_s is None for one in told.agents)
    assert {one.answer for one in told.servers} == {"down #unknown"}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_asks_is_told_whom_it_believes(world: World) -> None:
    """By the port that HAProxy asks; `key-agent lb status` shows the same."""
    await until(lambda: world.says("a") == "up ready 100%")
    await world.site["b"].stop()
    world.planes["c"].reason = "INC-7\x1b[2J" + "x" * 1000
    world.planes["c"].serves, world.planes["c"].state = False, "healing"

    async def told() -> LbStatus:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.agent.port)
        writer.write(b"?status\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return msgspec.json.decode(line, type=LbStatus)

    found = await told()
    async with asyncio.timeout(30):
        while found.agents[1].word is not Word.UNREACHED or found.servers[2].says != "healing":
            found = await told()
    assert found.agents[0].word is Word.BELIEVED
    assert found.stale is None
    assert found.epoch == world.site["a"].peering.view.epoch
    assert [one.answer for one in found.servers] == ["up ready 100%", "up ready 100%", "down #healing"]
    assert found.servers[0].reason is None
    assert (found.servers[2].reason or "").startswith("INC-7[2Jxxx"), "without what a terminal would act on"
    assert len(found.servers[2].reason or "") < 200
    assert found.agents[1].cause is not None
    assert found.agents[1].heard_s is not None, "it was heard before"


async def test_an_hsm_that_is_silent_drains_its_environment_but_not_the_last_one(world: World) -> None:
    await until(lambda: world.says("a") == "up ready 100%")
    world.planes["a"].state = "draining"
    await until(lambda: world.says("a") == "drain")
    assert world.says("b") == "up ready 100%"
    for name in "bc":
        world.planes[name].state = "draining"
    await until(lambda: {world.says(name) for name in "abc"} == {"up ready 100%"})
    world.planes["b"].state = "active"
    await until(lambda: [world.says(name) for name in "abc"] == ["drain", "up ready 100%", "drain"])


async def test_an_agent_that_the_root_has_taken_back_is_not_believed(world: World, tmp_path: Path) -> None:
    """B's certificate is listed while a connection to it is open; then the list itself is too old."""
    tenant, site = world.site.tenant, world.site
    listed = tmp_path / "crl.pem"
    now = datetime.now(UTC) - timedelta(seconds=20)
    write_lists(listed, make_list(tenant.root, last_update=now, days=1))
    clock = _Hasty()
    mine = msgspec.structs.replace(
        world.settings.lb_agent, port=0, state_file=tmp_path / "other.rows", revocation_list_file=listed
    )
    companion = LbAgent(
        msgspec.structs.replace(world.settings, lb_agent=mine),
        root=tenant.root.certificate,
        clock=clock,
    )
    task = asyncio.create_task(companion.run())
    try:
        await until(lambda: companion.line("a") == "up ready 100%\n", timeout_s=30)
        await until(lambda: {one.word for one in companion.status().agents} == {Word.BELIEVED}, timeout_s=30)
        revoked = x509.load_pem_x509_certificate(site["b"].files[0].read_bytes())
        write_lists(listed, make_list(tenant.root, [revoked], last_update=now + timedelta(seconds=1), days=1))
        await until(lambda: companion.status().agents[1].word is Word.UNREACHED, timeout_s=30)
        assert "revoked" in str(companion.status().agents[1].cause)
        assert companion.status().agents[0].word is Word.BELIEVED
        clock.ahead_s = 2 * 86400.0
        await until(lambda: "ended" in str(companion.status().agents[0].cause), timeout_s=30)
        assert companion.line("a") == "down #unknown\n"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Hasty(SystemClock):
    """Wakes early; its wall clock can be ahead."""

    ahead_s = 0.0

    @override
    def wall_s(self) -> float:
        return super().wall_s() + self.ahead_s

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self.ahead_s

    @override
    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(min(delay_s, 0.1))


async def test_a_breach_is_invisible_to_callers(world: World, tmp_path: Path) -> None:
    """Self-refusal, agent-check and redispatch together, with callers all the time (B-23)."""
    async with (
        haproxy_running(haproxy_config(world.settings), tmp_path),
        Caller(world.settings.frontend.bind) as caller,
    ):
        await until_answers(caller, {"a", "b", "c"})
        results: list[tuple[int, str]] = []
        over = asyncio.Event()

        async def call() -> None:
            while not over.is_set():
                status, who, _ = await caller.ask()
                results.append((status, who))

        callers = [asyncio.create_task(call()) for _ in range(8)]
        await until(lambda: len(results) > 200)
        world.planes["a"].serves, world.planes["a"].state = False, "healing"
        await world.state("a", EnvironmentState.HEALING)
        mark = len(results)
        await until(lambda: world.says("a") == "down #healing")
        await until(lambda: len(results) > mark + 500)
        over.set()
        await asyncio.gather(*callers)
        assert {status for status, _ in results} == {200}
        # What was answered already when the change was made may still arrive.
        assert "a" not in {who for _, who in results[mark + 16 :]}
