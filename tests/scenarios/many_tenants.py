"""Many tenants at one proxy: `sealgate run` is a process, the tenants' agents are all in this one.

    async with many_tenants(directory, count=100, rival="t050") as site:
        site["t007"].agents["a"]            # real: registry, TLS, push, audit log; the HSM is the fake one
        site["t050"].agents["b"]            # the rival has two environments, and b's agent is its manager
        await site["t007"].encrypt("aGVsbG8=")

1. The proxy belongs to environment `a`: it serves a tenant once that tenant's agent has told it so.
2. Every tenant has a root, a service (`files`), a credential and callers of its own. An agent is what
   `key-agent run` runs, but for its listener for people and the socket of its commands.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp

from certs import pki as dev_pki
from envelope.keys import KeyUse, NetworkService
from key_agent.agent import Agent
from key_agent.app import opened
from key_agent.config import (
    AgentSettings,
    EnvironmentsSettings,
    KeyPairSettings,
    PushSettings,
    RefreshSettings,
    Settings,
)
from key_agent.environments.assembly import Environments
from key_agent.operations.operations import Operations
from key_agent.sources.pkcs11 import Pkcs11Settings
from proxy.encryption_service.credentials import new_bearer
from proxy.encryption_service.model import DialectName
from proxy.tenants.credential_store import Grant, issue_credential
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.named_key_store import add_key
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from tests import pki
from tests.environments.site import Program, until
from tests.fakes.key_source import FakeKeySource
from tests.proxy_config import configured

SERVICE: Final = "files"
PROXY: Final = "shared-1"
INTERVAL_S, VALIDITY_S = 300, 330
"""As in production; nothing here waits for either."""
_AT_ONCE: Final = 16
_RESTS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tenant's program, answered. Seconds; *at_s* by `time.monotonic`."""

    at_s: float
    took_s: float
    status: int
    key_id: str


@dataclass
class RunningAgent:
    """One agent, with everything that `key-agent run` gives it, while its task lives."""

    settings: Settings
    source: FakeKeySource
    agent: Agent = field(init=False)
    operations: Operations = field(init=False)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    async def start(self, one_at_a_time: asyncio.Lock) -> None:
        """*one_at_a_time*: Alembic, which makes the tables, has one context for a whole process."""
        async with one_at_a_time:
            self._task = asyncio.create_task(self._run(), name=f"agent:{self.settings.agent.tenant}")
            ready = asyncio.create_task(self._ready.wait())
            await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.is_set():
            ready.cancel()
            await self._task

    async def stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        async with opened(self.settings, source=self.source) as agent:
            self.agent, self.operations = agent, Operations(agent)
            async with agent.working(refresh=True), self.environments.working():
                self._ready.set()
                await self._stop.wait()

    @property
    def environments(self) -> Environments:
        found = self.agent.environments
        assert isinstance(found, Environments)
        return found

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.environments.port}"

    @property
    def shared(self) -> tuple[object, ...]:
        """Where its shared rows stand: position and digest of all of them."""
        peering = self.environments.peering
        return (peering.position, peering.view.digest)


