"""The lb-agent between real agents (their peering and their signed rows), real servers and a real HAProxy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import override

import msgspec
import pytest

from envelope.certificates import Role
from key_agent.environments.acknowledgements import LB_ACK_PATH, LbAck
from key_agent.environments.documents import EnvironmentBody, Kind
from key_agent.environments.peer_api import PeerCall, PeerRoute
from key_agent.environments.shared import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.lb_agent import LbAgent, watch
from key_agent.load_balancing.settings import AgentAddress, Settings
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
from tests.pki import make_tenant, write_certificate, write_credential
from tests.ports import free_port


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
    await asyncio.sleep(1)
    assert doubting.line("a") == "down #unknown\n"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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


async def test_the_watchdog_acts_when_the_lb_agent_is_gone(world: World, tmp_path: Path) -> None:
    """B-52: HAProxy leaves a server as it was when its agent is silent; the watchdog does not."""
    settings, mine = world.settings, world.settings.lb_agent
    async with (
        haproxy_running(haproxy_config(settings), tmp_path),
        Caller(settings.frontend.bind) as caller,
    ):
        await until_answers(caller, {"a", "b", "c"})
        servers = [server.name for server in settings.servers]
        dog = asyncio.create_task(
            watch(
                host=mine.host,
                port=free_port(),
                servers=servers,
                socket_path=str(settings.frontend.stats_socket),
                clock=SystemClock(),
                every_s=0.1,
            )
        )
        seen: set[str] = set()
        async with asyncio.timeout(20):
            while "503" not in seen:
                seen |= set(await caller.count(6))
        dog.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await dog
        await until_answers(caller, {"a", "b", "c"})  # the next `up` undoes it
