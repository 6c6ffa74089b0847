"""`sealgate run` as a process of its own: provisioned, pushed to over mutual TLS, used by curl, stopped."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from certs import pki as dev_pki
from envelope.base64url import b64u_decode
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.material import Claims, Operation, seal_envelope
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Listen, Upstream
from proxy.tenants.network_service_store import add_service, remove_service
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from runtime.audit_files import read_files
from runtime.clock import SystemClock
from runtime.tls import client_context
from tests import pki
from tests.children import output_of
from tests.integration.proxy_rig import REPOSITORY, Answer, Origin, curl, webdav
from tests.ports import free_port

OWNER = NetworkService("acme", "files")
PROGRAM = """
import sys
from pathlib import Path
from proxy import app, config
app.run_proxy(config.load(Path(sys.argv[1]), {}))
"""


@dataclass(slots=True)
class Installation:
    """A state directory, a configuration and an enterprise that pushes to it."""

    directory: Path
    origin: Origin
    tenant: pki.Tenant
    store: DirectoryStore
    config: Path
    push_port: int
    health_port: int
    service_port: int
    material: bytes = field(default_factory=lambda: os.urandom(32))
    key_id: KeyId = field(default_factory=KeyId.random)
    sequence: int = field(default_factory=lambda: int(time.time() * 1000))

    @property
    def ca_file(self) -> Path:
        return self.store.snapshot().tenants["acme"].interception_ca.certificate_file

    async def ask(self, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        url = f"https://127.0.0.1:{self.service_port}{path}"
        return await curl("--cacert", str(self.ca_file), *arguments, url, body=body)

    async def health(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    status, _ = await self.health("/readyz")
                    if status == 200:
                        return
                await asyncio.sleep(0.05)

    async def push(self, *, keys: bool = True) -> dict[str, object]:
        """One session and one envelope; without *keys* it is the revocation."""
        certificate = self.store.snapshot().services[OWNER].certificate
        assert certificate is not None
        signing = self.tenant.agent_signing()
        trust = client_context(
            self.directory / "server-ca.pem", self.directory / "agent.pem", self.directory / "agent.key"
        )
        async with aiohttp.ClientSession(
            f"https://localhost:{self.push_port}", connector=aiohttp.TCPConnector(ssl=trust)
        ) as session:
            introduction = dev_pki.certificate_pem(signing.certificate).decode()
            hello = {"agent": "hq", "signing_certificate": introduction}
            async with session.post("/push/v1/session", json=hello) as answer:
                assert answer.status == 200, await answer.text()
                opened = await answer.json()
            self.sequence += 1
            now_s = int(time.time())
            material = KeyMaterial(
                owner=OWNER, key_id=self.key_id, state=KeyState.ACTIVE, secret=bytearray(self.material)
            )
            token = seal_envelope(
                Claims(
                    issuer="hq",
                    audience=opened["proxy"],
                    owner=OWNER,
                    issued_at_s=now_s,
                    expires_at_s=now_s + 330,
                    sequence=self.sequence,
                    token_id=os.urandom(16),
                    nonce=b64u_decode(opened["challenge"]),
                    operation=Operation.SET,
                    keys=(material,) if keys else (),
                ),
                recipient=certificate,
                signing_key=signing.key,
                signing_certificate=signing.certificate,
            )
            async with session.post("/push/v1/envelopes", json={"envelopes": [token]}) as answer:
                receipts = (await answer.json())["receipts"]
        receipt: dict[str, object] = receipts[0]
        return receipt


@pytest.fixture
async def installation(tmp_path: Path) -> AsyncIterator[Installation]:
    ca = pki.make_server_ca()
    pki.write_credential(ca, tmp_path, "server-ca")
    server = pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server")
    tenant = pki.make_tenant("acme")
    pki.write_credential(tenant.agent_tls(), tmp_path, "agent")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    push_port, health_port, service_port = free_port(), free_port(), free_port()
    config = tmp_path / "sealgate.toml"
    config.write_text(f"""
        [proxy]
        id = "proxy-1"
        state_dir = "{state}"
        reload_s = 0.1
        [push]
        host = "127.0.0.1"
        port = {push_port}
        certificate_file = "{server[0]}"
        key_file = "{server[1]}"
        [keys]
        wait_s = 0.2
        [engine]
        http2 = true
        upstream_ca_file = "{tmp_path / "server-ca.pem"}"
        drain_s = 5
        [health]
        port = {health_port}
        [audit]
        max_bytes = 4096
    """)
    async with webdav(tmp_path, *server) as origin:
        with DirectoryStore.open(f"sqlite:///{state}/directory.db", state, clock=SystemClock()) as store:
            add_tenant(store, "acme", tenant.root.certificate, actor="test")
            csr = add_service(
                store,
                OWNER,
                Upstream.parse(origin.url),
                actor="test",
                reverse_listen=Listen("127.0.0.1", service_port),
            )
            signed = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
            import_certificate(store, OWNER, signed, actor="test")
            yield Installation(tmp_path, origin, tenant, store, config, push_port, health_port, service_port)


@contextlib.asynccontextmanager
async def running(installation: Installation) -> AsyncIterator[asyncio.subprocess.Process]:
    log = (installation.directory / "log").open("ab")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(installation.config), stdout=log, stderr=log, cwd=REPOSITORY
    )
    try:
        await installation.ready()
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()
        log.close()


async def eventually(condition: Callable[[Answer], bool], installation: Installation, path: str) -> Answer:
    async with asyncio.timeout(60):
        while True:
            answer = await installation.ask(path)
            if condition(answer):
                return answer
            await asyncio.sleep(0.05)


async def test_pushed_used_revoked_and_stopped(installation: Installation) -> None:
    plain = os.urandom(50_000)
    async with running(installation) as process:
        refused = await installation.ask("/a", "-T", "-", body=plain)
        assert (refused.status, refused.code) == (503, "no-active-key")
        assert installation.origin.names() == []

        assert (await installation.push())["status"] == "accepted"
        assert (await installation.ask("/a", "-T", "-", body=plain)).status == 201
        assert plain[:16] not in installation.origin.stored("a")
        got = await installation.ask("/a", "--http2")
        assert (got.status, got.body, got.version) == (200, plain, "2")
        _, metrics = await installation.health("/metrics")
        assert 'sealgate_key_can_seal{service="files",tenant="acme"} 1.0' in metrics

        assert (await installation.push(keys=False))["status"] == "accepted"
        gone = await installation.ask("/a")
        assert (gone.status, gone.code, gone.body.count(plain[:16])) == (503, "key-withdrawn", 0)

        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    audit_file = installation.directory / "state" / "audit.jsonl"
    files = read_files(audit_file)
    assert files.closed, "as many events as fit into a file of 4 KiB, and no more"
    lines = [line for file in (*files.closed, audit_file) for line in file.read_text().splitlines()]
    actions = [json.loads(line)["action"] for line in lines]
    assert actions[-1] == "proxy-stopped"
    for action in ("proxy-started", "keys-accepted", "object-seal", "object-open", "keys-withdrawn"):
        assert action in actions
    log = (installation.directory / "log").read_text()
    assert "Traceback" not in log
    assert installation.material.hex() not in log


async def test_a_change_of_the_directory_is_served_while_running(installation: Installation) -> None:
    async with running(installation):
        await installation.push()
        await installation.ask("/a", "-T", "-", body=b"x" * 100)
        remove_service(installation.store, OWNER, actor="test")
        await eventually(lambda answer: answer.exit_code in (7, 35, 52, 56), installation, "/a")
        assert (await installation.health("/readyz"))[0] == 200


async def test_a_listener_that_is_taken_is_told_and_opened_later(installation: Installation) -> None:
    squatter = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", installation.service_port)
    log = (installation.directory / "log").open("ab")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(installation.config), stdout=log, stderr=log, cwd=REPOSITORY
    )
    try:
        async with asyncio.timeout(60):
            reasons = ""
            while str(installation.service_port) not in reasons:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    status, reasons = await installation.health("/readyz")
                    assert status == 503
                await asyncio.sleep(0.05)
        squatter.close()
        await squatter.wait_closed()
        await installation.ready()
        assert (await installation.ask("/absent")).status == 404
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
        log.close()


async def test_what_the_operator_must_mend_ends_the_process_with_cause_and_next_step(
    installation: Installation,
) -> None:
    installation.config.write_text(installation.config.read_text().replace("server.pem", "absent.pem"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(installation.config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=REPOSITORY,
    )  # fmt: skip
    out, _ = await output_of(process)
    assert process.returncode != 0
    assert b"CommandError" in out
    assert b"absent.pem" in out
