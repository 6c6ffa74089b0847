"""A proxy with the encryption service as a process of its own: provisioned, pushed to, called, killed."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from certs import pki as dev_pki
from envelope.base64url import b64u_decode
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.material import Claims, Operation, seal_envelope
from proxy.encryption_service.model import DialectName
from proxy.tenants.credential_store import Grant, issue_credential
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.named_key_store import add_key
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from runtime.clock import SystemClock
from runtime.tls import client_context
from tests import pki
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]
OWNER = NetworkService("acme", "orders")
PROGRAM = """
import sys
from pathlib import Path
from proxy import app, config
app.run_proxy(config.load(Path(sys.argv[1]), {}))
"""


@dataclass(slots=True)
class Site:
    directory: Path
    tenant: pki.Tenant
    config: Path
    push_port: int
    health_port: int
    port: int
    token: str
    recipient: object
    process: asyncio.subprocess.Process | None = None
    material: bytes = field(default_factory=lambda: os.urandom(32))
    key_id: KeyId = field(default_factory=KeyId.random)
    sequence: int = field(default_factory=lambda: int(time.time() * 1000))

    @classmethod
    def make(cls, directory: Path, *, workers: int, patience_s: float = 5.0) -> "Site":
        ca = pki.make_server_ca()
        pki.write_credential(ca, directory, "server-ca")
        server = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
        tenant = pki.make_tenant("acme")
        pki.write_credential(tenant.agent_tls(), directory, "agent")
        state = directory / "state"
        state.mkdir(mode=0o700)
        push_port, health_port, port = free_port(), free_port(), free_port()
        with DirectoryStore.open(f"sqlite:///{state}/directory.db", state, clock=SystemClock()) as store:
            add_tenant(store, "acme", tenant.root.certificate, actor="test")
            csr = add_key(store, OWNER, actor="test")
            recipient = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
            import_certificate(store, OWNER, recipient, actor="test")
            set_dialect(store, "acme", DialectName.TRANSIT, actor="test")
            grant = Grant(tenant="acme", dialect=DialectName.TRANSIT, label="test")
            token = issue_credential(store, grant, actor="test").secret
        config = directory / "sealgate.toml"
        config.write_text(f"""
            [proxy]
            id = "proxy-1"
            state_dir = "{state}"
            reload_s = 0.1
            workers = {workers}
            worker_patience_s = {patience_s}
            [push]
            host = "127.0.0.1"
            port = {push_port}
            certificate_file = "{server[0]}"
            key_file = "{server[1]}"
            [engine]
            drain_s = 5
            [health]
            port = {health_port}
            [[encryption_service.listen]]
            host = "127.0.0.1"
            port = {port}
            plain = true
            dialects = ["transit"]
        """)
        return cls(directory, tenant, config, push_port, health_port, port, token, recipient)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def store(self) -> DirectoryStore:
        state = self.directory / "state"
        return DirectoryStore.open(f"sqlite:///{state}/directory.db", state, clock=SystemClock())

    def audit(self, worker: int | None = None) -> list[dict[str, object]]:
        name = "audit.jsonl" if worker is None else f"audit-worker-{worker}.jsonl"
        return [json.loads(line) for line in (self.directory / "state" / name).read_text().splitlines()]

    def calls(self, worker: int) -> int:
        """How many calls this worker has served."""
        return sum(event["action"] == "service-call" for event in self.audit(worker))

    # ---- the process

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        with (self.directory / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, str(self.config), stdout=log, stderr=log, cwd=REPOSITORY
            )
            self.process = process
            try:
                await self.ready()
                yield process
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(60):
                    await process.wait()

    def workers(self) -> list[int]:
        """Process ids of the children."""
        assert self.process is not None
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError):
            return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return []

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await self.health("/readyz"))[0] == 200:
                        return
                assert self.process is None or self.process.returncode is None, self.log
                await asyncio.sleep(0.05)

    async def health(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    # ---- the enterprise

    async def push(self, *, keys: bool = True) -> dict[str, object]:
        """One session and one envelope; without *keys* it is the revocation."""
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
                recipient=self.recipient,  # type: ignore[arg-type]
                signing_key=signing.key,
                signing_certificate=signing.certificate,
            )
            async with session.post("/push/v1/envelopes", json={"envelopes": [token]}) as answer:
                receipts = (await answer.json())["receipts"]
        receipt: dict[str, object] = receipts[0]
        return receipt

    async def instance(self) -> str:
        trust = client_context(
            self.directory / "server-ca.pem", self.directory / "agent.pem", self.directory / "agent.key"
        )
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session,
            session.get(f"https://localhost:{self.push_port}/push/v1/presence") as answer,
        ):
            return str((await answer.json())["instance"])

    # ---- callers

    async def call(self, operation: str, body: dict[str, str]) -> tuple[int, dict[str, object]]:
        """Over a connection of its own, so that any worker may get it."""
        url = f"http://127.0.0.1:{self.port}/v1/transit/{operation}/orders"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=body, headers={"X-Vault-Token": self.token}) as answer,
        ):
            document: dict[str, object] = await answer.json()
            return answer.status, document

    async def encrypt(self, plaintext: bytes = b"hello") -> tuple[int, str]:
        """The status, and the ciphertext or the errors."""
        status, document = await self.call("encrypt", {"plaintext": base64.b64encode(plaintext).decode()})
        data = document.get("data")
        return status, str(data["ciphertext"]) if isinstance(data, dict) else str(document["errors"])
