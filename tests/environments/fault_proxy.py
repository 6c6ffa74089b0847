"""The network between two environments, which can fail: a TCP relay that a test disturbs.

async with FaultProxy(port_of_the_server) as network:
    ... connect to network.port ...
    network.inject(Fault.BLACK_HOLE)     # bytes vanish, connections stay open
    network.latency_s = 0.05             # each piece comes that much later
    await network.reset_connections()    # RST on both sides
    network.inject(Fault.REFUSE)         # new connections are reset, those that are open too
    network.inject(Fault.HALF_OPEN)      # requests arrive, answers do not
    network.inject(Fault.NONE)
"""

import asyncio
import contextlib
import socket
import struct
from enum import StrEnum
from types import TracebackType
from typing import Self


class Fault(StrEnum):
    NONE = "none"
    BLACK_HOLE = "black-hole"
    """Nothing comes through, in either direction; nobody is told."""
    HALF_OPEN = "half-open"
    """What the client sends arrives, what the server answers is lost."""
    REFUSE = "refuse"
    """Connections are reset, new ones too."""


class FaultProxy:
    def __init__(self, target_port: int, *, port: int = 0, target_host: str = "127.0.0.1") -> None:
        self.target_port = target_port
        self._target_host = target_host
        self.port = port
        self.latency_s = 0.0
        self.connections = 0
        """How many were made so far."""
        self._fault = Fault.NONE
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    def inject(self, fault: Fault) -> None:
        """Bytes lost under an earlier fault stay lost: a connection that lost some is reset."""
        if self._fault in (Fault.BLACK_HOLE, Fault.HALF_OPEN) or fault is Fault.REFUSE:
            self._abort_all()
        self._fault = fault

    async def reset_connections(self) -> None:
        """RST on all that are open; returns when the relays have ended."""
        self._abort_all()
        while self._open:  # noqa: ASYNC110 - ends as soon as the loop has run the callbacks
            await asyncio.sleep(0)

    def _abort_all(self) -> None:
        for writer in self._open:
            _abort(writer)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            self._abort_all()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault is Fault.REFUSE:
            _abort(writer)
            return
        try:
            there, back = await asyncio.open_connection(self._target_host, self.target_port)
        except OSError:
            _abort(writer)
            return
        self.connections += 1
        self._open |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back, is_answer=False), name="relay:there")
                group.create_task(self._pump(there, writer, is_answer=True), name="relay:back")
        finally:
            self._open -= {writer, back}
            for one in (writer, back):
                one.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if self._fault is Fault.BLACK_HOLE or (is_answer and self._fault is Fault.HALF_OPEN):
                    continue
                writer.write(piece)
                await writer.drain()
        if not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    """RST rather than FIN: what a crashed machine or a firewall sends."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