@dataclass
class SiteTenant:
    name: str
    tenant: pki.Tenant
    directory: Path
    token: str = field(repr=False)
    service_url: str
    certificate_pem: str = ""
    agents: dict[str, RunningAgent] = field(default_factory=dict, repr=False)
    calls: list[Call] = field(default_factory=list, repr=False)
    told_to_wait: int = 0

    @property
    def agent(self) -> RunningAgent:
        """Whoever feeds the proxy."""
        return self.agents["a"]

    def make_agent(self, environment: str) -> RunningAgent:
        home = self.directory / environment
        state = home / "state"
        state.mkdir(mode=0o700, parents=True)
        agent_id = f"agent-{environment}"
        signing, tls = (
            self.tenant.agent_signing(agent_id),
            self.tenant.agent_tls(agent_id, hostnames=["localhost"]),
        )
        pairs = [
            KeyPairSettings(certificate_file=certificate_file, key_file=key_file)
            for certificate_file, key_file in (
                pki.write_credential(signing, home, "signing"),
                pki.write_credential(tls, home, "tls"),
            )
        ]
        settings = Settings(
            agent=AgentSettings(
                id=agent_id,
                tenant=self.name,
                environment_id=environment,
                state_dir=state,
                root_certificate_file=pki.write_certificate(self.tenant.root.certificate, home / "root.pem"),
            ),
            signing=pairs[0],
            tls=pairs[1],
            # One is demanded; what stands in for the HSM is given to `opened`.
            pkcs11=Pkcs11Settings(module_path=home, token_label="fake", pin_file=home),
            refresh=RefreshSettings(interval_s=INTERVAL_S, validity_s=VALIDITY_S, watch_s=30),
            push=PushSettings(presence_s=15, request_timeout_s=60),
            environments=EnvironmentsSettings(host="127.0.0.1", port=0, heartbeat_s=10, request_timeout_s=10),
        )
        source = FakeKeySource(
            agent_id=agent_id, signing_key=signing.key, signing_certificate=signing.certificate
        )
        made = self.agents[environment] = RunningAgent(settings, source)
        return made

    async def call(self, session: aiohttp.ClientSession, path: str, body: dict[str, str]) -> dict[str, Any]:
        """A call of its program; kept in `calls`, whatever the answer is.

        The service may say that others wait for their part (429): a program comes again, as it is told to.
        """
        headers = {"Authorization": f"Bearer {self.token}"}
        began_s = time.monotonic()
        while True:
            async with session.post(f"{self.service_url}/{path}", json=body, headers=headers) as answer:
                document = dict(await answer.json(content_type=None))
            if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
                break
            self.told_to_wait += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        now_s = time.monotonic()
        self.calls.append(Call(now_s, now_s - began_s, answer.status, str(document.get("key_id", ""))))
        return document

    async def use(self, session: aiohttp.ClientSession) -> None:
        """Seal and open, again and again."""
        while True:
            sealed = await self.call(session, "encrypt", {"key": SERVICE, "plaintext": "aGVsbG8="})
            await asyncio.sleep(_RESTS)
            if "ciphertext" in sealed:
                opened = await self.call(session, "decrypt", {"ciphertext": sealed["ciphertext"]})
                assert opened.get("plaintext", "aGVsbG8=") == "aGVsbG8="
            await asyncio.sleep(_RESTS)


@dataclass
class ManyTenants:
    directory: Path
    ca_file: Path
    tenants: dict[str, SiteTenant]
    program: Program
    push_port: int
    health_url: str
    session: aiohttp.ClientSession

    def __getitem__(self, name: str) -> SiteTenant:
        return self.tenants[name]

    def others(self, *names: str) -> list[SiteTenant]:
        """All but these."""
        return [one for name, one in self.tenants.items() if name not in names]

    async def words(self) -> dict[str, Any]:
        """By tenant: what the proxy was told of its environment, and whether it serves."""
        async with self.session.get(f"{self.health_url}/v1/env/status") as answer:
            return dict((await answer.json())["tenants"])

    async def keys(self, one: SiteTenant) -> Any:
        """What the proxy says of a tenant's keys to a program of that tenant."""
        headers = {"Authorization": f"Bearer {one.token}"}
        while True:
            async with self.session.get(f"{one.service_url}/keys/{SERVICE}", headers=headers) as answer:
                if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
                    return answer.status, await answer.json()
                await asyncio.sleep(float(answer.headers["Retry-After"]))

    async def can_seal(self) -> dict[str, float]:
        """By tenant, as the proxy's metrics have it."""
        async with self.session.get(f"{self.health_url}/metrics") as answer:
            text = await answer.text()
        rows = [line for line in text.splitlines() if line.startswith("sealgate_key_can_seal{")]
        return {row.split('tenant="')[1].split('"')[0]: float(row.rsplit(" ", 1)[1]) for row in rows}

    def recorded(self) -> list[dict[str, Any]]:
        """The proxy's audit log."""
        lines = (self.directory / "proxy" / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    async def calling(self, count: int, tenants: Iterable[SiteTenant]) -> None:
        """Return when each of these has made *count* more calls."""
        wanted = {one.name: len(one.calls) + count for one in tenants}

        async def done() -> bool:
            return all(len(self[name].calls) >= number for name, number in wanted.items())

        await until(done, timeout_s=120)


@asynccontextmanager
async def many_tenants(directory: Path, *, count: int, rival: str) -> AsyncIterator[ManyTenants]:
    """All tenants have keys at the proxy, which serves them; each is called by a program of its own."""
    ca = pki.make_server_ca()
    ca_file = pki.write_certificate(ca.certificate, directory / "ca.pem")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
    names = [f"t{number:03}" for number in range(1, count + 1)]
    assert rival in names
    async with AsyncExitStack() as stack:
        # Callers come with the proxy's own connections, each tenant one.
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
            )
        )
        site = _proxy(directory, names, ca_file, server, session)
        await site.program.start()
        stack.push_async_callback(site.program.stop)
        places, one_at_a_time = asyncio.Semaphore(_AT_ONCE), asyncio.Lock()

        async def begin(one: SiteTenant) -> None:
            async with places:
                await _begin(one, site, one_at_a_time, with_second=one.name == rival)

        stack.push_async_callback(_stopped, site)
        async with asyncio.TaskGroup() as group:
            for one in site.tenants.values():
                group.create_task(begin(one), name=f"begin:{one.name}")

        async def serves() -> bool:
            return all(one["serves"] for one in (await site.words()).values()) and all(
                (await site.can_seal()).values()
            )

        await until(serves, timeout_s=90)
        callers = [asyncio.create_task(one.use(session), name=one.name) for one in site.tenants.values()]
        try:
            yield site
        finally:
            for caller in callers:
                caller.cancel()
            for ended in await asyncio.gather(*callers, return_exceptions=True):
                assert isinstance(ended, asyncio.CancelledError), ended


