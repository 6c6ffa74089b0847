"""A recording origin: an HTTP/1 and HTTP/2 server on real sockets that keeps what it got, byte for byte.

It parses strictly and by itself, so that it sees a request as an origin would: where a body ends, whether it
ended at all, and what came after it. What it answers is scripted by `Reply`.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, override

import h2.config
import h2.connection
import h2.events
import h2.exceptions


class End(StrEnum):
    """How a message, as the origin sees it, came to its end."""

    OPEN = "open"
    COMPLETE = "complete"  # terminator, END_STREAM, or all of Content-Length
    CUT = "cut"  # connection closed or reset before that, or RST_STREAM


@dataclass(slots=True)
class Exchange:
    """One request as it arrived."""

    protocol: str
    method: str = ""
    path: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    end: End = End.OPEN
    framed: bool = True
    """False: an HTTP/1 request with a body-like method and neither Content-Length nor Transfer-Encoding."""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. *framing* is HTTP/1's: length, chunked, close (ends with the connection), none."""

    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    pieces: Sequence[bytes] = (b"stored",)
    framing: str = "length"
    trailers: Sequence[tuple[str, str]] = ()
    early: bool = False
    """Answer when the head is there, without waiting for the body."""
    cut_after: int | None = None
    """Reset connection or stream after that many pieces. After the last one: before the message's end."""
    cut_by_fin: bool = False
    """HTTP/1 only: cut by a FIN, and over TLS without close_notify, instead of by a reset."""
    stall_after: int | None = None
    """Send nothing more after that many pieces, and keep everything open."""
    close: bool = False
    raw: bytes | None = None
    """HTTP/1 only: exactly these bytes instead."""

    @property
    def is_cut(self) -> bool:
        """The answer is cut before its end. If that is a length, it ends with the last piece."""
        if self.cut_after is None:
            return False
        return self.cut_after < len(self.pieces) + (self.framing != "length")


class _GoneError(Exception):
    """The peer has left."""


