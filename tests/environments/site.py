"""Several environments of one tenant as real processes: `key-agent run` with a token and a database of its
own each, and `sealgate run` beside it.

    async with environments_site(directory, kinds={"a": "aes-256", "b": "rsa-3072", "c": "ec-p256"}) as site:
        async with site.agents():                       # all agents run
            await site.unite()                          # env init, join, add: one set of environments
            await site.add_service("files")             # at every proxy of every environment
            async with site.proxies():                  # all proxies run
                ...
                site["b"].network.inject(Fault.BLACK_HOLE)   # nobody reaches b any more
                site.part("b")                               # ... and b reaches nobody either
                site["b"].agent.freeze(), .thaw(), .kill()

Between the agents, and between agents and proxies, stand relays (fault_proxy.py) that a test can disturb.
Databases: SQLite, or with *postgres* a database of its own each in that cluster.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp

from certs import pki as dev_pki
from envelope.keys import KeyUse, NetworkService, SigningAlgorithm
from key_agent.api import client
from proxy.encryption_service.credentials import new_bearer
from proxy.encryption_service.model import DialectName
from proxy.tenants.credential_store import Grant, issue_credential
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.named_key_store import add_key
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from tests import pki
from tests.environments.fault_proxy import Fault, FaultProxy
from tests.ports import free_port
from tests.proxy_config import configured
from tests.softhsm import SoftHsm

REPOSITORY: Final = Path(__file__).parents[2]
_BIN: Final = Path(sys.executable).parent
TENANT: Final = "acme"
KINDS: Final = {"a": "aes-256", "b": "rsa-3072", "c": "ec-p256"}
START_S: Final = 180
"""Of a program, beside many others; one that ends instead is not waited for."""


async def until(condition: Callable[[], Awaitable[object]], *, timeout_s: float = 60) -> float:
    """Seconds until *condition* held."""
    began_s = time.monotonic()
    while not await condition():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.02)
    return time.monotonic() - began_s


@dataclass(slots=True)
class Program:
    """One process of ours, and the hands on it."""

    words: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    is_ready: Callable[[], Awaitable[object]]
    process: asyncio.subprocess.Process | None = None

    async def start(self, *, wait: bool = True) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(_BIN / self.words[0]), *self.words[1:],
                env=kept | self.environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=REPOSITORY,
            )  # fmt: skip
        if wait:
            await until(self._ready, timeout_s=START_S)

    async def _ready(self) -> object:
        assert self.runs, self.log.read_text()[-4000:]
        return await self.is_ready()

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """kill -9. No-op if it does not run."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def stop(self) -> int | None:
        """SIGTERM; its exit status."""
        if self.process is None:
            return None
        if self.process.returncode is None:
            self.thaw()
            self.process.terminate()
            try:
                async with asyncio.timeout(40):
                    await self.process.wait()
            except TimeoutError:
                await self.kill()
                raise
        return self.process.returncode


