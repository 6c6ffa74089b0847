"""A broker that answers nonsense, at both of its ends: they go on trying, and nothing else of theirs ends."""

import asyncio
import json
import math
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from key_agent.push.broker import BrokerLink
from key_agent.push.roads import BothRoads
from key_agent.push.transport import Purpose
from proxy.api.broker import BrokerListener
from proxy.environments import Environments
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.model import Directory
from runtime.audit import AuditLog
from runtime.broker import BrokerError, BrokerSettings
from runtime.clock import SystemClock
from tests.key_agent.conftest import AGENT_ID, Bench, until
from tests.key_agent.push.test_roads import far_roads
from tests.pki import issue_server, make_server_ca, make_tenant, write_certificate, write_credential
from tests.runtime.hostile_broker import HostileBroker

NONSENSE = [b"", b"no JSON", b"[]", b'{"config": 7, "error": null}', b'{"error": 7}', b"[" * 100_000]


class _End(Protocol):
    failure: str | None

    async def run(self) -> object: ...


@asynccontextmanager
async def _broker(
    path: Path, answer: Callable[[str], bytes], *, max_payload: float = 1 << 20
) -> AsyncIterator[tuple[HostileBroker, BrokerSettings]]:
    ca = make_server_ca()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*write_credential(issue_server(ca), path, "server"))
    certificate, key = write_credential(make_tenant().agent_tls(), path, "client")
    async with HostileBroker(answer, context, max_payload) as broker:
        yield (
            broker,
            BrokerSettings(
                urls=[f"tls://localhost:{broker.port}"],
                ca_file=write_certificate(ca.certificate, path / "ca.pem"),
                certificate_file=certificate,
                key_file=key,
            ),
        )


@contextmanager
def _end(name: str, settings: BrokerSettings, path: Path) -> Iterator[_End]:
    clock = SystemClock()
    if name == "agent":
        yield BrokerLink(settings, tenant="acme", agent_id="hq", validity_s=330, clock=clock)
        return
    audit = AuditLog.open(path / "audit.jsonl", clock)
    receiver = Receiver(
        proxy_id="p1",
        cache=KeyCache(clock),
        audit=audit,
        clock=clock,
        validity_s=330,
        directory=Directory.of(1, [], []),
    )
    yield BrokerListener(
        settings, receiver, clock=clock, requests_per_s=1000, entitled=Environments().check_entitled
    )
    audit.close()


@pytest.mark.parametrize("name", ["agent", "proxy"])
async def test_no_answer_ends_more_than_its_connection(tmp_path: Path, name: str) -> None:
    said = iter(NONSENSE)
    answered: list[bytes] = []

    def answer(_: str) -> bytes:
        answered.append(next(said, NONSENSE[1]))
        return answered[-1]

    async with _broker(tmp_path, answer) as (broker, settings):
        with _end(name, settings, tmp_path) as end:
            task = asyncio.create_task(end.run())
            try:
                await until(lambda: task.done() or len(answered) > len(NONSENSE), timeout_s=60)
                assert not task.done(), task
                assert end.failure is not None, "this road is not taken for open"
            finally:
                task.cancel()
                await asyncio.wait([task])
            assert broker.requests


@pytest.mark.parametrize("max_payload", [math.nan, math.inf])
async def test_what_a_broker_says_of_itself_closes_no_direct_road(
    bench: Bench, tmp_path: Path, max_payload: float
) -> None:
    """It is believed to be there, and no envelope can go by it: keys and withdrawals arrive all the same."""
    counts = dict.fromkeys(("messages", "bytes", "first_seq", "last_seq", "consumer_count"), 0)
    stream = {"config": {"name": "SEALGATE", "max_age": 330 * 10**9}, "state": counts}
    async with (
        _broker(tmp_path, lambda _: json.dumps(stream).encode(), max_payload=max_payload) as (_, settings),
        far_roads(bench, tmp_path, None) as roads,
    ):
        direct = roads.transport()
        link = BrokerLink(settings, tenant="acme", agent_id=AGENT_ID, validity_s=330, clock=SystemClock())
        both = BothRoads(direct, link)
        both.start()
        async with both, bench.agent(transport=both) as (agent, operations):
            await until(link.is_open, timeout_s=30)
            await roads.provision(operations, "s3")
            assert roads.proxy.holds("s3")
            await operations.kek_revoke()
            assert not roads.proxy.holds("s3")
            with pytest.raises(BrokerError, match="not understood"):
                await link.publish(next(iter(agent.targets.proxies.values())), ["x"], purpose=Purpose.KEYS)
            assert link.is_open(), "nothing of that was for want of a broker"
