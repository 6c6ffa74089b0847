"""The whole of it for one tenant: `key-agent run` with a SoftHSM2 token, `sealgate run`, a WebDAV server.

Between the agent and each proxy's push listener stands a relay, which a test can cut.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from certs import pki as dev_pki
from envelope.keys import NetworkService
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Listen, Upstream
from proxy.tenants.network_service_store import add_service
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from tests import pki
from tests.children import output_of
from tests.integration.proxy_rig import REPOSITORY, Answer, Origin, curl, webdav
from tests.proxy_config import configured
from tests.softhsm import SoftHsm

OWNER = NetworkService("acme", "files")
BIN = Path(sys.executable).parent


@dataclass(slots=True)
class Relay:
    """The network between the agent and a proxy's push listener, which can fail."""

    target: int
    port: int = 0
    _server: asyncio.Server | None = None
    _transports: set[asyncio.StreamWriter] = field(default_factory=set)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._transports):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except ConnectionRefusedError:  # the proxy is away
            writer.transport.abort()
            return
        self._transports |= {writer, back}
        await asyncio.gather(_pump(reader, back), _pump(there, writer))
        self._transports -= {writer, back}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    writer.close()


@dataclass(slots=True)
class Proxy:
    """One `sealgate run`, provisioned for the one service."""

    name: str
    config: Path
    store: DirectoryStore
    relay: Relay
    health_port: int
    service_port: int
    certificate_file: Path

    async def ask(self, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        ca_file = self.store.snapshot().tenants["acme"].interception_ca.certificate_file
        url = f"https://127.0.0.1:{self.service_port}{path}"
        return await curl("--cacert", str(ca_file), *arguments, url, body=body)

    async def serves(self, path: str, plain: bytes) -> bool:
        """Whether *path* is served whole. A download that its keys end under is cut, and visibly so."""
        answer = await self.ask(path)
        assert plain[:32] not in answer.body or answer.body == plain or answer.exit_code != 0
        return answer.status == 200 and answer.exit_code == 0

    async def _health(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def is_ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return (await self._health("/readyz"))[0] == 200
        return False

    async def valid_for_s(self) -> float:
        _, text = await self._health("/metrics")
        found = re.search(r'sealgate_key_valid_seconds\{service="files",tenant="acme"\} (\S+)', text)
        assert found is not None
        return float(found[1])

    def actions(self) -> list[str]:
        lines = (self.config.parent / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line)["action"] for line in lines]


@dataclass(slots=True)
class Site:
    directory: Path
    hsm: SoftHsm
    origin: Origin
    proxies: list[Proxy]
    agent_config: Path

    @property
    def registry_file(self) -> Path:
        return self.agent_config.parent / "agent-state" / "registry.db"

    @contextlib.asynccontextmanager
    async def process(self, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """A program of ours while the block runs; SIGTERM ends it."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        with (self.directory / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                str(BIN / words[0]), *words[1:],
                env=environment | self.hsm.environment, stdout=log, stderr=log, cwd=REPOSITORY,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                await process.wait()

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[asyncio.subprocess.Process]:
        async with self.process("key-agent", "--config", str(self.agent_config), "run") as process:
            await until(self._agent_listens)
            yield process

    async def _agent_listens(self) -> bool:
        return (self.agent_config.parent / "agent-state" / "control.sock").exists()

    @contextlib.asynccontextmanager
    async def proxy(self, proxy: Proxy) -> AsyncIterator[asyncio.subprocess.Process]:
        async with self.process("sealgate", "--config", str(proxy.config), "run") as process:
            await until(proxy.is_ready)
            yield process

    async def command(self, *words: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "key-agent"), "--config", str(self.agent_config), "--json", *words,
            env=os.environ | self.hsm.environment, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        out, _ = await output_of(process)
        assert process.returncode == 0, (words, out.decode())
        return json.loads(out)

    async def add_service(self, proxy: Proxy) -> None:
        certificate = str(proxy.certificate_file)
        await self.command("service", "add", "files", "--proxy", proxy.name, "--certificate", certificate)

    async def destroy_kek_by_another_process(self) -> None:
        kek = (await self.command("kek", "status"))["kek"]
        reference = Reference(kek["label"], bytes.fromhex(kek["object_id"]))
        assert await asyncio.to_thread(self.hsm.run, "destroy", reference) == 1


@dataclass(frozen=True, slots=True)
class Reference:
    label: str
    object_id: bytes


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 60) -> float:
    """Seconds until *condition* held."""
    began_s = time.monotonic()
    while not await condition():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.05)
    return time.monotonic() - began_s


def _agent_config(directory: Path, hsm: SoftHsm, tenant: pki.Tenant, rhythm: tuple[int, int]) -> Path:
    interval_s, validity_s = rhythm
    pki.write_certificate(tenant.root.certificate, directory / "root.pem")
    pki.write_credential(tenant.agent_signing("hq"), directory, "signing")
    pki.write_credential(tenant.agent_tls("hq"), directory, "tls")
    (directory / "agent-state").mkdir(mode=0o700)
    config = directory / "key-agent.toml"
    config.write_text(f"""
        [agent]
        id = "hq"
        tenant = "acme"
        environment_id = "main"
        state_dir = "{directory / "agent-state"}"
        root_certificate_file = "root.pem"
        [signing]
        certificate_file = "signing.pem"
        key_file = "signing.key"
        [tls]
        certificate_file = "tls.pem"
        key_file = "tls.key"
        [pkcs11]
        module_path = "{hsm.module}"
        token_label = "{hsm.label}"
        pin_file = "{hsm.pin_file}"
        [refresh]
        interval_s = {interval_s}
        validity_s = {validity_s}
        [admin]
        port = 0
    """)
    return config


def _proxy(
    name: str, origin: Origin, tenant: pki.Tenant, *, server: tuple[Path, Path], ca_file: Path
) -> Proxy:
    home = ca_file.parent / name
    made = configured(home, name, server=server, ca_file=ca_file)
    store = made.store()
    add_tenant(store, "acme", tenant.root.certificate, actor="test")
    csr = add_service(
        store,
        OWNER,
        Upstream.parse(origin.url),
        actor="test",
        reverse_listen=Listen("127.0.0.1", made.service_port),
    )
    signed = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
    import_certificate(store, OWNER, signed, actor="test")
    certificate_file = pki.write_certificate(signed, home / "files.pem")
    return Proxy(
        name,
        made.config,
        store,
        Relay(made.push_port),
        made.health_port,
        made.service_port,
        certificate_file,
    )


@contextlib.asynccontextmanager
async def whole_site(
    directory: Path, *, names: Sequence[str], interval_s: int, validity_s: int
) -> AsyncIterator[Site]:
    """A site with a KEK, a proxy for each of *names*, and one service at all of them; nothing runs yet."""
    tenant = pki.make_tenant("acme")
    hsm = await asyncio.to_thread(SoftHsm.create, directory / "hsm")
    ca = pki.make_server_ca()
    ca_file = pki.write_certificate(ca.certificate, directory / "server-ca.pem")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
    async with webdav(directory, *server) as origin:
        proxies = [_proxy(name, origin, tenant, server=server, ca_file=ca_file) for name in names]
        config = _agent_config(directory, hsm, tenant, (interval_s, validity_s))
        made = Site(directory, hsm, origin, proxies, config)
        try:
            await made.command("kek", "create")
            for proxy in proxies:
                await proxy.relay.open()
                await made.command(
                    "proxy", "add", proxy.name,
                    "--url", f"https://localhost:{proxy.relay.port}", "--ca", str(ca_file),
                )  # fmt: skip
                await made.add_service(proxy)
            yield made
        finally:
            for proxy in proxies:
                await proxy.relay.cut()
                proxy.store.close()
