"""Whoever has the TLS identities of both ends stands between two processes, reads each request, passes it on.

    async with recorded(
        one.network, path="/v1/env/wraps", server=files, roots=[root], clients={"agent-a": files_of_a}
    ) as seen:
        ...
        [sent] = seen       # and play it again, by whoever

1. What is sent arrives unchanged, from the identity of whoever sent it, and so does what is answered: the
   processes on both sides are the real ones, and nothing they do differs.
2. Before and after the block all connections of that network are new: none goes past.
"""

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from aiohttp import web
from cryptography import x509

from envelope.certificates import read_identity
from runtime.tls import peer_certificate, server_context
from tests.environments.fault_proxy import FaultProxy

type Files = tuple[Path, Path]
"""Certificate and key."""
_HOPS: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})


@dataclass(frozen=True)
class Recorded:
    agent_id: str
    """Who has sent it."""
    method: str
    body: bytes


@asynccontextmanager
async def recorded(
    network: FaultProxy,
    *,
    path: str,
    server: Files,
    roots: Iterable[x509.Certificate],
    clients: Mapping[str, Files],
) -> AsyncIterator[list[Recorded]]:
    """Requests for *path* through *network* while the block runs, in the order in which they came.

    *server*: what the process behind it shows. *clients*: by agent id, what those who call it show.
    """
    seen: list[Recorded] = []
    port = network.target_port
    async with contextlib.AsyncExitStack() as stack:
        sessions = {
            agent_id: await stack.enter_async_context(_session(files)) for agent_id, files in clients.items()
        }

        async def pass_on(request: web.Request) -> web.Response:
            leaf = peer_certificate(request.transport)
            assert leaf is not None
            agent_id, body = read_identity(leaf).name, await request.read()
            if request.path == path:
                seen.append(Recorded(agent_id, request.method, body))
            headers = {name: text for name, text in request.headers.items() if name.lower() not in _HOPS}
            async with sessions[agent_id].request(
                request.method, f"https://127.0.0.1:{port}{request.path_qs}", data=body, headers=headers
            ) as answer:
                content = await answer.read()
                back = {name: text for name, text in answer.headers.items() if name.lower() not in _HOPS}
                return web.Response(status=answer.status, body=content, headers=back)

        application = web.Application(client_max_size=64 << 20)
        application.router.add_route("*", "/{path:.*}", pass_on)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(*server, client_roots=roots))
        await site.start()
        try:
            network.target_port = runner.addresses[0][1]
            await network.reset_connections()
            yield seen
        finally:
            network.target_port = port
            await network.reset_connections()


def _session(files: Files) -> aiohttp.ClientSession:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it stands there by its place
    context.load_cert_chain(*files)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context), timeout=aiohttp.ClientTimeout(total=90)
    )
