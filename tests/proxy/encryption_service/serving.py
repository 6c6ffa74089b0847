"""Dialects behind the real server: `async with serving([dialect]) as base_url`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from proxy.encryption_service.dialects.dialect import Dialect
from proxy.encryption_service.http_server import ServiceServer
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings
from runtime.clock import SystemClock


@asynccontextmanager
async def serving(dialects: Sequence[Dialect]) -> AsyncIterator[str]:
    """Serve *dialects* over plain HTTP on the loopback interface."""
    listen = ListenSettings(
        host="127.0.0.1", port=0, plain=True, dialects=tuple(dialect.name for dialect in dialects)
    )
    server = ServiceServer(
        EncryptionServiceSettings(listen=(listen,)),
        {dialect.name: dialect for dialect in dialects},
        metrics=ServiceMetrics(),
        clock=SystemClock(),
    )
    async with server.serving() as (port,):
        yield f"http://127.0.0.1:{port}"
