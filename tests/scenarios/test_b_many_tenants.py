"""B-56: a hundred tenants at one proxy, and what happens to one of them is nothing to the others.

1. The proxy is a process, as every tenant's agent could be one; the agents are in this process, for memory:
   registry, TLS, push, shared rows and audit log are real, the HSM is the fake one.
2. One site, in the order of this file. Programs of all tenants seal and open from the first test to the last.
3. Compared is what proxy and agents say of each other tenant before and after: state, position, keys,
   versions. How long it took is printed and, measured, in docs/environments.md: no bound is about speed.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.environments.site import REPOSITORY, until
from tests.scenarios.many_tenants import PROXY, VALIDITY_S, Call, ManyTenants, SiteTenant, many_tenants

pytestmark = pytest.mark.asyncio(loop_scope="module")

TENANTS: Final = 100
BREACHED, REVOKED, HOSTILE, REVOKED_LATER = "t050", "t020", "t070", "t090"
CONNECTIONS: Final = 1000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ManyTenants]:
    async with many_tenants(tmp_path_factory.mktemp("tenants"), count=TENANTS, rival=BREACHED) as made:
        yield made


async def _state(site: ManyTenants, tenants: Iterable[SiteTenant]) -> dict[tuple[str, str], str]:
    """By tenant and kind: everything about it that no time is in, as text."""
    words, can_seal = await site.words(), await site.can_seal()
    found: dict[tuple[str, str], object] = {}
    for one in tenants:
        agent, name = one.agent.agent, one.name
        found[name, "word"] = words[name]
        found[name, "can seal"] = can_seal[name]
        found[name, "told to programs"] = await site.keys(one)
        found[name, "keys"] = [(str(key.key_id), key.state) for key in await agent.registry.data_keys()]
        found[name, "shared"] = str(one.agent.shared)
        found[name, "consent"] = [agent.consent.standing, agent.consent.environment]
    return {place: json.dumps(told, sort_keys=True) for place, told in found.items()}


@asynccontextmanager
async def _untouched(site: ManyTenants, *names: str) -> AsyncIterator[list[Call]]:
    """What the block does to the tenants *names* is nothing to any other; the others' calls meanwhile."""
    others = site.others(*names)
    before, marks = await _state(site, others), {one.name: len(one.calls) for one in others}
    recorded = len(site.recorded())
    calls: list[Call] = []
    yield calls
    await site.calling(3, others)
    now = await _state(site, others)
    assert not {place: (before[place], told) for place, told in now.items() if told != before[place]}
    for one in others:
        mine = one.calls[marks[one.name] :]
        assert {call.status for call in mine} == {200}, one.name
        assert {call.key_id for call in one.calls} == {one.calls[0].key_id}, one.name
        calls += mine
    tenants = {one.name for one in others}
    touched = {
        (str(event.get("tenant") or str(event.get("service")).partition("/")[0]), event["action"])
        for event in site.recorded()[recorded:]
    }
    ordinary = {"keys-accepted", "push-session-opened", "service-call"}
    assert {action for tenant, action in touched if tenant in tenants} <= ordinary


async def _refused(site: ManyTenants, one: SiteTenant) -> float:
    """Seconds until the proxy refuses this tenant's program."""

    async def refuses() -> bool:
        await one.call(site.session, "encrypt", {"key": "files", "plaintext": "aGVsbG8="})
        return one.calls[-1].status == 503

    return await until(refuses, timeout_s=60)


def _times(calls: Sequence[Call]) -> str:
    took = sorted(call.took_s * 1000 for call in calls)
    return (
        f"{len(took)} calls of others: median {took[len(took) // 2]:.0f} ms, "
        f"99 % {took[len(took) * 99 // 100]:.0f} ms, worst {took[-1]:.0f} ms"
    )


async def test_all_are_served(site: ManyTenants) -> None:
    async with _untouched(site) as calls:
        pass
    print(f"\nnothing happens: {_times(calls)}")
    assert len({one.calls[0].key_id for one in site.tenants.values()}) == TENANTS


async def test_an_incident_is_one_tenants_alone(site: ManyTenants) -> None:
    breached = site[BREACHED]
    async with _untouched(site, BREACHED) as calls:
        opening = asyncio.create_task(
            breached.agents["b"].operations.incident_open(
                environment="a", kind="runtime", reason="a test", by="test"
            )
        )
        print(f"\nincident: refused after {await _refused(site, breached):.2f} s")
        await opening
    print(_times(calls))
    assert (await site.words())[BREACHED]["state"] == "healing"
    assert (await site.can_seal())[BREACHED] == 0


async def test_a_kill_switch_is_one_tenants_alone(site: ManyTenants) -> None:
    async with _untouched(site, BREACHED, REVOKED) as calls:
        revoking = asyncio.create_task(site[REVOKED].agent.operations.kek_revoke())
        print(f"\nkill switch: refused after {await _refused(site, site[REVOKED]):.2f} s")
        await revoking
    print(_times(calls))
    assert (await site.can_seal())[REVOKED] == 0


@asynccontextmanager
async def _flood(site: ManyTenants, one: SiteTenant) -> AsyncIterator[dict[str, Any]]:
    """That tenant's agent floods the proxy while the block runs; then, by status, what it was answered."""
    tls = one.agent.settings.tls
    words = [str(site.push_port), str(site.ca_file), str(tls.certificate_file), str(tls.key_file)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.scenarios.flooder", *words, str(CONNECTIONS),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    answers: dict[str, Any] = {}
    try:
        assert await process.stdout.readline() == b"floods\n"
        yield answers
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        out = await process.stdout.read()
        await process.wait()
    answers |= json.loads(out)


async def test_a_flood_of_one_tenant_delays_no_refresh_of_another(site: ManyTenants) -> None:
    gone = (BREACHED, REVOKED, HOSTILE, REVOKED_LATER)
    async with _flood(site, site[HOSTILE]) as answers:
        async with _untouched(site, *gone) as calls:
            agents = [one.agent.agent for one in site.others(*gone)]
            before = [agent.deliveries[PROXY] for agent in agents]
            for agent in agents:
                agent.refresh.at_once()

            async def refreshed() -> bool:
                return all(
                    (now := agent.deliveries[PROXY]) is not last and now.is_complete
                    for agent, last in zip(agents, before, strict=True)
                )

            # Their keys end after VALIDITY_S; a push that fails is tried again until then.
            taken_s = await until(refreshed, timeout_s=min(120, VALIDITY_S))
            print(f"\nflood: all {len(agents)} others refreshed after {taken_s:.1f} s")
        print(_times(calls))
        revoking = asyncio.create_task(site[REVOKED_LATER].agent.operations.kek_revoke())
        print(f"kill switch meanwhile: refused after {await _refused(site, site[REVOKED_LATER]):.2f} s")
        await revoking
    print(answers)
    assert answers
