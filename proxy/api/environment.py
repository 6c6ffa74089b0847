"""What a load balancer may know: whether this environment serves, by HTTP and by HAProxy's agent-check.

1. The words are HAProxy's, exactly: another word, a missing newline or a colon too many is ignored by it, and
   the server stays as it was.
2. Nothing is read but the request line; nothing that is answered is secret: states and positions.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from aiohttp import web

from proxy.environments import Environments

STATUS_PATH: Final = "/v1/env/status"
_WRITE_S: Final = 2.0


def status_routes(
    application: web.Application, environments: Environments, *, tenants: Callable[[], Iterable[str]]
) -> None:
    """Add STATUS_PATH: each tenant's word, and whether this proxy refuses it."""

    async def answer(_request: web.Request) -> web.Response:
        words = environments.words()
        told = {
            tenant: {
                "serves": not environments.refuses(tenant),
                **(msgspec.to_builtins(words[tenant]) if tenant in words else {"state": "untold"}),
            }
            for tenant in sorted(tenants())
        }
        serves = all(bool(one["serves"]) for one in told.values())
        body = {"environment": environments.name, "serves": serves, "tenants": told}
        return web.json_response(body, status=200 if serves else 503, headers={"Cache-Control": "no-store"})

    application.router.add_get(STATUS_PATH, answer)


async def answering_checks(line: Callable[[], str], *, host: str, port: int) -> asyncio.Server:
    """A server that answers each connection *line* at once, and closes. OSError if it cannot be bound."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_WRITE_S):
                writer.write(line().encode("ascii"))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, host, port)
