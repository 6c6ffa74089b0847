"""A real engine on real sockets for the gate's tests: clients that speak HTTP/1 and HTTP/2 by the byte.

`Script` is the addon: its hooks are whatever functions it is given. `running` starts mitmproxy with it, in
this process and loop. Without the gate (`SEALGATE_TEST_STOCK=1`) the same cases run on mitmproxy's classes.
"""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, override

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from mitmproxy import master, options, tls
from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy.mode_specs import ProxyMode

from proxy import gate
from proxy.gate import CLEAR, Piece, Transform, permit
from proxy.refusals import Refusal
from tests.fakes.origin import Exchange, RecordingOrigin
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential

CANARY: Final = b"canary-91f3-plaintext"
IS_STOCK: Final = os.environ.get("SEALGATE_TEST_STOCK") == "1"
SOON_S: Final = 4.5
"""How long a client may wait to see that something went wrong: less than LINGER_S, which would hide it."""
TIDY_S: Final = 4.5
"""How long sockets and tasks of a flow may outlive it; likewise."""
_TASKS: Final = (
    "client handler",
    "client connection",
    "server connection",
    "timeout",
    "handle_hook",
    "wakeup",
)

type Protocols = tuple[str, str]
"""What the client speaks, and what the origin."""

ALL_PROTOCOLS: Final[tuple[Protocols, ...]] = (("h1", "h1"), ("h2", "h1"), ("h2", "h2"), ("h1", "h2"))


class Inverting(Transform):
    """Stands for a sealer: as long as its input plus *overhead*, and never the input."""

    def __init__(
        self,
        plain_bytes: int | None = None,
        *,
        fails_at: int | None = None,
        fails_at_end: bool = False,
        error: BaseException | None = None,
        overhead: int = 4,
        holds_head: bool = False,
    ) -> None:
        self.expected_out_bytes = None if plain_bytes is None else plain_bytes + overhead
        self.holds_head = holds_head
        self._fails_at = fails_at
        self._fails_at_end = fails_at_end
        self._error = error or RuntimeError("scripted failure")
        self._overhead = overhead
        self.fed = 0

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        self.fed += 1
        if self.fed == self._fails_at:
            raise self._error
        return [invert(piece)]

    @override
    def finish(self) -> list[Piece]:
        if self._fails_at_end:
            raise self._error
        return [b"END!"[: self._overhead]] if self._overhead else []


