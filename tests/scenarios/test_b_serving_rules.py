"""B-11: HAProxy spreads callers by its three rules, as the lb-agent tells it by what it reads and measures.

1. Agents, their signed rows, the lb-agent and HAProxy are real; behind HAProxy stand small servers that say
   who they are, one for each environment.
2. Callers ask one after the other: then nothing but HAProxy's choice decides who answers, not who is busy.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.lb_agent import LbAgent
from key_agent.load_balancing.settings import AgentAddress, Rule
from runtime.clock import SystemClock
from tests.environments.fault_proxy import FaultProxy
from tests.environments.members import members
from tests.environments.site import until
from tests.key_agent.load_balancing.balanced import (
    Caller,
    DataPlane,
    haproxy_running,
    planes_running,
    settings_for,
    until_answers,
)
from tests.pki import make_tenant, write_certificate, write_credential

GEO: Final = {"a": "us", "b": "eu", "c": "eu"}
REQUESTS: Final = 6000
CHI_SQUARE: Final = 9.21
"""Of two degrees of freedom: what is above has p < 0.01."""


@asynccontextmanager
async def balanced(directory: Path, rule: Rule) -> AsyncIterator[tuple[Caller, dict[str, FaultProxy]]]:
    """A caller of HAProxy, and the network between HAProxy (and the lb-agent) and each environment."""
    tenant = make_tenant("acme")
    planes = [DataPlane(name, GEO[name]) for name in GEO]
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(members(directory, tenant, "abc"))
        await site.unite()
        await stack.enter_async_context(planes_running(planes))
        networks = {plane.name: await stack.enter_async_context(FaultProxy(plane.port)) for plane in planes}
        base = settings_for(planes, directory, rule=rule)
        files = write_credential(tenant.balancer("lb-1"), directory, "lb")
        settings = msgspec.structs.replace(
            base,
            lb_agent=msgspec.structs.replace(
                base.lb_agent,
                root_certificate_file=write_certificate(tenant.root.certificate, directory / "root.pem"),
                certificate_file=files[0],
                key_file=files[1],
            ),
            agents=tuple(
                AgentAddress(
                    id=member.agent_id,
                    url=member.url,
                    registry_key=member.peering.view.environments[member.name].registry_key,
                )
                for member in (site["a"], site["b"])
            ),
            servers=tuple(
                msgspec.structs.replace(
                    server,
                    address=f"127.0.0.1:{networks[server.name].port}",
                    status_url=f"http://127.0.0.1:{networks[server.name].port}",
                )
                for server in base.servers
            ),
        )
        agent = LbAgent(settings, root=tenant.root.certificate, clock=SystemClock())
        running = asyncio.create_task(agent.run(), name="lb-agent")
        try:
            await stack.enter_async_context(haproxy_running(haproxy_config(settings), directory))
            caller = await stack.enter_async_context(Caller(settings.frontend.bind))
            await until_answers(caller, set(GEO), timeout_s=60)
            yield caller, networks
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_b_11_random_gives_each_the_same(tmp_path: Path) -> None:
    """A fair HAProxy is found unfair once in a hundred by p < 0.01: that three times is once in a million."""
    async with balanced(tmp_path, Rule.RANDOM) as (caller, _):
        seen = []
        for _ in range(3):
            found = await caller.count(REQUESTS)
            assert set(found) == set(GEO), "every call was answered"
            share = REQUESTS / len(GEO)
            seen.append(sum((found[name] - share) ** 2 / share for name in GEO))
            if seen[-1] < CHI_SQUARE:
                return
        raise AssertionError(seen)


async def test_b_11_geography_is_exact(tmp_path: Path) -> None:
    async with balanced(tmp_path, Rule.GEO) as (caller, _):
        assert set(await caller.count(300, "us")) == {"a"}
        assert set(await caller.count(300, "EU")) == {"b", "c"}
        assert set(await caller.count(100, "mars")) == set(GEO), "no such place: any of them"


async def test_b_11_an_environment_that_is_50_ms_further_away_gets_less_than_a_fifth(tmp_path: Path) -> None:
    """Where all are equally near each gets a third: 80 of 400 are six standard deviations away from it."""
    async with balanced(tmp_path, Rule.LATENCY) as (caller, networks):
        networks["b"].latency_s = 0.025  # in each direction

        async def gets_less() -> bool:
            found = await caller.count(400)
            assert set(found) == set(GEO), "less is not nothing"
            return found["b"] < 400 / 5

        await until(gets_less)
        networks["b"].latency_s = 0.0

        async def has_its_part_again() -> bool:
            return (await caller.count(400))["b"] > 400 / 5

        await until(has_its_part_again)
