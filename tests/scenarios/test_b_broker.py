"""B-47: a broker that loses, repeats and reorders messages, and is killed: keys and withdrawals arrive.

1. Agent, proxies and nats-server are processes of their own, TLS everywhere. Between them and the server
   stands `lossy_broker`: of all messages, the broker's own too, 30 % are lost, others come twice or late.
2. One site, in the order of this file. In the second test the direct road is cut: what is used then came by
   the broker alone. Callers of both proxies go on from the first to the last and see no error.
3. "Newest" is told by the proxies themselves: the version that they seal with.

Peers (agents of other environments) never speak by the broker: it is a road from an agent to its own proxies,
and what is said between environments goes over mutual TLS from agent to agent alone.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from deploy.demo_environments_callers import Callers
from envelope.broker import decode_delivery
from envelope.derive import ekm_binding
from envelope.keys import KeyId, NetworkService
from runtime.broker import BrokerSettings, connected
from tests.environments.fault_proxy import Fault
from tests.environments.site import (
    TENANT,
    EnvironmentsSite,
    SiteEnvironment,
    SiteProxy,
    environments_site,
    until,
)
from tests.integration.key_residue import Known, in_files
from tests.nats_server import NatsServer
from tests.scenarios.lossy_broker import Fate, LossyBroker

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY: Final = "files"
OWNER: Final = NetworkService(TENANT, KEY)
INTERVAL_S, VALIDITY_S = 60, 120


@dataclass
class Site:
    one: SiteEnvironment
    nats: NatsServer
    lossy: LossyBroker
    callers: Mapping[str, Callers]

    @property
    def proxies(self) -> list[SiteProxy]:
        return self.one.proxies

    async def rotated(self) -> float:
        """Make a new key; seconds until every proxy seals with it: less than until the next refresh."""
        await until(self._is_idle, timeout_s=2 * INTERVAL_S)  # every proxy has acknowledged the one before
        before = max([await _version(proxy) for proxy in self.proxies])
        asked = asyncio.create_task(self.one.ask("rotate", service=KEY), name="rotate")
        try:

            async def arrived() -> bool:
                if asked.done():
                    await asked
                return all([await _version(proxy) == before + 1 for proxy in self.proxies])

            return await until(arrived, timeout_s=INTERVAL_S)
        finally:
            await asked  # it holds the agent's changes up until it is over

    async def _is_idle(self) -> bool:
        states = "SELECT count(*) FROM key_rotation WHERE phase IN ('distributing', 'activated')"
        return _query(self.one, states) == [(0,)]

    def events(self, proxy: SiteProxy) -> list[dict[str, Any]]:
        """What the proxy recorded of envelopes, in order."""
        lines = (proxy.config.parent / "state" / "audit.jsonl").read_text().splitlines()
        ours = {"keys-accepted", "keys-withdrawn", "envelope-refused"}
        return [event for event in map(json.loads, lines) if event["action"] in ours]

    async def replay(self) -> int:
        """Every delivery that was ever published, again, the newest first; how many, once all are taken.

        Each as it was, and in another message: then a proxy does not know it, and judges what is in it.
        """
        recorded = list(self.lossy.deliveries)
        async with connected(self.nats.settings("replay"), name="replay") as client:
            stream = client.jetstream()
            for subject, content in reversed(recorded):
                await stream.publish(subject, content)
                again = dataclasses.replace(decode_delivery(content), message_id=os.urandom(16))
                await stream.publish(subject, again.encode())

            async def taken() -> bool:
                places = [place for place in await stream.consumers_info("SEALGATE") if place.push_bound]
                left = sum(place.num_pending + place.num_ack_pending for place in places)
                return len(places) == 2 * len(self.proxies) and left == 0

            await until(taken, timeout_s=90)
        return len(recorded)


def _query(one: SiteEnvironment, question: str) -> list[tuple[Any, ...]]:
    """Of the agent's database, beside it."""
    address = f"file:{one.state_dir / 'registry.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as registry:
        return registry.execute(question).fetchall()


async def _version(proxy: SiteProxy) -> int:
    """Of the key that it seals with; 0: it seals with none."""
    status, document = await proxy.call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
    return int(document["version"]) if status == 200 else 0


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

    async def both_seal() -> bool:
        """What was taken may have been refused: a proxy looks at its directory when its time has come."""
        return all([await _version(proxy) for proxy in one.proxies])

    await until(both_seal, timeout_s=2 * INTERVAL_S)


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


def _in_order(site: Site) -> None:
    """No sequence counted twice, none after a later one."""
    for proxy in site.proxies:
        accepted = [
            event["sequence"]
            for event in site.events(proxy)
            if event["action"] in ("keys-accepted", "keys-withdrawn")
        ]
        assert accepted == sorted(set(accepted)), proxy.name


