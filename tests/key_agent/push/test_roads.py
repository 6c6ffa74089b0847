"""Keys and withdrawals on their way to real receivers, directly and by a real broker: one test for both.

The broker is Debian's nats-server with JetStream and mutual TLS; it is killed by SIGKILL where that matters.
"""

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, override

import pytest

from envelope.base64url import b64u_encode
from envelope.broker import ALL_DELIVERIES, agent_tag, answer_subject, decode_delivery, delivery_subject
from envelope.keys import NetworkService
from key_agent.agent import Agent
from key_agent.operations.operations import Operations
from key_agent.push.broker import BrokerLink
from key_agent.push.roads import BothRoads
from key_agent.push.transport import Answer, HttpsTransport, Purpose, PushError, Transport
from key_agent.registry.model import DataKeyRow, Proxy
from proxy.environments import Word
from runtime.broker import BrokerError, connected
from runtime.clock import SystemClock
from tests.key_agent.conftest import AGENT_ID, RHYTHM, Bench, until
from tests.key_agent.push.far_proxy import FarProxy
from tests.nats_server import NatsServer
from tests.pki import write_certificate, write_credential

S3 = NetworkService("acme", "s3")
RECEIPT_S = 5.0


class Counting(HttpsTransport):
    """The direct road, with a counter at its beginning."""

    sent = 0

    @override
    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes | None = None,
        purpose: Purpose = Purpose.KEYS,
    ) -> list[Answer]:
        self.sent += 1
        return await super().send(proxy, tokens, challenge=challenge, purpose=purpose)


@dataclass
class Roads:
    """An agent's bench with real roads, and a real proxy at their end."""

    bench: Bench
    proxy: FarProxy
    path: Path
    broker: NatsServer | None
    direct: Counting = field(init=False)
    link: BrokerLink | None = None

    def transport(self) -> Transport:
        """The agent's, anew: it remembers nothing."""
        tls = self.path / "tls.pem", self.path / "tls.key"
        if not tls[0].exists():
            write_credential(self.bench.tenant.agent_tls(AGENT_ID), self.path, "tls")
            write_certificate(self.bench.signing.certificate, self.path / "signing.pem")
        self.direct = Counting(
            agent_id=AGENT_ID,
            certificate_file=tls[0],
            key_file=tls[1],
            signing_certificate_file=self.path / "signing.pem",
        )
        if self.broker is None:
            return self.direct
        self.link = BrokerLink(
            self.broker.settings("agent", receipt_timeout_s=RECEIPT_S),
            tenant=self.bench.tenant.name,
            agent_id=AGENT_ID,
            validity_s=RHYTHM.validity_s,
            clock=SystemClock(),
        )
        both = BothRoads(self.direct, self.link)
        both.start()
        return both

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[tuple[Agent, Operations]]:
        async with self.transport() as transport:
            if self.link is not None:
                await until(self.link.is_open, timeout_s=30)
                await self.proxy.listens_at_the_broker()
            async with self.bench.agent(transport=transport) as (agent, operations):
                yield agent, operations

    async def provision(self, operations: Operations, *services: str) -> None:
        """KEK, proxy and services; the proxy starts, and has their keys when this returns."""
        if (await operations.status())["kek"] is None:
            await operations.kek_create()
        await operations.proxy_add(proxy=self.proxy.id, url=self.proxy.url, ca_pem=self.proxy.ca_pem)
        for service in services:
            certificate = self.certificates[service]
            added = await operations.service_add(
                service=service, proxy=self.proxy.id, certificate_pem=certificate
            )
            assert [place["outcome"] for place in _list(added["proxies"])] == ["accepted"]

    certificates: dict[str, str] = field(default_factory=dict)


def _list(found: object) -> list[dict[str, Any]]:
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("broker")) as server:
        yield server


@pytest.fixture(params=["direct", "broker"])
def broker(request: pytest.FixtureRequest) -> NatsServer | None:
    return request.getfixturevalue("nats") if request.param == "broker" else None


@pytest.fixture
async def roads(bench: Bench, tmp_path: Path, broker: NatsServer | None) -> AsyncIterator[Roads]:
    async with far_roads(bench, tmp_path, broker) as roads:
        yield roads


@pytest.fixture
async def by_broker(bench: Bench, tmp_path: Path, nats: NatsServer) -> AsyncIterator[Roads]:
    async with far_roads(bench, tmp_path, nats) as roads:
        yield roads


@asynccontextmanager
async def far_roads(bench: Bench, tmp_path: Path, broker: NatsServer | None) -> AsyncIterator[Roads]:
    """To a proxy that has started, and has no keys yet."""
    proxy = FarProxy(
        id=f"proxy-{os.urandom(4).hex()}",  # one broker for all tests: nobody hears another test's messages
        path=tmp_path / "proxy",
        tenant=bench.tenant,
        clock=bench.clock,
        broker=None if broker is None else broker.settings("proxy"),
    )
    roads = Roads(bench, proxy, tmp_path, broker)
    roads.certificates = {service: proxy.host(service) for service in ("s3", "box")}
    await proxy.start()
    try:
        yield roads
    finally:
        await proxy.stop()


