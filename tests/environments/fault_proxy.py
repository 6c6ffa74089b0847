"""The network between two environments, which can fail: a TCP relay that a test disturbs.

async with FaultProxy(port_of_the_server) as network:
    ... connect to network.port ...
    network.inject(Fault.BLACK_HOLE)     # bytes vanish, connections stay open
    network.latency_s = 0.05             # each piece comes that much later
    await network.reset_connections()    # RST on both sides
    network.inject(Fault.REFUSE)         # new connections are reset, those that are open too
    network.inject(Fault.HALF_OPEN)      # requests arrive, answers do not
    network.inject(Fault.NONE)
    network.lose_from(pid)               # a black hole for that process alone; None: for nobody
"""

import asyncio
import contextlib
import socket
import struct
from enum import StrEnum
from pathlib import Path
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
        self._lost_pid: int | None = None
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    def inject(self, fault: Fault) -> None:
        """Bytes lost under an earlier fault stay lost: a connection that lost some is reset."""
        if self._fault in (Fault.BLACK_HOLE, Fault.HALF_OPEN) or fault is Fault.REFUSE:
            self._abort_all()
        self._fault = fault

    def lose_from(self, pid: int | None) -> None:
        """Bytes of and to this process vanish; on connections that are open, too."""
        if pid is None and self._lost_pid is not None:
            self._abort_all()  # bytes are missing on some of them
        self._lost_pid = pid

    def _is_lost(self, client_port: int, *, is_answer: bool) -> bool:
        if self._fault is Fault.BLACK_HOLE or (is_answer and self._fault is Fault.HALF_OPEN):
            return True
        return self._lost_pid is not None and client_port in _ports_of(self._lost_pid)

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
        client_port = writer.get_extra_info("peername")[1]
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
                group.create_task(self._pump(reader, back, client_port, is_answer=False), name="relay:there")
                group.create_task(self._pump(there, writer, client_port, is_answer=True), name="relay:back")
        finally:
            self._open -= {writer, back}
            for one in (writer, back):
                one.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client_port: int,
        *,
        is_answer: bool,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if self._is_lost(client_port, is_answer=is_answer):
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


def _ports_of(pid: int) -> set[int]:
    """Local TCP ports that this process has open (its sockets' inodes, looked up in the kernel's table)."""
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