class RecordingOrigin:
    """`async with RecordingOrigin(tls).listening() as origin:` then look at `exchanges` and `received`."""

    def __init__(self, tls: ssl.SSLContext | None = None, *, keep_bytes: bool = True) -> None:
        self._tls = tls
        self._keep_bytes = keep_bytes
        self.port = 0
        self.exchanges: list[Exchange] = []
        self.received = bytearray()  # all bytes of all connections, as they came out of TLS
        self.connections = 0
        self.open_connections = 0
        self.reply: Reply | Callable[[Exchange], Reply] = Reply()
        self.reads_first = False
        """HTTP/1: `reply` is asked when the body is here, so never for one that was cut."""
        self.read_delay_s = 0.0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, *, port: int = 0) -> AsyncIterator["RecordingOrigin"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            # asyncio leaves a connection open that was accepted in the turn in which its server closes.
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await asyncio.sleep(0)
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def saw(self, secret: bytes) -> bool:
        """True if *secret* arrived in clear, in a body or anywhere else."""
        return secret in self.received or any(secret in exchange.body for exchange in self.exchanges)

    async def until(self, condition: Callable[[], Any], *, within_s: float = 60.0) -> None:
        """Wait until *condition* holds; it is asked again after whatever happens here."""
        async with asyncio.timeout(within_s):
            while not condition():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.05)

    def _note(self, data: bytes) -> None:
        if self._keep_bytes:
            self.received += data
        self._changed.set()

    def _reply_to(self, exchange: Exchange) -> Reply:
        return self.reply(exchange) if callable(self.reply) else self.reply

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        tls = writer.get_extra_info("ssl_object")
        is_http2 = tls is not None and tls.selected_alpn_protocol() == "h2"
        connection = _Http2(self, reader, writer) if is_http2 else _Http1(self, reader, writer)
        try:
            await connection.run()
        except (_GoneError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            connection.lost()
            self._tasks.discard(task)
            self.open_connections -= 1
            self._changed.set()
            writer.close()


class _Connection:
    def __init__(
        self, origin: RecordingOrigin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.origin = origin
        self.reader = reader
        self.writer = writer
        self.exchanges: list[Exchange] = []

    async def run(self) -> None:
        raise NotImplementedError

    def begin(self, exchange: Exchange) -> Exchange:
        self.exchanges.append(exchange)
        self.origin.exchanges.append(exchange)
        return exchange

    def lost(self) -> None:
        for exchange in self.exchanges:
            if exchange.end is End.OPEN:
                exchange.end = End.CUT

    async def receive(self) -> bytes:
        if self.origin.read_delay_s:
            await asyncio.sleep(self.origin.read_delay_s)
        data = await self.reader.read(1 << 16)
        if not data:
            raise _GoneError
        self.origin._note(data)
        return data

    def keep(self, exchange: Exchange, data: bytes) -> None:
        if self.origin._keep_bytes:
            exchange.body += data
        self.origin._changed.set()

    async def cut(self, reply: Reply) -> None:
        await self.writer.drain()
        if reply.cut_by_fin:
            self.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            await self.stall()
        await asyncio.sleep(0.05)  # a reset overtakes what is under way
        self.reset()

    def reset(self) -> None:
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise _GoneError

    async def stall(self) -> None:
        while True:
            await self.receive()


class _Http1(_Connection):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.buffer = bytearray()

    @override
    async def run(self) -> None:
        while await self._exchange():
            pass

    async def _until(self, mark: bytes) -> bytes:
        while (at := self.buffer.find(mark)) < 0:
            self.buffer += await self.receive()
        taken = bytes(self.buffer[: at + len(mark)])
        del self.buffer[: at + len(mark)]
        return taken

    async def _exchange(self) -> bool:
        head = (await self._until(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        method, path, _ = start.split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        exchange = self.begin(Exchange("h1", method, path, headers))
        reply = None if self.origin.reads_first else self.origin._reply_to(exchange)
        if reply is not None and reply.early:
            await self._answer(exchange, reply)
        await self._read_body(exchange)
        exchange.end = End.COMPLETE
        self.origin._changed.set()
        if reply is None:
            reply = self.origin._reply_to(exchange)
        if not reply.early:
            await self._answer(exchange, reply)
        return not reply.close and reply.framing != "close"

    async def _read_body(self, exchange: Exchange) -> None:
        length = exchange.header("content-length")
        coding = exchange.header("transfer-encoding")
        if coding is not None:
            while size := int(await self._until(b"\r\n"), 16):
                await self._read(exchange, size)
                assert await self._until(b"\r\n") == b"\r\n"
            while (line := await self._until(b"\r\n")) != b"\r\n":
                name, _, value = line.decode("latin-1").partition(":")
                exchange.trailers.append((name, value.strip()))
        elif length is not None:
            await self._read(exchange, int(length))
        else:
            exchange.framed = exchange.method not in ("PUT", "POST", "PATCH")

    async def _read(self, exchange: Exchange, size: int) -> None:
        while size:
            if not self.buffer:
                self.buffer += await self.receive()
            piece = bytes(self.buffer[:size])
            del self.buffer[: len(piece)]
            self.keep(exchange, piece)
            size -= len(piece)

    async def _answer(self, exchange: Exchange, reply: Reply) -> None:
        if reply.raw is not None:
            self.writer.write(reply.raw)
            await self.writer.drain()
            return
        headers = list(reply.headers)
        if reply.framing == "length":
            headers.append(("Content-Length", str(sum(map(len, reply.pieces)))))
        elif reply.framing == "chunked":
            headers.append(("Transfer-Encoding", "chunked"))
        if reply.close or reply.framing == "close":
            headers.append(("Connection", "close"))
        lines = [
            f"HTTP/1.1 {reply.status} Scripted",
            *(f"{name}: {value}" for name, value in headers),
            "",
            "",
        ]
        self.writer.write("\r\n".join(lines).encode("latin-1"))
        if exchange.method != "HEAD":
            await self._answer_body(reply)
        await self.writer.drain()

    async def _answer_body(self, reply: Reply) -> None:
        for index, piece in enumerate(reply.pieces):
            if index == reply.cut_after:
                await self.cut(reply)
            if index == reply.stall_after:
                await self.stall()
            self.writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if reply.framing == "chunked" else piece)
            await self.writer.drain()
        if reply.is_cut:
            await self.cut(reply)
        if reply.framing == "chunked":
            trailers = "".join(f"{name}: {value}\r\n" for name, value in reply.trailers)
            self.writer.write(f"0\r\n{trailers}\r\n".encode())


class _Http2(_Connection):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.streams: dict[int, Exchange] = {}
        self.answers: set[asyncio.Task[None]] = set()
        self.windows = asyncio.Event()

    @override
    async def run(self) -> None:
        self.h2.initiate_connection()
        try:
            while True:
                await self.flush()
                for event in self.h2.receive_data(await self.receive()):
                    self._handle(event)
        except h2.exceptions.ProtocolError as error:
            raise _GoneError from error
        finally:
            for task in self.answers:
                task.cancel()

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.writer.write(data)
            await self.writer.drain()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                headers = [(_text(name), _text(value)) for name, value in event.headers]
                pseudo = dict(headers)
                exchange = Exchange("h2", pseudo[":method"], pseudo[":path"], headers)
                self.streams[event.stream_id] = self.begin(exchange)
                if self.origin._reply_to(exchange).early:
                    self._start_answer(event.stream_id, exchange)
            case h2.events.DataReceived():
                self.keep(self.streams[event.stream_id], event.data)
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                trailers = [(_text(name), _text(value)) for name, value in event.headers]
                self.streams[event.stream_id].trailers.extend(trailers)
            case h2.events.StreamEnded():
                exchange = self.streams[event.stream_id]
                exchange.end = End.COMPLETE
                if not self.origin._reply_to(exchange).early:
                    self._start_answer(event.stream_id, exchange)
            case h2.events.StreamReset():
                if event.stream_id in self.streams and self.streams[event.stream_id].end is End.OPEN:
                    self.streams[event.stream_id].end = End.CUT
            case h2.events.WindowUpdated():
                self.windows.set()
            case _:
                pass
        self.origin._changed.set()

    def _start_answer(self, stream_id: int, exchange: Exchange) -> None:
        task = asyncio.create_task(self._answer(stream_id, exchange), name="origin answer")
        self.answers.add(task)
        task.add_done_callback(self.answers.discard)

    async def _answer(self, stream_id: int, exchange: Exchange) -> None:
        reply = self.origin._reply_to(exchange)
        headers = [(":status", str(reply.status))]
        headers += [(name.lower(), value) for name, value in reply.headers]
        if reply.framing == "length":
            headers.append(("content-length", str(sum(map(len, reply.pieces)))))
        is_bodiless = exchange.method == "HEAD" or not (reply.pieces or reply.is_cut)
        with contextlib.suppress(h2.exceptions.ProtocolError, OSError):
            self.h2.send_headers(stream_id, headers, end_stream=is_bodiless and not reply.trailers)
            if not is_bodiless and not await self._answer_body(stream_id, reply):
                return
            if reply.trailers:
                self.h2.send_headers(stream_id, list(reply.trailers), end_stream=True)
            elif not is_bodiless:
                self.h2.end_stream(stream_id)
            await self.flush()

    async def _answer_body(self, stream_id: int, reply: Reply) -> bool:
        for index, piece in enumerate(reply.pieces):
            if index == reply.cut_after:
                self.h2.reset_stream(stream_id)
                await self.flush()
                return False
            if index == reply.stall_after:
                return False
            left = piece
            while left:
                room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
                if room <= 0:
                    self.windows.clear()
                    await self.windows.wait()
                    continue
                self.h2.send_data(stream_id, left[:room])
                left = left[room:]
                await self.flush()
        if reply.is_cut:
            self.h2.reset_stream(stream_id)
            await self.flush()
        return not reply.is_cut


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