def invert(data: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


class Script:
    """An addon whose hooks are the keyword arguments; what is not given seals uploads, clears the rest."""

    def __init__(self, **hooks: Callable[[Any], Any] | None) -> None:
        hooks = {"requestheaders": seal(), "responseheaders": clear_response, **hooks}
        self.refused: list[tuple[HTTPFlow | None, Refusal, bool]] = []
        self.flows: list[HTTPFlow] = []
        self.tls_failures = 0
        for name, hook in hooks.items():
            if hook is not None:
                setattr(self, name, hook)

    @property
    def codes(self) -> list[str]:
        return [refusal.code for _, refusal, _ in self.refused]


def is_upload(flow: HTTPFlow) -> bool:
    return flow.request.method in ("PUT", "POST", "PATCH")


def seal(**options_of_transform: Any) -> Callable[[HTTPFlow], None]:
    """A `requestheaders` that seals uploads as a planner would: stream, permit, Content-Length."""

    def requestheaders(flow: HTTPFlow) -> None:
        if is_upload(flow):
            permit_upload(flow, **options_of_transform)
        else:
            permit(flow).request = CLEAR

    return requestheaders


def permit_upload(flow: HTTPFlow, **options_of_transform: Any) -> Inverting:
    length = flow.request.headers.get("content-length")
    transform = Inverting(None if length is None else int(length), **options_of_transform)
    if transform.expected_out_bytes is not None:
        flow.request.headers["content-length"] = str(transform.expected_out_bytes)
    flow.request.stream = permit(flow).request = transform
    return transform


def clear(flow: HTTPFlow) -> None:
    """A `requestheaders` that lets everything pass as it is."""
    permit(flow).request = CLEAR


def clear_response(flow: HTTPFlow) -> None:
    permit(flow).response = CLEAR


def open_response(**options_of_transform: Any) -> Callable[[HTTPFlow], None]:
    """A `responseheaders` that transforms every body."""

    def responseheaders(flow: HTTPFlow) -> None:
        assert flow.response is not None
        length = flow.response.headers.get("content-length")
        transform = Inverting(None if length is None else int(length), **options_of_transform)
        if transform.expected_out_bytes is not None:
            flow.response.headers["content-length"] = str(transform.expected_out_bytes)
        flow.response.stream = permit(flow).response = transform

    return responseheaders


# ---- certificates and the engine


@dataclass(frozen=True, slots=True)
class Pki:
    """One directory per test session: mitmproxy's CA towards clients, and a server for the origin."""

    directory: Path
    origin_ca: Path
    origin_certificate: Path
    origin_key: Path

    @classmethod
    def make(cls, directory: Path) -> "Pki":
        ca = make_server_ca()
        certificate, key = write_credential(issue_server(ca, ["localhost", "127.0.0.1"]), directory, "origin")
        (directory / "confdir").mkdir()
        return cls(directory, write_certificate(ca.certificate, directory / "ca.pem"), certificate, key)

    def origin_context(self, protocol: str = "h1") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.origin_certificate, self.origin_key)
        context.set_alpn_protocols(["h2"] if protocol == "h2" else ["http/1.1"])
        return context

    def client_context(self, protocol: str = "h1") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.directory / "confdir" / "mitmproxy-ca-cert.pem")
        context.set_alpn_protocols(["h2"] if protocol == "h2" else ["http/1.1"])
        return context


class _Tls(tlsconfig.TlsConfig):
    def __init__(self, upstream: str) -> None:
        self._upstream = upstream

    @override
    def tls_start_server(self, tls_start: tls.TlsData) -> None:
        tls_start.conn.alpn_offers = [b"h2"] if self._upstream == "h2" else [b"http/1.1"]
        super().tls_start_server(tls_start)


class _Master(master.Master):
    def __init__(self, settings: options.Options, *addons: Any) -> None:
        super().__init__(settings, with_termlog=False)
        self.addons.add(*addons)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Rig:
    """A running engine with one listener."""

    pki: Pki
    script: Script
    origin: RecordingOrigin
    proxyserver: proxyserver.Proxyserver
    master: master.Master
    port: int
    protocols: Protocols

    def client(self) -> "contextlib.AbstractAsyncContextManager[Http1Client | Http2Client]":
        return self.http2_client() if self.protocols[0] == "h2" else self.http1_client()

    @contextlib.asynccontextmanager
    async def http1_client(self, *, tls_to_proxy: bool = True) -> AsyncIterator["Http1Client"]:
        context = self.pki.client_context() if tls_to_proxy else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        client = Http1Client(reader, writer)
        try:
            yield client
        finally:
            client.leave()

    @contextlib.asynccontextmanager
    async def http2_client(self) -> AsyncIterator["Http2Client"]:
        context = self.pki.client_context("h2")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        client = Http2Client(reader, writer)
        pump = asyncio.create_task(client.pump(), name="test client")
        try:
            yield client
        finally:
            pump.cancel()
            client.leave()

    async def put(self, pieces: Iterable[bytes] = (CANARY,), **how: Any) -> "Answer":
        """One upload over a connection of its own."""
        async with self.client() as client:
            return await client.exchange("PUT", pieces=pieces, **how)

    async def get(self, **how: Any) -> "Answer":
        async with self.client() as client:
            return await client.exchange("GET", pieces=None, **how)

    async def tidy(self, *, within_s: float = TIDY_S) -> None:
        """Fail unless every socket and task of every flow goes away by itself, soon."""

        def left() -> list[str]:
            tasks = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(_TASKS)]
            sockets = ["origin"] * self.origin.open_connections
            return tasks + sockets + [f"handler {key}" for key in self.proxyserver.connections]

        try:
            async with asyncio.timeout(within_s):
                while left():  # noqa: ASYNC110 - nobody announces it
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"left after {within_s} s: {left()}") from None


