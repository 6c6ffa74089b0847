"""B-47: a broker that loses, repeats and reorders messages, and is killed: keys and withdrawals arrive.

1. Agent, proxies and nats-server are processes of their own, TLS everywhere. Between them and the server
   stands `lossy_broker`: of all messages 30 % are lost, others come twice or late, the broker's own business too.
2. One site, in the order of this file. In the second test the direct road is cut: what is used then came by
   the broker alone. Callers of both proxies go on from the first to the last and see no error.
3. "Newest" is told by the proxies themselves: the version that they seal with.

Peers (agents of other environments) never speak by the broker: it is a road from an agent to its own proxies,
and what is said between environments goes over mutual TLS from agent to agent alone.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from deploy.demo_environments_callers import Callers
from envelope.derive import ekm_binding
from envelope.keys import KeyId, NetworkService
from runtime.broker import BrokerSettings, connected
from tests.environments.fault_proxy import Fault
from tests.environments.site import TENANT, EnvironmentsSite, SiteEnvironment, SiteProxy, environments_site, until
from tests.integration.key_residue import Known
from tests.nats_server import NatsServer
from tests.scenarios.lossy_broker import Fate, LossyBroker

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

KEY: Final = "files"
OWNER: Final = NetworkService(TENANT, KEY)
INTERVAL_S, VALIDITY_S = 30, 60


@dataclass
class Site:
    one: SiteEnvironment
    nats: NatsServer
    lossy: LossyBroker
    callers: Mapping[str, Callers]
    spoken: list[float] = field(default_factory=list)

    @property
    def proxies(self) -> list[SiteProxy]:
        return self.one.proxies

    async def version(self, proxy: SiteProxy) -> int:
        """Of the key that it seals with; 0: it seals with none."""
        status, document = await proxy.call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
        return int(document["version"]) if status == 200 else 0

    async def rotated(self) -> float:
        """Make a new key; seconds until every proxy seals with it."""
        before = max([await self.version(proxy) for proxy in self.proxies])
        began_s = time.monotonic()
        asked = asyncio.create_task(self.one.ask("rotate", service=KEY), name="rotate")
        try:

            async def arrived() -> bool:
                return all([await self.version(proxy) == before + 1 for proxy in self.proxies])

            await until(arrived, timeout_s=INTERVAL_S)
        finally:
            taken_s = time.monotonic() - began_s
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        return taken_s

    def events(self, proxy: SiteProxy) -> list[dict[str, Any]]:
        """What the proxy recorded of envelopes."""
        lines = (proxy.config.parent / "state" / "audit.jsonl").read_text().splitlines()
        return [
            event
            for event in map(json.loads, lines)
            if event["action"] in ("keys-accepted", "keys-withdrawn", "envelope-refused")
        ]

    async def replay(self) -> None:
        """Every delivery that was ever published, again, the newest first; until the proxies have taken them."""
        recorded = list(self.lossy.deliveries)
        before = [await _taken(proxy) for proxy in self.proxies]
        async with connected(self.nats.settings("replay"), name="replay") as client:
            stream = client.jetstream()
            for subject, content in reversed(recorded):
                await stream.publish(subject, content)

        async def taken() -> bool:
            now = [await _taken(proxy) for proxy in self.proxies]
            return sum(now) - sum(before) >= len(recorded)

        await until(taken, timeout_s=60)


async def _taken(proxy: SiteProxy) -> int:
    """Messages that the proxy took from the broker."""
    _, text = await proxy.health("/metrics")
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("sealgate_push_broker_messages_total")
    )


def _section(settings: BrokerSettings) -> str:
    return f"""
[nats]
urls = ["{settings.urls[0]}"]
ca_file = "{settings.ca_file}"
certificate_file = "{settings.certificate_file}"
key_file = "{settings.key_file}"
"""


@asynccontextmanager
async def _site(directory: Path) -> AsyncIterator[Site]:
    rhythm = (INTERVAL_S, VALIDITY_S, 0.5)
    with NatsServer(directory) as nats:
        async with (
            LossyBroker(nats) as lossy,
            environments_site(directory, kinds={"a": "aes-256"}, proxies_each=2, rhythm=rhythm) as made,
        ):
            one = made["a"]
            for name, config in [("agent", one.config), *((p.name, p.config) for p in one.proxies)]:
                config.write_text(config.read_text() + _section(lossy.settings(name)))
            async with made.agents(), made.proxies():
                await _begin(made, one)
                async with contextlib.AsyncExitStack() as stack:
                    callers = {}
                    for proxy in one.proxies:
                        callers[proxy.name] = Callers(
                            f"http://127.0.0.1:{proxy.service_port}", proxy.token, KEY, count=2, pause_s=0.1
                        )
                        await stack.enter_async_context(_running(callers[proxy.name]))
                    yield Site(one, nats, lossy, callers)


async def _begin(made: EnvironmentsSite, one: SiteEnvironment) -> None:
    for proxy in one.proxies:
        await one.add_service(KEY, proxy, made.tenant)

    async def by_broker() -> bool:
        """Both proxies have taken a delivery from it."""
        await one.ask("rotate", service=KEY)
        return all([await _taken(proxy) for proxy in one.proxies])

    await until(by_broker, timeout_s=90)


@asynccontextmanager
async def _running(callers: Callers) -> AsyncIterator[None]:
    task = asyncio.create_task(callers.run(), name="callers")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with _site(tmp_path_factory.mktemp("broker")) as made:
        yield made


async def test_x(site: Site) -> None:
    print(site.lossy.fates, [ (s, len(c)) for s, c in site.lossy.deliveries])
    site.lossy.is_lossy = True
    for road in ("both", "cut", "killed"):
        if road == "cut":
            site.proxies[0].push.inject(Fault.BLACK_HOLE)
            site.proxies[1].push.inject(Fault.REFUSE)
        if road == "killed":
            site.nats.kill()
            site.nats.start()
        for _ in range(3):
            began = time.monotonic()
            try:
                print(road, await site.rotated(), flush=True)
            except TimeoutError:
                print(road, "timeout", flush=True)
    print(site.lossy.fates)
    for c in site.callers.values(): print(c.answered, c.errors[:3], c.refused[:3])