@dataclass(slots=True)
class SiteProxy:
    """One `sealgate run` with the encryption service (native dialect, plain, on loopback)."""

    name: str
    config: Path
    store: DirectoryStore
    push: FaultProxy
    """Between its environment's agent and its push listener."""
    health_port: int
    service_port: int
    program: Program
    token: str = field(default="", repr=False)
    certificate_files: dict[str, Path] = field(default_factory=dict)
    """By service."""

    @property
    def url(self) -> str:
        """Of the native API."""
        return f"http://127.0.0.1:{self.service_port}/sealgate/v1"

    async def health(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def listens(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return bool((await self.health("/livez"))[0])
        return False

    def host(
        self, tenant: pki.Tenant, service: str, *, use: str = "data", algorithm: str | None = None
    ) -> Path:
        """Have it host *service*; the file of the certificate to tell the agent."""
        owner = NetworkService(TENANT, service)
        signs = None if algorithm is None else SigningAlgorithm(algorithm)
        csr = add_key(self.store, owner, use=KeyUse(use), algorithm=signs, actor="test")
        signed = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
        import_certificate(self.store, owner, signed, actor="test")
        file = pki.write_certificate(signed, self.config.parent / f"{service}.pem")
        self.certificate_files[service] = file
        return file

    async def hosts(self, service: str) -> bool:
        """Whether it has seen that it hosts *service*; one that does not run sees it before it serves."""
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.token}"}) as session:
            try:
                async with session.get(f"{self.url}/keys/{service}") as answer:
                    return answer.status != HTTPStatus.NOT_FOUND
            except aiohttp.ClientConnectorError:
                return True

    async def call(self, operation: str, body: Mapping[str, object]) -> tuple[int, dict[str, Any]]:
        """*operation* as in `keys/files/encrypt`; status and document."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{self.url}/{operation}", json=body, headers={"Authorization": f"Bearer {self.token}"}
            ) as answer,
        ):
            return answer.status, dict(await answer.json(content_type=None))


@dataclass(slots=True)
class SiteEnvironment:
    """An environment: its HSM, its agent with its database, its proxies."""

    name: str
    agent_id: str
    kek_type: str
    directory: Path
    hsm: SoftHsm
    config: Path
    network: FaultProxy
    """Through it the other agents reach this one."""
    agent: Program
    proxies: list[SiteProxy]
    database_url: str | None

    @property
    def state_dir(self) -> Path:
        return self.directory / "agent-state"

    @property
    def url(self) -> str:
        """What the other agents know."""
        return f"https://127.0.0.1:{self.network.port}"

    async def command(self, *words: str, exit_code: int = 0) -> Any:
        """A `key-agent` command here: its JSON, or with another *exit_code* its error."""
        process = await asyncio.create_subprocess_exec(
            str(_BIN / "key-agent"), "--config", str(self.config), "--json", *words,
            env=os.environ | self.hsm.environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        async with asyncio.timeout(90):
            out, err = await process.communicate()
        assert process.returncode == exit_code, (words, process.returncode, out.decode(), err.decode())
        if exit_code == 0:
            return json.loads(out)
        return json.loads((out or err).splitlines()[-1])["error"]

    async def ask(self, operation: str, **arguments: object) -> Any:
        """An operation of the running agent, without a process for it: for conditions that are waited for."""
        answer = await client.call(self.state_dir / "control.sock", operation, arguments)
        assert answer is not None, "the agent does not run"
        return answer

    async def add_service(self, service: str, proxy: SiteProxy, tenant: pki.Tenant, **more: str) -> None:
        """Have *proxy* host *service*, and its agent know it. The agent runs."""
        file = proxy.certificate_files.get(service)
        if file is None:
            file = proxy.host(tenant, service, **more)
            # Else the first keys are refused, and the next come when the agent tries again.
            await until(lambda: proxy.hosts(service))
        await self.ask(
            "service_add", service=service, proxy=proxy.name, certificate_pem=file.read_text(), **more
        )

    async def status(self) -> Any:
        return await self.command("status")


@dataclass(slots=True)
class EnvironmentsSite:
    directory: Path
    tenant: pki.Tenant
    ca_file: Path
    environments: dict[str, SiteEnvironment]

    def __getitem__(self, name: str) -> SiteEnvironment:
        return self.environments[name]

    @property
    def first(self) -> SiteEnvironment:
        """The one whose agent is the manager after `unite`."""
        return next(iter(self.environments.values()))

    @asynccontextmanager
    async def agents(self, *names: str) -> AsyncIterator[None]:
        """The agents of these environments, or of all, run while the block does."""
        chosen = [self[name] for name in names] or list(self.environments.values())
        try:
            await asyncio.gather(*(one.agent.start() for one in chosen))
            yield
        finally:
            await asyncio.gather(*(one.agent.stop() for one in chosen))

    @asynccontextmanager
    async def proxies(self, *names: str) -> AsyncIterator[None]:
        """The proxies of these environments, or of all, run while the block does."""
        chosen = [self[name] for name in names] or list(self.environments.values())
        programs = [proxy.program for one in chosen for proxy in one.proxies]
        try:
            await asyncio.gather(*(program.start() for program in programs))
            yield
        finally:
            await asyncio.gather(*(program.stop() for program in programs))

    async def unite(self, *names: str) -> None:
        """Make one set of environments of these, or of all; the first becomes the manager's. Agents run."""
        manager, *others = [self[name] for name in names] or list(self.environments.values())
        await manager.ask("env_init", url=manager.url)
        for other in others:
            await self.join(other.name, manager=manager.name)

    async def join(self, name: str, *, manager: str | None = None) -> None:
        """*name* joins the set of the manager's environment, as two administrators would have it."""
        first, other = self[manager] if manager else self.first, self[name]
        fingerprint = (await first.ask("env_identity"))["fingerprint"]
        asked = await other.ask(
            "env_join",
            url=other.url,
            manager_url=first.url,
            manager_agent=first.agent_id,
            fingerprint=fingerprint,
        )
        await first.ask("env_add", environment=name, fingerprint=asked["fingerprint"])
        await until(lambda: self._is_active(first, name))

    async def _is_active(self, seen_by: SiteEnvironment, name: str) -> bool:
        rows = (await seen_by.ask("env_list"))["environments"]
        return any(row["environment"] == name and row["state"] == "active" for row in rows)

    async def add_service(self, service: str, **more: str) -> None:
        """Provision *service* at every proxy of every environment: keys are made, wrapped and pushed.

        *more*: `use` and `algorithm`, for signing keys. The agents run.
        """
        for environment in self.environments.values():
            for proxy in environment.proxies:
                await environment.add_service(service, proxy, self.tenant, **more)

    def part(self, name: str) -> None:
        """Cut this environment's agent off from all others, in both directions; its proxies stay with it."""
        self[name].network.inject(Fault.BLACK_HOLE)
        for other in self.environments.values():
            if other.name != name:
                other.network.lose_from(self[name].agent.pid)

    def heal_network(self) -> None:
        """Everybody reaches everybody again."""
        for one in self.environments.values():
            one.network.inject(Fault.NONE)
            one.network.lose_from(None)


def _agent(
    directory: Path,
    tenant: pki.Tenant,
    *,
    name: str,
    kek_type: str,
    database_url: str | None,
    more: str,
    rhythm: tuple[float, float, float],
    key_server: str | None,
) -> SiteEnvironment:
    interval_s, validity_s, heartbeat_s = rhythm
    agent_id = f"agent-{name}"
    home = directory / name
    home.mkdir()
    state = home / "agent-state"
    state.mkdir(mode=0o700)
    hsm = SoftHsm.create(home / "hsm", label=f"sealgate-{name}")
    pki.write_certificate(tenant.root.certificate, home / "root.pem")
    pki.write_credential(tenant.agent_signing(agent_id), home, "signing")
    pki.write_credential(tenant.agent_tls(agent_id, hostnames=["localhost"]), home, "tls")
    port = free_port()
    config = home / "key-agent.toml"
    database = "" if database_url is None else f'database_url = "{database_url}"'
    source = key_server or (
        f'[pkcs11]\nmodule_path = "{hsm.module}"\ntoken_label = "{hsm.label}"\npin_file = "{hsm.pin_file}"'
    )
    config.write_text(f"""
        [agent]
        id = "{agent_id}"
        tenant = "{TENANT}"
        environment_id = "{name}"
        state_dir = "{state}"
        root_certificate_file = "root.pem"
        {database}
        [signing]
        certificate_file = "signing.pem"
        key_file = "signing.key"
        [tls]
        certificate_file = "tls.pem"
        key_file = "tls.key"
        {source}
        [refresh]
        interval_s = {interval_s}
        validity_s = {validity_s}
        [push]
        presence_s = 1
        [admin]
        port = 0
        [environments]
        host = "127.0.0.1"
        port = {port}
        heartbeat_s = {heartbeat_s}
        {more}
    """)

    async def listens() -> bool:
        try:  # the file may be of a life that was killed
            _, writer = await asyncio.open_unix_connection(str(state / "control.sock"))
        except OSError:
            return False
        writer.close()
        return True

    program = Program(
        ("key-agent", "--config", str(config), "run"), hsm.environment, home / "agent.log", listens
    )
    return SiteEnvironment(
        name, agent_id, kek_type, home, hsm, config, FaultProxy(port), program, [], database_url
    )


def _proxy(
    home: Path,
    name: str,
    tenant: pki.Tenant,
    server: tuple[Path, Path],
    ca_file: Path,
    *,
    token: str,
    environment: str | None,
) -> SiteProxy:
    directory = home / name
    configuration = configured(
        directory,
        name,
        server=server,
        ca_file=ca_file,
        environment=environment,
        dialects=["native", "xks"],
        reload_s=0.1,
    )
    store = configuration.store()
    add_tenant(store, TENANT, tenant.root.certificate, actor="test")
    set_dialect(store, TENANT, DialectName.NATIVE, actor="test")
    grant = Grant(tenant=TENANT, dialect=DialectName.NATIVE, label="test")
    issue_credential(store, grant, actor="test", token=token)
    made = SiteProxy(
        name,
        configuration.config,
        store,
        FaultProxy(configuration.push_port),
        configuration.health_port,
        configuration.service_port,
        Program(("sealgate", "--config", str(configuration.config), "run"), {}, directory / "log", _never),
        token,
    )
    made.program.is_ready = made.listens
    return made


async def _never() -> bool:
    return False


@asynccontextmanager
async def environments_site(
    directory: Path,
    *,
    kinds: Mapping[str, str] = KINDS,
    proxies_each: int = 2,
    database_urls: Mapping[str, str] | None = None,
    rhythm: tuple[float, float, float] = (30, 33, 0.5),
    more: str = "",
    named: bool = False,
    key_servers: Mapping[str, str] | None = None,
) -> AsyncIterator[EnvironmentsSite]:
    """Environments by name, with the type of their KEKs; each has its KEK, knows its proxies, and no more.

    *rhythm*: refresh interval, validity, heartbeat, in seconds. *more*: lines for [environments].
    *named*: the proxies say in their settings which environment they belong to. All let in one token.
    *key_servers*: by environment, the table of its key server, in place of that of its HSM.
    """
    tenant = pki.make_tenant(TENANT)
    ca = pki.make_server_ca()
    ca_file = pki.write_certificate(ca.certificate, directory / "server-ca.pem")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
    site = EnvironmentsSite(directory, tenant, ca_file, {})
    token = new_bearer().token
    async with contextlib.AsyncExitStack() as stack:
        for name, kek_type in kinds.items():
            made = await asyncio.to_thread(
                _agent, directory, tenant, name=name, kek_type=kek_type, more=more, rhythm=rhythm,
                database_url=None if database_urls is None else database_urls[name],
                key_server=(key_servers or {}).get(name),
            )  # fmt: skip
            await stack.enter_async_context(made.network)
            site.environments[name] = made
            for number in range(1, proxies_each + 1):
                proxy = _proxy(
                    made.directory, f"{name}{number}", tenant, server, ca_file,
                    token=token, environment=name if named else None,
                )  # fmt: skip
                stack.callback(proxy.store.close)
                await stack.enter_async_context(proxy.push)
                made.proxies.append(proxy)
        await asyncio.gather(*(_provision(made, ca_file) for made in site.environments.values()))
        yield site


async def _provision(made: SiteEnvironment, ca_file: Path) -> None:
    await made.command("kek", "create", "--type", made.kek_type)
    for proxy in made.proxies:
        await made.command(
            "proxy", "add", proxy.name,
            "--url", f"https://localhost:{proxy.push.port}", "--ca", str(ca_file),
        )  # fmt: skip