async def _next_push(roads: Roads, agent: Agent, act: Callable[[], object] | None = None) -> None:
    """One push, now; return when it has ended."""
    before = agent.deliveries.get(roads.proxy.id)
    if act is not None:
        act()
    agent.refresh.at_once()
    await until(lambda: agent.deliveries.get(roads.proxy.id) is not before, timeout_s=30)


# On both roads.


async def test_keys_arrive_are_refreshed_and_withdrawn(roads: Roads) -> None:
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3", "box")
        sent = roads.direct.sent
        roads.bench.clock.shift(200)
        await _next_push(roads, agent)
        assert agent.deliveries[roads.proxy.id].is_complete
        roads.bench.clock.shift(200)
        assert roads.proxy.holds("s3"), "the refresh prolonged it"
        assert roads.proxy.holds("box")
        if roads.broker is not None:
            assert roads.direct.sent == sent, "all of it came by the broker"
        await operations.kek_revoke()
        assert not roads.proxy.holds("s3")
        assert not roads.proxy.holds("box")
        assert agent.withdrawals.is_done(), "and the proxy has said so"


async def test_a_restarted_proxy_gets_its_keys_in_the_same_push(roads: Roads) -> None:
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        await roads.proxy.restart()
        if roads.broker is not None:
            await roads.proxy.listens_at_the_broker()
        assert not roads.proxy.holds("s3")
        await _next_push(roads, agent)
        assert agent.deliveries[roads.proxy.id].is_complete
        assert roads.proxy.holds("s3")


async def test_one_refused_service_does_not_hurt_the_others(roads: Roads) -> None:
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3", "box")
        roads.proxy.host("box")  # renewed there, and nobody told the agent
        await roads.proxy.restart()
        if roads.broker is not None:
            await roads.proxy.listens_at_the_broker()
        await _next_push(roads, agent)
        delivery = agent.deliveries[roads.proxy.id]
        assert (delivery.outcome, delivery.accepted, delivery.code) == ("partial", 1, "recipient")
        assert roads.proxy.holds("s3")


async def test_a_proxy_that_does_not_answer_is_tried_again(roads: Roads) -> None:
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        await roads.proxy.stop()
        await _next_push(roads, agent)
        assert agent.deliveries[roads.proxy.id].code == "unreachable"
        await roads.proxy.start()
        await _next_push(roads, agent)
        assert roads.proxy.holds("s3")


# Only with a broker.


async def test_the_loss_of_the_broker_is_made_up_for_in_the_same_push(bench: Bench, tmp_path: Path) -> None:
    with NatsServer(tmp_path) as server:
        async with far_roads(bench, tmp_path, server) as roads, roads.agent() as (agent, operations):
            await roads.provision(operations, "s3")
            sent = roads.direct.sent
            server.kill()
            await _next_push(roads, agent)
            assert agent.deliveries[roads.proxy.id].is_complete
            assert roads.direct.sent == sent + 1
            server.start()
            assert roads.link is not None
            await until(roads.link.is_open, timeout_s=30)
            # The place in the stream died with the broker: the proxy takes another one by itself.
            await until(lambda: roads.link is not None and roads.link.is_open(_proxy(roads, agent)))
            deadline_s = asyncio.get_running_loop().time() + 40
            while roads.direct.sent > sent:
                assert asyncio.get_running_loop().time() < deadline_s, "it never came by the broker again"
                sent = roads.direct.sent
                roads.link._resting_until_s.clear()
                await _next_push(roads, agent)
                assert agent.deliveries[roads.proxy.id].is_complete, "meanwhile directly"
            server.kill()
            await operations.kek_revoke()
            assert not roads.proxy.holds("s3")


async def test_while_only_the_broker_is_left_keys_and_withdrawals_go_on(by_broker: Roads) -> None:
    roads = by_broker
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        await roads.proxy.close_road()
        roads.bench.clock.shift(200)
        await _next_push(roads, agent)
        assert agent.deliveries[roads.proxy.id].is_complete, "the session's challenge is still good"
        assert roads.link is not None
        roads.link._resting_until_s[roads.proxy.id] = float("inf")
        roads.bench.clock.shift(200)
        await _next_push(roads, agent)
        assert agent.deliveries[roads.proxy.id].is_complete, (
            "receipts were missing, but there is nothing else"
        )
        assert roads.proxy.holds("s3")
        await operations.kek_revoke()
        assert not roads.proxy.holds("s3")
        assert agent.withdrawals.is_done()


