"""A whole key agent on fakes: real registry, audit log and envelopes; HSM, proxies and time under control."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from envelope.certificates import fingerprint
from envelope.keys import NetworkService
from envelope.material import Signer
from key_agent.agent import Agent, Rhythm, Signing
from key_agent.journal import Journal
from key_agent.lifetimes import Credentials
from key_agent.operations.operations import Operations
from key_agent.push.revocations import Revocations
from key_agent.push.targets import Targets
from key_agent.push.transport import Transport
from key_agent.registry.store import Registry
from runtime.audit import AuditLog
from tests.fakes.clock import ManualClock
from tests.fakes.key_source import FakeKeySource
from tests.fakes.proxies import FakeProxies, FakeProxy, pem
from tests.pki import Tenant

AGENT_ID = "hq"
RHYTHM = Rhythm(
    interval_s=300,
    validity_s=330,
    watch_s=5.0,
    presence_s=5.0,
    request_timeout_s=10.0,
    batch_size=100,
)


async def until(condition: Callable[[], object], *, timeout_s: float = 45) -> None:
    """Return as soon as *condition* holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.002)


@dataclass
class Bench:
    """The agent under test and the hands on everything around it."""

    directory: Path
    tenant: Tenant
    clock: ManualClock
    source: FakeKeySource
    signing: Signing
    proxies: dict[str, FakeProxy] = field(default_factory=dict)
    jitter: float = 0.0
    load_credentials: Callable[[float], Credentials] | None = None
    revocations: Revocations | None = None

    def proxy(self, name: str = "p1") -> FakeProxy:
        """The proxy of that name; made at the first call."""
        if name not in self.proxies:
            signer = Signer(self.signing.certificate, AGENT_ID)
            self.proxies[name] = FakeProxy(
                id=name, clock=self.clock, signers={fingerprint(self.signing.certificate): signer}
            )
        return self.proxies[name]

    def host(self, service: str, proxy: str = "p1") -> str:
        """Have *proxy* host a service; the certificate to tell the agent (PEM)."""
        credential = self.tenant.service(service)
        self.proxy(proxy).services[NetworkService(self.tenant.name, service)] = credential
        return pem(credential.certificate)

    @asynccontextmanager
    async def agent(
        self,
        *,
        working: bool = True,
        url: str | None = None,
        rhythm: Rhythm = RHYTHM,
        transport: Transport | None = None,
    ) -> AsyncIterator[tuple[Agent, Operations]]:
        """One life of an agent process on this bench's state."""
        async with AsyncExitStack() as stack:
            journal = Journal(AuditLog.open(self.directory / "audit.jsonl", self.clock))
            stack.push_async_callback(journal.close)
            registry = await Registry.open(
                url or f"sqlite:///{self.directory / 'registry.db'}",
                tenant_id=self.tenant.name,
                environment_id="main",
                agent_id=AGENT_ID,
                now_ms=int(self.clock.wall_s() * 1000),
            )
            stack.push_async_callback(registry.close)
            if transport is None:
                transport = fakes = FakeProxies(*self.proxies.values())
                fakes.proxies = self.proxies
            agent = Agent(
                agent_id=AGENT_ID,
                tenant=self.tenant.name,
                environment_id="main",
                root=self.tenant.root.certificate,
                rhythm=rhythm,
                source=self.source,
                registry=registry,
                targets=Targets(await registry.book()),
                transport=transport,
                signing=self.signing,
                journal=journal,
                clock=self.clock,
                jitter=lambda: self.jitter,
                load_credentials=self.load_credentials,
                revocations=self.revocations,
            )
            await agent.start()
            if working:
                await stack.enter_async_context(agent.working(refresh=True))
            yield agent, Operations(agent)

    async def provision(
        self, operations: Operations, service: str = "s3", proxy: str = "p1"
    ) -> NetworkService:
        """KEK, proxy, service, as far as they are missing; keys have arrived when it returns."""
        known = await operations.status()
        if known["kek"] is None:
            await operations.kek_create()
        await operations.proxy_add(
            proxy=proxy, url=f"https://{proxy}.example:8443", ca_pem=pem(self.tenant.root.certificate)
        )
        certificate = self.host(service, proxy)
        await operations.service_add(service=service, proxy=proxy, certificate_pem=certificate)
        return NetworkService(self.tenant.name, service)

    def audit(self) -> str:
        return (self.directory / "audit.jsonl").read_text()


@pytest.fixture
def bench(tmp_path: Path, acme: Tenant, clock: ManualClock) -> Bench:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    credential = acme.agent_signing(AGENT_ID)
    return Bench(
        directory=directory,
        tenant=acme,
        clock=clock,
        source=FakeKeySource(
            agent_id=AGENT_ID,
            signing_key=credential.key,
            signing_certificate=credential.certificate,
            clock=clock,
        ),
        signing=Signing(key=credential.key, certificate=credential.certificate),
    )
