"""A proxy's whole receiving side as `sealgate run` sets it up: push listener, receiver, cache, broker."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from envelope.errors import KeyUnavailableError
from envelope.keys import NetworkService
from proxy.api.broker import BrokerListener
from proxy.api.push import make_push_application
from proxy.environments import Environments
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.model import CertificateFiles, Directory, LegacyPolicy, ServiceEntry, TenantEntry, Upstream
from runtime.audit import AuditLog
from runtime.broker import BrokerSettings
from runtime.clock import SystemClock
from runtime.serve import serving
from runtime.tls import ServerTls
from tests.fakes.clock import ManualClock
from tests.fakes.proxies import pem
from tests.key_agent.conftest import until
from tests.pki import ServiceCredential, Tenant, issue_server, make_server_ca, write_credential
from tests.ports import free_port

VALIDITY_S = 330


@dataclass
class FarProxy:
    """Keys live on *clock*; connections in real time."""

    id: str
    path: Path
    tenant: Tenant
    clock: ManualClock
    broker: BrokerSettings | None = None
    port: int = field(default_factory=free_port)
    services: dict[NetworkService, ServiceCredential] = field(default_factory=dict)
    receiver: Receiver = field(init=False)
    cache: KeyCache = field(init=False)
    listener: BrokerListener | None = None
    environments: Environments = field(default_factory=lambda: Environments("a"))
    _parts: AsyncExitStack = field(default_factory=AsyncExitStack)
    _roads: AsyncExitStack = field(default_factory=AsyncExitStack)
    _entries: list[ServiceEntry] = field(default_factory=list)
    _lives: int = 0

    def __post_init__(self) -> None:
        self.path.mkdir()
        authority = make_server_ca()
        self.ca_pem = pem(authority.certificate)
        self._files = write_credential(issue_server(authority), self.path, "push")

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def host(self, service: str) -> str:
        """Have it host a service, from its next start on; the certificate (PEM)."""
        owner = NetworkService(self.tenant.name, service)
        credential = self.tenant.service(service)
        _, key_file = write_credential(credential, self.path, f"{service}-{len(self._entries)}")
        self.services[owner] = credential
        self._entries = [entry for entry in self._entries if entry.owner != owner]
        self._entries.append(
            ServiceEntry(
                owner=owner,
                upstream=Upstream("https", f"{service}.example", 443),
                profile="generic",
                legacy=LegacyPolicy.STRICT,
                reverse_listen=None,
                certificate=credential.certificate,
                key_file=key_file,
            )
        )
        return pem(credential.certificate)

    async def start(self) -> None:
        """A process's start: it knows nothing."""
        self._lives += 1
        nowhere = Path("/nonexistent")
        tenant = TenantEntry(
            tenant=self.tenant.name,
            root_certificate=self.tenant.root.certificate,
            forward_listen=None,
            tunnel_hosts=frozenset(),
            interception_ca=CertificateFiles(certificate_file=nowhere, key_file=nowhere),
        )
        audit = AuditLog.open(self.path / f"audit-{self._lives}.jsonl", self.clock)
        self._parts.callback(audit.close)
        self.cache = KeyCache(self.clock)
        self.receiver = Receiver(
            proxy_id=self.id,
            cache=self.cache,
            audit=audit,
            clock=self.clock,
            validity_s=VALIDITY_S,
            directory=Directory.of(1, [tenant], self._entries),
        )
        await self.open_road()
        if self.broker is not None:
            self.listener = BrokerListener(
                self.broker,
                self.receiver,
                clock=SystemClock(),
                requests_per_s=1000,
                entitled=self.environments.check_entitled,
            )
            listening = asyncio.create_task(self.listener.run(), name="far-proxy:broker")
            self._parts.push_async_callback(_end, listening)

    async def open_road(self) -> None:
        """The push listener is there."""
        tls = ServerTls(*self._files, client_roots=[self.tenant.root.certificate])
        application = make_push_application(
            self.receiver, clock=self.clock, requests_per_s=1000, entitled=self.environments.check_entitled
        )
        await self._roads.enter_async_context(
            serving(application, host="localhost", port=self.port, ssl_context=tls.context, grace_s=0.1)
        )

    async def close_road(self) -> None:
        """The push listener is gone; the process lives on."""
        await self._roads.aclose()

    async def stop(self) -> None:
        await self.close_road()
        await self._parts.aclose()
        self.listener = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def listens_at_the_broker(self) -> None:
        await until(lambda: self.listener is not None and self.listener.failure is None, timeout_s=30)

    def holds(self, service: str) -> bool:
        """Whether it would seal with a key of *service* now."""
        try:
            self.cache.sealing_key(NetworkService(self.tenant.name, service))
        except KeyUnavailableError:
            return False
        return True

    def events(self, action: str) -> int:
        """How often it recorded *action*, in all its lives."""
        return sum(path.read_text().count(f'"action":"{action}"') for path in self.path.glob("audit-*.jsonl"))


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
