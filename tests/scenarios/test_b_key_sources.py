"""B-49: an HSM or key server that denies, disables, throttles or is away: four answers, four reactions.

1. b has its KEK in a real OpenBao, whose owner's hand the test is; a and c have SoftHSM. Callers go through
   HAProxy all the time and see no error.
2. Of throttled, denied and away no key is taken back: what b's proxy has goes on. Disabled takes it back.
3. Every state is seen where people look: the agent's page, its /readyz and metrics, its log, `lb status`.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from key_agent.sources.verdict import NEXT_STEPS, Verdict
from tests.environments.administrators import Commands
from tests.environments.site import SiteEnvironment, until
from tests.integration.key_residue import children_of
from tests.key_servers import BaoServer, running
from tests.scenarios.balanced_site import KEY, Balanced, balanced_site, more_calls
from tests.scenarios.disturbances import hanging

pytestmark = pytest.mark.asyncio(loop_scope="module")

VALIDITY_S: Final = 90
NOTHING: Final = 'path "transit/random/*" { capabilities = ["update"] }'


@pytest.fixture(scope="module", name="bao")
def bao_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaoServer]:
    with running(BaoServer(tmp_path_factory.mktemp("key-server") / "bao")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="site")
async def site_fixture(tmp_path_factory: pytest.TempPathFactory, bao: BaoServer) -> AsyncIterator[Balanced]:
    # A machine with other work lets bao wait for a processor: that is not what is tested here.
    table = f"""[openbao]
        url = "{bao.url}"
        ca_file = "{bao.ca_file}"
        token_file = "{bao.token_file}"
        slow_after_s = 9
    """
    async with balanced_site(
        tmp_path_factory.mktemp("key-sources"),
        kinds={"a": "aes-256", "b": "aes-256", "c": "ec-p256"},
        rhythm=(20, VALIDITY_S, 0.3),
        key_servers={"b": table},
    ) as made:
        yield made


async def test_b_49_throttled_and_a_wrong_pin(site: Balanced, bao: BaoServer) -> None:
    """b is throttled, and nothing follows but that it asks less; c's HSM refuses its PIN, and c drains."""
    b, c = site["b"], site["c"]
    pin = c.hsm.pin_file.read_text()
    async with site.calling(count=4) as callers:
        bao.throttle(rate=1, interval_s=2)
        await seen(site, b, "throttled", Verdict.THROTTLED)
        looks = await looks_of(b, Verdict.THROTTLED)
        await until(lambda: is_more(b, Verdict.THROTTLED, looks + 1), timeout_s=60)
        assert (await status_of(site, "b"))["answer"].startswith("up ready"), "it is not drained"
        assert await site.is_up("a", "b", "c")
        assert await site.serve("b")

        c.hsm.pin_file.write_text("999999")
        with hanging(c.hsm):  # who is killed while SoftHSM writes leaves no token behind
            for worker in children_of(c.agent.pid):
                os.kill(worker, signal.SIGKILL)  # the next one logs in
        await seen(site, c, "login-refused", Verdict.AUTH_PIN)
        await until(lambda: site.is_up("a", "b"), timeout_s=60)
        assert (await status_of(site, "c"))["answer"] == "drain"
        assert await site.serve("a", "b", "c"), "what they have goes on"
        await more_calls(callers, 40)

        bao.throttle(rate=None)
        c.hsm.pin_file.write_text(pin)
        await asyncio.gather(*(healthy(one) for one in (b, c)))
        await until(lambda: site.is_up("a", "b", "c"), timeout_s=60)
        await more_calls(callers, 40)
    assert callers.errors == []
    assert withdrawals(b) == withdrawals(c) == []


async def test_b_49_denied_and_away(site: Balanced, bao: BaoServer) -> None:
    """b's rights are taken away, then its key server is sealed: it drains, and no key is taken back."""
    b = site["b"]
    async with site.calling(count=4) as callers:
        bao.ask("PUT", "sys/policies/acl/agent", {"policy": NOTHING})
        await seen(site, b, "denied", Verdict.DENIED)
        await until(lambda: site.is_up("a", "c"), timeout_s=60)
        assert (await status_of(site, "b"))["answer"] == "drain"
        assert await site.serve("b")
        bao.ask("PUT", "sys/seal")
        await seen(site, b, "silent", Verdict.UNREACHABLE)
        assert await site.serve("b")
        assert await site.is_up("a", "c")
        await more_calls(callers, 40)

        bao.unseal()
        bao.ask("PUT", "sys/policies/acl/agent", {"policy": bao.POLICY})
        await healthy(b)
        await until(lambda: site.is_up("a", "b", "c"), timeout_s=60)
        await more_calls(callers, 40)
    assert callers.errors == []
    assert withdrawals(b) == []