@contextlib.asynccontextmanager
async def running(
    pki: Pki,
    script: Script,
    *,
    protocols: Protocols = ("h1", "h1"),
    mode: str | None = None,
    origin: RecordingOrigin | None = None,
    origin_tls: bool = True,
    more: Sequence[object] = (),
    **settings: Any,
) -> AsyncIterator[Rig]:
    """An origin and an engine in front of it: reverse mode, or *mode* (`regular`, say)."""
    async with contextlib.AsyncExitStack() as stack:
        if origin is None:
            context = pki.origin_context(protocols[1]) if origin_tls else None
            origin = await stack.enter_async_context(RecordingOrigin(context).listening())
        scheme = "https" if origin_tls else "http"
        spec = f"{mode or f'reverse:{scheme}://127.0.0.1:{origin.port}'}@127.0.0.1:0"
        ProxyMode.parse(spec).transport_protocol = "tcp"  # type: ignore[misc]
        given = options.Options(confdir=str(pki.directory / "confdir"))
        server = proxyserver.Proxyserver()  # type: ignore[no-untyped-call]
        engine = _Master(
            given, *more, core.Core(), server, next_layer.NextLayer(), _Tls(protocols[1]), script
        )
        gate.on_refused(engine, lambda *refused: script.refused.append(refused))
        given.update(  # type: ignore[no-untyped-call]
            mode=[spec],
            ssl_verify_upstream_trusted_ca=str(pki.origin_ca),
            **{
                "connection_strategy": "lazy",
                "rawtcp": IS_STOCK,
                "websocket": IS_STOCK,
                "http3": False,
                "keep_host_header": True,
                "upstream_cert": False,
                **settings,
            },
        )
        assert await server.setup_servers(), [instance.last_exception for instance in server.servers]
        await engine.running()
        try:
            port = server.listen_addrs()[0][1]
            yield Rig(pki, script, origin, server, engine, port, protocols)
        finally:
            await server.servers.update([])
            gate.abort_all_connections(server)
            for handler in list(server.connections.values()):  # without the gate
                for io in handler.transports.values():
                    if io.handler is not None:
                        io.handler.cancel()
            async with asyncio.timeout(30):
                while server.connections:  # noqa: ASYNC110 - nobody announces it
                    await asyncio.sleep(0.005)
            await engine.done()


# ---- clients


@dataclass(slots=True)
class Answer:
    """What a client has seen of a response."""

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    interim: list[int] = field(default_factory=list)
    complete: bool = False
    """The message ended properly."""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def code(self) -> str | None:
        """Our refusal's code, where it is one: status, header and JSON body."""
        return self.header("sealgate-error")

    @property
    def is_success(self) -> bool:
        return self.complete and self.status is not None and 200 <= self.status < 300