async def _stopped(site: ManyTenants) -> None:
    await asyncio.gather(*(agent.stop() for one in site.tenants.values() for agent in one.agents.values()))


async def _begin(
    one: SiteTenant, site: ManyTenants, one_at_a_time: asyncio.Lock, *, with_second: bool
) -> None:
    first = one.make_agent("b" if with_second else "a")
    await first.start(one_at_a_time)
    await first.operations.kek_create()
    await first.operations.env_init(url=first.url)
    if with_second:
        await _join(one, first, one_at_a_time)
    agent = one.agent
    await agent.operations.proxy_add(
        proxy=PROXY, url=f"https://localhost:{site.push_port}", ca_pem=site.ca_file.read_text()
    )
    await agent.operations.service_add(service=SERVICE, proxy=PROXY, certificate_pem=one.certificate_pem)


async def _join(one: SiteTenant, first: RunningAgent, one_at_a_time: asyncio.Lock) -> None:
    other = one.make_agent("a")
    await other.start(one_at_a_time)
    await other.operations.kek_create()
    manager = await first.operations.env_identity()
    asked = await other.operations.env_join(
        url=other.url,
        manager_url=first.url,
        manager_agent=first.agent.agent_id,
        fingerprint=str(manager["fingerprint"]),
    )
    await first.operations.env_add(environment="a", fingerprint=str(asked["fingerprint"]))

    async def active() -> bool:
        rows = (await first.operations.env_list())["environments"]
        assert isinstance(rows, list)
        return any(row["environment"] == "a" and row["state"] == "active" for row in rows)

    await until(active, timeout_s=60)


def _proxy(
    directory: Path,
    names: Iterable[str],
    ca_file: Path,
    server: tuple[Path, Path],
    session: aiohttp.ClientSession,
) -> ManyTenants:
    home = directory / "proxy"
    made = configured(home, PROXY, server=server, ca_file=ca_file, environment="a", dialects=["native"])
    service_url = f"http://127.0.0.1:{made.service_port}/sealgate/v1"
    health_url = f"http://127.0.0.1:{made.health_port}"
    with contextlib.closing(made.store()) as store:
        tenants = {name: _tenant(store, name, directory, service_url) for name in names}

    async def listens() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{health_url}/livez"):
                return True
        return False

    program = Program(("sealgate", "--config", str(made.config), "run"), {}, home / "log", listens)
    return ManyTenants(directory, ca_file, tenants, program, made.push_port, health_url, session)


def _tenant(store: DirectoryStore, name: str, directory: Path, service_url: str) -> SiteTenant:
    tenant, owner, token = pki.make_tenant(name), NetworkService(name, SERVICE), new_bearer().token
    add_tenant(store, name, tenant.root.certificate, actor="test")
    set_dialect(store, name, DialectName.NATIVE, actor="test")
    issue_credential(
        store, Grant(tenant=name, dialect=DialectName.NATIVE, label="test"), actor="test", token=token
    )
    csr = add_key(store, owner, use=KeyUse.DATA, algorithm=None, actor="test")
    signed = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
    import_certificate(store, owner, signed, actor="test")
    made = SiteTenant(name, tenant, directory / name, token, service_url)
    made.certificate_pem = dev_pki.certificate_pem(signed).decode()
    return made
