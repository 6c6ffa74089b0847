"""Sealgate as users run it: a directory, certificates of a tenant, an agent that pushes, the whole process.

The agent here is this process: it seals the same envelopes to the same endpoint, without an HSM behind it.
Audit log, key cache, planner and gate are the product's own.
"""

import contextlib
import http.client
import itertools
import json
import os
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.machine import PROXY_CORE, BenchError, Process, free_port, serving
from bench.nginx import Tls
from certs import pki
from certs.pki import Credential
from envelope.base64url import b64u_decode
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.material import Claims, Operation, seal_envelope
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Listen, Upstream
from proxy.tenants.network_service_store import add_service
from proxy.tenants.recipient_store import import_certificate
from proxy.tenants.tenant_store import add_tenant
from proxy.tenants.vault_store import add_credential
from proxy.vault.model import Secrets
from runtime.clock import SystemClock

OWNER: Final = NetworkService("bench", "files")
_AGENT: Final = "hq"
_PROXY: Final = "bench-proxy"
_VALIDITY_S: Final = 330
_REFRESH_S: Final = 120

_SETTINGS = """
[proxy]
id = "{proxy}"
state_dir = "{state}"
workers = {workers}
worker_patience_s = 5.0
[push]
host = "127.0.0.1"
port = {push_port}
certificate_file = "{certificate}"
key_file = "{key}"
[keys]
validity_s = {validity_s}
[engine]
http2 = {http2}
upstream_ca_file = "{ca}"
[health]
port = {health_port}
[log]
json = true
"""


@dataclass(slots=True)
class Agent:
    """Pushes the service's one key, again before it gets old."""

    port: int
    context: ssl.SSLContext
    signing: Credential
    recipient: Any
    key_id: KeyId
    secret: bytes
    _sequence: "itertools.count[int]"
    _pushed_at_s: float = 0.0

    def refresh(self) -> None:
        """Prove consent again if the last time is long enough ago. BenchError unless it was accepted."""
        if time.monotonic() - self._pushed_at_s < _REFRESH_S:
            return
        signer = pki.certificate_pem(self.signing.certificate).decode()
        session = self._post("/push/v1/session", {"agent": _AGENT, "signing_certificate": signer})
        now_s = int(time.time())
        key = KeyMaterial(
            owner=OWNER, key_id=self.key_id, state=KeyState.ACTIVE, secret=bytearray(self.secret)
        )
        claims = Claims(
            issuer=_AGENT,
            audience=_PROXY,
            owner=OWNER,
            issued_at_s=now_s,
            expires_at_s=now_s + _VALIDITY_S,
            sequence=next(self._sequence),
            token_id=os.urandom(16),
            nonce=b64u_decode(session["challenge"]),
            operation=Operation.SET,
            keys=(key,),
        )
        token = seal_envelope(
            claims,
            recipient=self.recipient,
            signing_key=self.signing.key,
            signing_certificate=self.signing.certificate,
        )
        (receipt,) = self._post("/push/v1/envelopes", {"envelopes": [token]})["receipts"]
        if receipt["status"] != "accepted":
            raise BenchError(f"the proxy refused the key: {receipt}")
        self._pushed_at_s = time.monotonic()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=10)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise BenchError(f"{path}: {response.status} {answer}")
        return answer


@dataclass(frozen=True, slots=True)
class Product:
    process: Process
    agent: Agent
    ca: Path
    """What its clients trust: the tenant's interception CA."""
    audit_file: Path


@contextlib.contextmanager
def sealgate(
    directory: Path,
    tls: Tls,
    origin_port: int,
    *,
    http2: bool = False,
    without: tuple[str, ...] = (),
    workers: int = 1,
    core: int | None = PROXY_CORE,
    profile: str = "generic",
    credential: tuple[str, str] | None = None,
) -> Iterator[Product]:
    """Provision a tenant with one service in front of the origin, start the proxy, push the key.

    *credential*: access key and secret for the service's vault.
    *without*: levers to leave out, which is all that differs from `sealgate run`.
    """
    directory.mkdir(mode=0o700)
    state = directory / "state"
    state.mkdir(mode=0o700)
    port, push_port, health_port = free_port(), free_port(), free_port()
    root = pki.make_root("bench")
    with DirectoryStore.open(f"sqlite:///{state}/directory.db", state, clock=SystemClock()) as store:
        tenant = add_tenant(store, "bench", root.certificate, actor="bench")
        csr = add_service(
            store,
            OWNER,
            Upstream("https", "localhost", origin_port),
            actor="bench",
            profile=profile,
            reverse_listen=Listen("127.0.0.1", port),
        )
        certificate = pki.sign_service_csr(root, csr)
        import_certificate(store, OWNER, certificate, actor="bench")
        if credential is not None:
            secrets = Secrets(client_secret=credential[1])
            add_credential(store, OWNER, credential[0], secrets, actor="bench")
        ca = tenant.interception_ca.certificate_file
    settings = directory / "sealgate.toml"
    settings.write_text(
        _SETTINGS.format(
            proxy=_PROXY,
            state=state,
            workers=workers,
            push_port=push_port,
            health_port=health_port,
            certificate=tls.certificate,
            key=tls.key,
            ca=tls.ca,
            validity_s=_VALIDITY_S,
            http2=str(http2).lower(),
        )
    )
    agent_tls = pki.write_credential(pki.issue_agent_tls(root, "bench", _AGENT), directory, "agent-tls")
    context = ssl.create_default_context(cafile=tls.ca)
    context.load_cert_chain(*agent_tls)
    agent = Agent(
        push_port,
        context,
        pki.issue_agent_signing(root, "bench", _AGENT),
        certificate,
        KeyId.random(),
        os.urandom(32),
        itertools.count(1),
    )
    argv = [sys.executable, "-m", "bench.product", str(settings), *without]
    with (
        (directory / "sealgate.log").open("wb") as log,
        serving(directory.name, argv, port=port, core=core, log=log) as process,
    ):
        agent.refresh()
        yield Product(process, agent, ca, state / "audit.jsonl")


def main() -> None:
    from proxy import app, config, gate  # noqa: PLC0415 - only in the process under test

    gate.ALL = gate.ALL - {gate.Lever(name) for name in sys.argv[2:]}  # type: ignore[misc]
    app.run_proxy(config.load(Path(sys.argv[1]), os.environ))


if __name__ == "__main__":
    main()