async def test_the_newest_key_is_everywhere_within_one_refresh(site: Site) -> None:
    site.lossy.is_lossy = True
    print(f"both roads, broker loses 30 %: {await site.rotated():.1f} s")
    lost = {what for what, fate in site.lossy.fates if fate is Fate.LOST}
    assert lost >= {"delivery", "other"}, "it was the broker's doing that things went wrong"


async def test_the_broker_alone_brings_it_too(site: Site) -> None:
    site.lossy.is_lossy = True
    site.proxies[0].push.inject(Fault.BLACK_HOLE)
    site.proxies[1].push.inject(Fault.REFUSE)
    directly = [proxy.push.connections for proxy in site.proxies]
    print(f"the broker alone, losing 30 %: {await site.rotated():.1f} s")
    site.nats.kill()
    site.nats.start()
    print(f"and killed by SIGKILL before: {await site.rotated():.1f} s")
    assert site.proxies[1].push.connections == directly[1], "nothing came directly"
    for fate in (Fate.LOST, Fate.TWICE, Fate.LATE):
        assert site.lossy.fates["delivery", fate], fate
    _in_order(site)


async def test_what_is_older_changes_nothing(site: Site) -> None:
    site.lossy.is_lossy = False
    before = [await _version(proxy) for proxy in site.proxies]
    refused = [len(site.events(proxy)) for proxy in site.proxies]
    assert await site.replay() >= 3 * len(site.proxies)
    assert [await _version(proxy) for proxy in site.proxies] == before
    for proxy, count in zip(site.proxies, refused, strict=True):
        codes = [event["code"] for event in site.events(proxy)[count:] if "code" in event]
        assert codes, "what was published again came to the proxy"
        assert set(codes) <= {"sequence", "nonce", "time", "replay"}
    _in_order(site)


async def test_no_caller_saw_any_of_it(site: Site) -> None:
    for callers in site.callers.values():
        wanted = callers.answered + 20

        async def done(callers: Callers = callers, wanted: int = wanted) -> bool:
            return callers.answered >= wanted or bool(callers.errors)

        await until(done)
        assert not callers.errors
        assert not callers.refused


async def test_a_withdrawal_arrives_and_nothing_undoes_it(site: Site) -> None:
    keys = await asyncio.to_thread(_materials, site.one)
    assert len(keys) >= 4
    site.lossy.is_lossy = True
    revoked = asyncio.create_task(site.one.ask("kek_revoke"), name="kek-revoke")
    try:

        async def refused() -> bool:
            return not any([await _version(proxy) for proxy in site.proxies])

        print(f"a withdrawal by the broker alone: {await until(refused, timeout_s=INTERVAL_S):.1f} s")
    finally:
        await revoked
    site.lossy.is_lossy = False
    await site.replay()
    assert [await _version(proxy) for proxy in site.proxies] == [0, 0]
    for proxy in site.proxies:
        assert [event["action"] for event in site.events(proxy)].count("keys-withdrawn") >= 1
        last = [event for event in site.events(proxy) if event["action"] != "envelope-refused"][-1]
        assert last["action"] == "keys-withdrawn", "no key came back"
    _in_order(site)
    _holds_no_key(site, keys)


def _holds_no_key(site: Site, keys: Mapping[str, Known]) -> None:
    """Neither what passed through the broker nor what it stored; and we do look at both."""
    stored = b"".join(path.read_bytes() for path in site.nats.store.rglob("*") if path.is_file())
    found = [content for _, content in site.lossy.deliveries if content[38:138] in stored]
    assert len(found) >= 4, "the deliveries are stored where we look"
    for key_id, known in keys.items():
        assert not known.seen_in(bytes(site.lossy.seen)), key_id
        assert not in_files(site.nats.directory, known), key_id
        assert known.seen_in(b"{" + next(iter(known.needles["KM"])) + b"}") == {"KM"}


def _materials(one: SiteEnvironment) -> dict[str, Known]:
    """Every key that was ever pushed, opened in the HSM by a process that runs no code of Sealgate's."""
    [(kek_id, label, object_id)] = _query(one, "SELECT id, label, object_id FROM kek")
    found = {}
    for key_id, wrapped in _query(one, "SELECT dek_id, wrapped FROM dek_wrap"):
        kid = KeyId.parse(key_id)
        opened = one.hsm.run(
            "unwrap-gcm",
            arguments={
                "label": label,
                "id": bytes(object_id).hex(),
                "wrapped": wrapped.hex(),
                "binding": ekm_binding(OWNER, kid, kek_id=kek_id, environment_id=one.name).hex(),
            },
        )
        found[key_id] = Known.of(bytes.fromhex(opened), OWNER, kid)
    return found