async def test_by_the_broker_neither_does_another_environments_agent_push(by_broker: Roads) -> None:
    """It had a session before anybody spoke for the proxy's environment."""
    roads = by_broker
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        await roads.proxy.close_road()
        word = Word(environment="a", state="active", term=1, epoch=1)
        roads.proxy.environments.take(roads.bench.tenant.name, word, agent="agent-x", now_boot_s=0)
        accepted, withdrawn = roads.proxy.events("keys-accepted"), roads.proxy.events("keys-withdrawn")
        roads.bench.clock.shift(200)
        await _next_push(roads, agent)
        assert not agent.deliveries[roads.proxy.id].is_complete
        await operations.kek_revoke()
        assert roads.proxy.holds("s3")
        assert (roads.proxy.events("keys-accepted"), roads.proxy.events("keys-withdrawn")) == (
            accepted,
            withdrawn,
        )


async def test_an_agent_without_a_session_withdraws_by_the_broker_and_calls_it_unconfirmed(
    by_broker: Roads,
) -> None:
    roads = by_broker
    async with roads.agent() as (_, operations):
        await roads.provision(operations, "s3")
    await roads.proxy.close_road()
    async with roads.agent() as (agent, operations):
        assert roads.proxy.holds("s3")
        agent.consent.revoke("by the test")
        agent.withdrawals.at_once()
        await until(lambda: not roads.proxy.holds("s3"), timeout_s=30)
        await until(lambda: agent.withdrawals_seen.get(roads.proxy.id) is not None, timeout_s=30)
        assert agent.withdrawals_seen[roads.proxy.id].code == "unconfirmed"
        assert not agent.withdrawals.is_done(), "nobody has confirmed it"
        await roads.proxy.open_road()
        await roads.bench.clock.advance(5)
        await until(agent.withdrawals.is_done, timeout_s=30)


async def test_the_broker_learns_no_names_and_no_keys(bench: Bench, tmp_path: Path) -> None:
    with NatsServer(tmp_path) as server:
        async with far_roads(bench, tmp_path, server) as roads, roads.agent() as (agent, operations):
            heard: list[bytes] = []
            async with connected(server.settings("spy"), name="spy") as spy:

                async def hear(message: Any) -> None:
                    heard.extend((message.subject.encode(), message.data))

                await spy.subscribe("sealgate.>", cb=hear)
                await spy.flush()
                await roads.provision(operations, "s3", "box")
                await _next_push(roads, agent)
                keys = await agent.registry.data_keys()
                secrets = [_secret(roads, key) for key in keys]
                await operations.kek_revoke()
                receipts = answer_subject(agent_tag("acme", AGENT_ID), roads.proxy.id).encode()
                await until(lambda: heard.count(receipts) >= 3)
            stored = b"".join(path.read_bytes() for path in server.store.rglob("*") if path.is_file())
            seen = stored + b"".join(heard)
            tokens = [part for part in heard if b"SGBD" in part[:4]]
            assert len(tokens) >= 3
            assert all(token[38:138] in stored for token in tokens), "we look where the messages are"
            hidden = [form for key in keys for form in (key.kcv, key.key_id.raw)] + secrets
            never = [b"acme", b"/box", b"accepted", roads.proxy.id.encode(), *hidden]
            never += [b64u_encode(form).encode() for form in hidden]
            assert not [word for word in never if word in seen]


async def test_a_broker_that_lies_changes_nothing(by_broker: Roads) -> None:
    """Whoever may publish forges receipts and envelopes: nothing is believed, and nothing breaks."""
    roads = by_broker
    assert roads.broker is not None
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        tag = agent_tag("acme", AGENT_ID)
        async with connected(roads.broker.settings("liar"), name="liar") as liar:

            async def forge(message: Any) -> None:
                """The first answer to every delivery is ours."""
                if message.data.startswith(b"SGBD"):
                    forged = b"SGBA\x01" + message.data[6:22] + os.urandom(12 + 200)
                    await liar.publish(answer_subject(tag, roads.proxy.id), forged)

            await liar.subscribe(ALL_DELIVERIES[0], cb=forge)
            await liar.subscribe(ALL_DELIVERIES[1], cb=forge)
            await liar.flush()
            junk = (b"", b"SGBD", b"SGBD\x01\x00" + bytes(32) + b"a.b.c.d.e", os.urandom(5000))
            known = b"SGBD\x01\x00" + os.urandom(16) + tag + b"a.b.c.d.e\nx"
            for withdraws in (True, False):
                for content in (*junk, known):
                    await liar.publish(delivery_subject(roads.proxy.id, withdraws=withdraws), content)
            await liar.flush()
            await _next_push(roads, agent)
            assert agent.deliveries[roads.proxy.id].is_complete
            assert roads.proxy.holds("s3")
            refused = roads.proxy.events("envelope-refused")
            assert refused == 4, "two tokens in each of two messages that name our agent"
            await operations.kek_revoke()
            assert not roads.proxy.holds("s3")
            assert roads.proxy.listener is not None
            assert roads.proxy.listener.failure is None