class Http1Client:
    """One connection. `exchange` sends while it listens, as real clients do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.is_closed = False
        self.statuses: list[int] = []  # of every head that has come, in mid-upload too
        self.left_over = b""

    def leave(self) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> bool:
        """False if the proxy takes no more."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError:
            return False
        return not self.is_closed

    async def exchange(
        self,
        method: str = "PUT",
        path: str = "/object",
        *,
        pieces: Iterable[bytes] | None = (CANARY,),
        length: bool = True,
        headers: Iterable[tuple[str, str]] = (),
        trailers: Iterable[tuple[str, str]] = (),
        before: Callable[[int], Awaitable[None]] | None = None,
        within_s: float = 10.0,
    ) -> Answer:
        """*pieces* None: no body. *length* False: chunked. *before* runs before each piece."""
        listed = None if pieces is None else list(pieces)
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{n}: {v}" for n, v in headers)]
        if listed is not None:
            lines.append(
                f"Content-Length: {sum(map(len, listed))}" if length else "Transfer-Encoding: chunked"
            )
        async with asyncio.timeout(within_s), asyncio.TaskGroup() as group:
            answer = group.create_task(self.answer(method), name="answer")
            await self.send("\r\n".join([*lines, "", ""]).encode())
            sending = group.create_task(self._send_body(listed or [], length, trailers, before), name="body")
            await answer
            if not sending.done() and before is None:
                sending.cancel()
        return answer.result()

    async def _send_body(
        self,
        pieces: list[bytes],
        length: bool,
        trailers: Iterable[tuple[str, str]],
        before: Callable[[int], Awaitable[None]] | None,
    ) -> None:
        for index, piece in enumerate(pieces):
            if before is not None:
                await before(index)
            if not await self.send(piece if length else b"%x\r\n%s\r\n" % (len(piece), piece)):
                return
        if not length:
            await self.send(f"0\r\n{''.join(f'{n}: {v}\r\n' for n, v in trailers)}\r\n".encode())

    async def answer(self, method: str = "PUT") -> Answer:
        """The next response; as far as it goes if the connection ends before it does."""
        answer = Answer()
        with contextlib.suppress(EOFError, OSError, ssl.SSLError):
            while True:
                head = (await self._until(b"\r\n\r\n")).decode("latin-1")
                start, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
                status = int(start.split(" ")[1])
                if status >= 200 or status == 101:
                    break
                answer.interim.append(status)
            self.statuses.append(status)
            answer.status = status
            answer.headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines)]
            if method != "HEAD" and status not in (204, 304):
                await self._read_body(answer)
            answer.complete = True
        return answer

    async def _read_body(self, answer: Answer) -> None:
        coding, length = answer.header("transfer-encoding"), answer.header("content-length")
        if coding == "chunked":
            while size := int(await self._until(b"\r\n"), 16):
                await self._read(answer, size)
                await self._until(b"\r\n")
            await self._until(b"\r\n")
        elif length is not None:
            await self._read(answer, int(length))
        else:
            try:
                while True:
                    await self._read(answer, 1)
            except EOFError:
                return  # The end of such a body is the end of the connection; a reset raises OSError.

    async def _read(self, answer: Answer, size: int) -> None:
        while size:
            if not self.buffer:
                await self._fill()
            piece = self.buffer[:size]
            del self.buffer[: len(piece)]
            answer.body += piece
            size -= len(piece)

    async def _until(self, mark: bytes) -> bytes:
        while (at := self.buffer.find(mark)) < 0:
            await self._fill()
        taken = bytes(self.buffer[: at + len(mark)])
        del self.buffer[: at + len(mark)]
        return taken

    async def _fill(self) -> None:
        try:
            data = await self.reader.read(1 << 16)
        except OSError:
            self.is_closed = True
            raise
        if not data:
            self.is_closed = True
            raise EOFError
        self.buffer += data

    async def closed(self, *, within_s: float = SOON_S) -> bool:
        """True if the proxy ends the connection in time; what still comes is in `left_over`."""
        with contextlib.suppress(OSError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(within_s):
                while data := await self.reader.read(1 << 16):
                    self.left_over += data
            return True
        return self.reader.at_eof() or self.reader.exception() is not None


class Http2Client:
    """One connection; streams are named by their ids. Grants credit as bytes come if `grants` is True."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.reset_codes: dict[int, int] = {}
        self.grants = True
        self.is_closed = False
        self._changed = asyncio.Event()

    def leave(self) -> None:
        self.writer.transport.abort()

    async def pump(self) -> None:
        try:
            await self._flush()
            while data := await self.reader.read(1 << 16):
                for event in self.h2.receive_data(data):
                    self._handle(event)
                await self._flush()
                self._changed.set()
        except (OSError, ssl.SSLError, h2.exceptions.ProtocolError):
            pass
        finally:
            self.is_closed = True
            self._changed.set()

    async def _flush(self) -> None:
        if data := self.h2.data_to_send():
            self.writer.write(data)
            await self.writer.drain()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                headers = [(_text(name), _text(value)) for name, value in event.headers]
                answer = self.answers[event.stream_id]
                answer.status, answer.headers = int(dict(headers)[":status"]), headers
            case h2.events.InformationalResponseReceived():
                status = {_text(name): _text(value) for name, value in event.headers}[":status"]
                self.answers[event.stream_id].interim.append(int(status))
            case h2.events.DataReceived():
                self.answers[event.stream_id].body += event.data
                if self.grants:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                pairs = [(_text(name), _text(value)) for name, value in event.headers]
                self.answers[event.stream_id].trailers.extend(pairs)
            case h2.events.StreamEnded():
                self.answers[event.stream_id].complete = True
            case h2.events.StreamReset():
                self.reset_codes[event.stream_id] = event.error_code
            case _:
                pass

    def is_over(self, stream_id: int) -> bool:
        return self.is_closed or stream_id in self.reset_codes or self.answers[stream_id].complete

    async def until(self, condition: Callable[[], Any], *, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def start(
        self, method: str, path: str, headers: Iterable[tuple[str, str]], *, end: bool = False
    ) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.answers[stream_id] = Answer()
        pseudo = [(":method", method), (":scheme", "https"), (":authority", "127.0.0.1"), (":path", path)]
        self.h2.send_headers(stream_id, [*pseudo, *headers], end_stream=end)
        await self._flush()
        return stream_id

    async def send(self, stream_id: int, data: bytes) -> bool:
        """False if the proxy takes no more of this stream."""
        try:
            while data:
                if self.is_over(stream_id):
                    return False
                room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
                if room <= 0:
                    self._changed.clear()
                    await self._changed.wait()
                else:
                    self.h2.send_data(stream_id, data[:room])
                    data = data[room:]
                await self._flush()
        except (h2.exceptions.ProtocolError, OSError):
            return False
        return True

    async def end(self, stream_id: int, trailers: Iterable[tuple[str, str]] = ()) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, OSError):
            if listed := list(trailers):
                self.h2.send_headers(stream_id, listed, end_stream=True)
            else:
                self.h2.end_stream(stream_id)
            await self._flush()

    async def exchange(
        self,
        method: str = "PUT",
        path: str = "/object",
        *,
        pieces: Iterable[bytes] | None = (CANARY,),
        length: bool = True,
        headers: Iterable[tuple[str, str]] = (),
        trailers: Iterable[tuple[str, str]] = (),
        before: Callable[[int], Awaitable[None]] | None = None,
        within_s: float = 10.0,
    ) -> Answer:
        """As `Http1Client.exchange`; *length* False: no content-length."""
        listed = None if pieces is None else list(pieces)
        given = [(name.lower(), value) for name, value in headers]
        if listed is not None and length:
            given.append(("content-length", str(sum(map(len, listed)))))
        async with asyncio.timeout(within_s):
            stream_id = await self.start(method, path, given, end=listed is None)
            if listed is not None:
                await self._send_body(stream_id, listed, trailers, before)
            await self.until(lambda: self.is_over(stream_id))
        return self.answers[stream_id]

    async def _send_body(
        self,
        stream_id: int,
        pieces: list[bytes],
        trailers: Iterable[tuple[str, str]],
        before: Callable[[int], Awaitable[None]] | None,
    ) -> None:
        for index, piece in enumerate(pieces):
            if before is not None:
                await before(index)
            if not await self.send(stream_id, piece):
                return
        await self.end(stream_id, trailers)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def last(origin: RecordingOrigin) -> Exchange:
    return origin.exchanges[-1]
