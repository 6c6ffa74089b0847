"""`python -m bench.receivers DIRECTORY`: many simulated proxies in one process, for bench/agent.py.

Each is a real push listener (TLS 1.3, client certificates) with the production receiver, key cache, picture
of its environment and audit log of its own; engine and directory database are left out. They share one TLS
context and one private key: files that a thousand machines would each have. On the one core that they have
together they take turns by request, or all of them would answer last. Prints the ports as JSON, then serves
until stdin ends.
"""

import asyncio
import gc
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog
import uvloop
from aiohttp import web
from cryptography import x509

from envelope.keys import NetworkService
from proxy.api.push import make_push_application
from proxy.environments import Environments, Word
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.model import CertificateFiles, Directory, LegacyPolicy, ServiceEntry, TenantEntry, Upstream
from runtime.audit import AuditLog
from runtime.clock import SystemClock
from runtime.observe import configure_logging
from runtime.serve import Handler, serving
from runtime.tls import ServerTls

TENANT: Final = "bench"
VALIDITY_S: Final = 3300
REQUESTS_PER_S: Final = 20.0
TURNS: Final = 8


def proxy_id(number: int) -> str:
    return f"p{number:05}"


async def _serve(directory: Path) -> None:
    root = x509.load_pem_x509_certificate((directory / "root.pem").read_bytes())
    nowhere = Path("/nonexistent")
    tenant = TenantEntry(
        tenant=TENANT,
        root_certificate=root,
        forward_listen=None,
        tunnel_hosts=frozenset(),
        interception_ca=CertificateFiles(certificate_file=nowhere, key_file=nowhere),
    )
    hosted: dict[int, list[ServiceEntry]] = {}
    for line in (directory / "services.jsonl").read_text().splitlines():
        service = json.loads(line)
        hosted.setdefault(service["proxy"], []).append(
            ServiceEntry(
                owner=NetworkService(TENANT, service["name"]),
                upstream=Upstream("https", f"{service['name']}.example", 443),
                profile="generic",
                legacy=LegacyPolicy.STRICT,
                reverse_listen=None,
                certificate=x509.load_pem_x509_certificate(service["pem"].encode()),
                key_file=directory / "service.key",
            )
        )
    tls = ServerTls(directory / "server.pem", directory / "server.key", client_roots=[root])
    clock = SystemClock()
    ports = []
    turns = asyncio.Semaphore(TURNS)

    @web.middleware
    async def in_turn(request: web.Request, handler: Handler) -> web.StreamResponse:
        async with turns:
            return await handler(request)

    async with AsyncExitStack() as stack:
        for number, services in sorted(hosted.items()):
            audit = AuditLog.open(directory / f"audit-{number:05}.jsonl", clock)
            stack.callback(audit.close)
            cache = KeyCache(clock)
            receiver = Receiver(
                proxy_id=proxy_id(number),
                cache=cache,
                audit=audit,
                clock=clock,
                validity_s=VALIDITY_S,
                directory=Directory.of(1, [tenant], services),
            )
            environments = Environments(on_refused=cache.withdraw_tenant)
            application = make_push_application(
                receiver,
                clock=clock,
                requests_per_s=REQUESTS_PER_S,
                entitled=environments.check_entitled,
                told=_told(environments, clock),
            )
            application.middlewares.append(in_turn)
            server = serving(application, host="127.0.0.1", port=0, ssl_context=tls.context, grace_s=0.1)
            ports.append(await stack.enter_async_context(server))
        # As a proxy does once it is warm: what lives now lives until the end.
        gc.collect()
        gc.freeze()
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)


def _told(environments: Environments, clock: SystemClock) -> Callable[[str, str, Word], Awaitable[Word]]:
    """A proxy's own picture of its environment, as proxy/app.py has it."""

    async def told(tenant: str, agent: str, word: Word) -> Word:
        return environments.take(tenant, word, agent=agent, now_boot_s=clock.boot_s())

    return told


def main() -> None:
    configure_logging(json=True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