async def test_a_recorded_delivery_is_refused_when_it_is_played_again(by_broker: Roads) -> None:
    roads = by_broker
    assert roads.broker is not None
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        recorded: list[Any] = []
        async with connected(roads.broker.settings("spy"), name="spy") as spy:

            async def record(message: Any) -> None:
                recorded.append((message.subject, message.data))

            await spy.subscribe(ALL_DELIVERIES[0], cb=record)
            await spy.flush()
            await _next_push(roads, agent)
            await until(lambda: recorded)
            await operations.kek_revoke()
            assert not roads.proxy.holds("s3")
            for subject, content in recorded[:]:
                again = dataclasses.replace(decode_delivery(content), message_id=os.urandom(16))
                await spy.publish(subject, content)
                await spy.publish(subject, again.encode())
            await spy.flush()
            await until(lambda: roads.proxy.events("envelope-refused") >= 1)
            assert not roads.proxy.holds("s3")


async def test_what_comes_twice_is_taken_once_and_answered_twice(by_broker: Roads) -> None:
    """Whether the message or its answer was lost, the agent's next try finds out what became of it."""
    roads = by_broker
    assert roads.broker is not None
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        said: list[tuple[str, bytes]] = []
        async with connected(roads.broker.settings("spy"), name="spy") as spy:

            async def record(message: Any) -> None:
                said.append((message.subject, message.data))

            await spy.subscribe("sealgate.>", cb=record)
            await spy.flush()
            await _next_push(roads, agent)
            await until(lambda: len(said) == 2)
            [asked], [answer] = (
                [one for one in said if one[1].startswith(kind)] for kind in (b"SGBD", b"SGBA")
            )
            accepted = roads.proxy.events("keys-accepted")
            await spy.publish(*asked)
            await until(lambda: said.count(answer) == 2, timeout_s=30)
            assert roads.proxy.events("keys-accepted") == accepted
            assert roads.proxy.events("envelope-refused") == 0
            await spy.publish(asked[0], asked[1][:-1] + b"x")
            await until(lambda: roads.proxy.events("envelope-refused") == 1)


async def test_a_stream_that_never_forgets_is_not_used(bench: Bench, tmp_path: Path) -> None:
    with NatsServer(tmp_path) as server:
        async with connected(server.settings("operator"), name="operator") as operator:
            await operator.jetstream().add_stream(name="SEALGATE", subjects=list(ALL_DELIVERIES))
        roads = Roads(bench, FarProxy("p", tmp_path / "p", bench.tenant, bench.clock), tmp_path, server)
        async with roads.transport():
            assert roads.link is not None
            await until(lambda: roads.link is not None and "longer than" in (roads.link.failure or ""))
            assert not roads.link.is_open()


async def test_envelopes_too_large_for_the_broker_go_directly(by_broker: Roads) -> None:
    roads = by_broker
    async with roads.agent() as (agent, operations):
        await roads.provision(operations, "s3")
        assert roads.link is not None
        proxy = _proxy(roads, agent)
        with pytest.raises(BrokerError, match="does not fit"):
            await roads.link.send(proxy, ["x" * (2 << 20)], challenge=bytes(16), purpose=Purpose.KEYS)
        many = ["a.b.c.d." + "e" * 60_000] * 20  # more than one message may hold
        answers = await roads.link.send(proxy, many, challenge=_challenge(roads), purpose=Purpose.KEYS)
        assert [answer.code for answer in answers] == ["malformed"] * 20


async def test_without_any_road_the_failure_names_both(by_broker: Roads) -> None:
    roads = by_broker
    transport = roads.transport()
    async with transport:
        nowhere = Proxy(id="p", url="https://localhost:1", ca_pem=roads.proxy.ca_pem)
        with pytest.raises(PushError) as caught:
            await transport.send(nowhere, ["a.b.c.d.e"])
        assert caught.value.code == "unreachable"
        assert "broker" in str(caught.value)


def _proxy(roads: Roads, agent: Agent) -> Proxy:
    return agent.targets.proxies[roads.proxy.id]


def _secret(roads: Roads, key: DataKeyRow) -> bytes:
    """The key material of *key*, out of the proxy's memory."""
    secret = bytes(roads.proxy.cache.opening_key(key.owner, key.key_id)._secret)
    assert any(secret)
    return secret


def _challenge(roads: Roads) -> bytes:
    session = roads.proxy.receiver.sessions.of_tag(agent_tag("acme", AGENT_ID))
    assert session is not None
    return session.challenge