async def test_b_49_disabled(site: Balanced, bao: BaoServer) -> None:
    """At the first look after it b's keys are taken back; it alone stops, until its people say otherwise."""
    b = site["b"]
    [name] = [one for one in bao.names() if one != "sealgate-canary"]
    async with site.calling(count=4) as callers:
        bao.disable(name)
        good = await looks_of(b, Verdict.OK)
        await seen(site, b, "revoked", Verdict.KEK_DISABLED)
        assert await looks_of(b, Verdict.OK) <= good + 1, "one may have been under way; the next has seen it"
        await until(lambda: refuses(b), timeout_s=30)
        [taken, *_] = withdrawals(b)
        assert taken["outcome"] == "accepted", "by a withdrawal, while its keys were valid"
        await until(lambda: site.is_up("a", "c"), timeout_s=60)
        assert await site.serve("a", "c")
        await more_calls(callers, 40)

        # The key is back: that alone brings nothing back.
        bao.ask("POST", f"transit/keys/{name}/soft-delete-restore", {})
        good = await looks_of(b, Verdict.OK)
        await until(lambda: is_more(b, Verdict.OK, good), timeout_s=60)
        assert (await b.ask("status"))["standing"] == "revoked"
        assert await refuses(b)
        await Commands(set())(b, "reinstate", "--restore", "--yes")
        await healthy(b)
        await until(lambda: site.is_up("a", "b", "c"), timeout_s=60)
        await until(lambda: site.serve("b"), timeout_s=60)
        await more_calls(callers, 40)
    assert callers.errors == []


async def seen(site: Balanced, one: SiteEnvironment, standing: str, verdict: Verdict) -> None:
    """Return when its agent says so; then everything that people look at does, with what mends it."""
    await until(lambda: stands(one, standing), timeout_s=90)
    page = await one.ask("status")
    assert page["standing"] == standing
    assert page["diagnosis"]["verdict"] == verdict, page["diagnosis"]
    assert page["diagnosis"]["next_step"] == NEXT_STEPS[verdict]
    status, ready = await admin(one, "/readyz")
    assert status == 503
    assert standing in ready
    assert NEXT_STEPS[verdict] in ready
    assert await metric(one, "sealgate_agent_standing", standing=standing) == 1
    assert await looks_of(one, verdict) >= 1
    [*_, logged] = [event for event in events(one) if event["event"] == "consent"]
    assert (logged["standing"], logged["next_step"]) == (standing, NEXT_STEPS[verdict])
    told = (await one.ask("env_list"))["told"]
    assert told["state"] == ("active" if verdict is Verdict.THROTTLED else "draining")
    assert verdict is Verdict.THROTTLED or standing in told["reason"]
    # Neither people nor load balancers are told of a breach: in the signed rows it is what it was.
    assert await site.state(one.name) == "active"


async def stands(one: SiteEnvironment, standing: str) -> bool:
    return bool((await one.ask("status"))["standing"] == standing)


async def healthy(one: SiteEnvironment) -> None:
    """Return when its agent is ready, and pushes."""

    async def ready() -> bool:
        return (await admin(one, "/readyz"))[0] == 200

    await until(ready, timeout_s=90)
    assert await stands(one, "consented")


async def refuses(one: SiteEnvironment) -> bool:
    [proxy] = one.proxies
    return (await proxy.call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="}))[0] == 503


async def status_of(site: Balanced, name: str) -> dict[str, Any]:
    """What `key-agent lb status` says of that environment's server."""
    told = await Commands(set())(site.manager, "lb status", "--lb-config", str(site.lb_config))
    [server] = [one for one in told["servers"] if one["environment"] == name]
    return dict(server)


def events(one: SiteEnvironment) -> list[dict[str, Any]]:
    lines = (one.directory / "agent.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def withdrawals(one: SiteEnvironment) -> list[dict[str, Any]]:
    return [event for event in events(one) if event["event"] == "keys-withdrawn"]


async def admin(one: SiteEnvironment, path: str) -> tuple[int, str]:
    port = next(event["admin_port"] for event in reversed(events(one)) if "admin_port" in event)
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


async def metric(one: SiteEnvironment, name: str, **labels: str) -> float:
    """0 if there is no such sample."""
    _, text = await admin(one, "/metrics")
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and sample.labels == labels)


async def looks_of(one: SiteEnvironment, verdict: Verdict) -> float:
    """How many diagnoses have come to it so far."""
    return await metric(one, "sealgate_agent_kek_diagnoses_total", verdict=verdict)


async def is_more(one: SiteEnvironment, verdict: Verdict, than: float) -> bool:
    return await looks_of(one, verdict) > than
