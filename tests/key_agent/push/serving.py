"""One fake proxy by HTTPS, and the real transport that speaks to it."""

import base64
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from envelope.keys import NetworkService
from key_agent.push.transport import HttpsTransport
from key_agent.registry.model import Proxy
from runtime.clock import SystemClock
from runtime.tls import server_context
from tests.fakes.proxies import FakeProxy, FakeProxyServer, pem
from tests.pki import Tenant, issue_server, make_server_ca, write_credential

AUTHORITY = make_server_ca()
S3 = NetworkService("acme", "s3")


@asynccontextmanager
async def served(
    tmp_path: Path,
    acme: Tenant,
    *,
    name: str = "localhost",
    change: Callable[[ssl.SSLContext], None] | None = None,
) -> AsyncIterator[tuple[FakeProxyServer, HttpsTransport, Proxy]]:
    files = write_credential(issue_server(AUTHORITY, [name]), tmp_path, "server")
    context = server_context(*files, client_roots=[acme.root.certificate])
    if change is not None:
        change(context)
    server = FakeProxyServer(
        FakeProxy(
            id="p1",
            clock=SystemClock(),
            signers={},
            services={S3: acme.service("s3")},
        )
    )
    tls = write_credential(acme.agent_tls("hq"), tmp_path, "tls")
    async with (
        server.serving(context),
        HttpsTransport(agent_id="hq", certificate_file=tls[0], key_file=tls[1]) as transport,
    ):
        yield server, transport, Proxy(id="p1", url=server.url, ca_pem=pem(AUTHORITY.certificate))


def session_answer(**changes: object) -> dict[str, object]:
    good = {
        "proxy": "p1",
        "challenge": base64.urlsafe_b64encode(bytes(16)).decode().rstrip("="),
        "time_ms": 1,
    }
    return good | changes


def presence_answer(**changes: object) -> dict[str, object]:
    good = {"proxy": "p1", "instance": session_answer()["challenge"], "time_ms": 1}
    return good | changes
