"""Each lever against mitmproxy's own way: the same bytes, events and errors, with it and without it."""

import asyncio
import contextlib
import gc
import itertools
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, override

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mitmproxy import http, options
from mitmproxy.addonmanager import Loader
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client, ConnectionState
from mitmproxy.proxy import commands, events, layer, mode_servers, server, tunnel
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import tls
from mitmproxy.proxy.layers.http import _base, _http1
from mitmproxy.proxy.layers.http._events import (
    HttpEvent,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
)
from mitmproxy.proxy.mode_specs import ProxyMode
from OpenSSL import SSL

from proxy.gate import levers
from proxy.gate.levers import Lever
from tests import pki

RECORD_BYTES = 16384
NONE: frozenset[Lever] = frozenset()


def context() -> Context:
    opts = options.Options()
    Proxyserver().load(Loader(SimpleNamespace(options=opts)))  # type: ignore[no-untyped-call]
    client = Client(
        peername=("192.0.2.1", 1),
        sockname=("192.0.2.2", 443),
        timestamp_start=0.0,
        state=ConnectionState.OPEN,
        proxy_mode=ProxyMode.parse("regular"),
    )
    return Context(client, opts)


# --- TLS ----------------------------------------------------------------------------------------------------


class Recorder(layer.Layer):
    """The child of the TLS layer: keeps what reaches it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.seen: list[events.Event] = []

    @override
    def _handle_event(self, event: events.Event) -> Generator[commands.Command, Any, None]:
        self.seen.append(event)
        yield from ()

    @property
    def received(self) -> bytes:
        return b"".join(event.data for event in self.seen if isinstance(event, events.DataReceived))


class TlsPair:
    """mitmproxy's TLS layer after a handshake, and a peer of another implementation: Python's ssl."""

    def __init__(self, directory: Path, *, layer_is_server: bool, version: ssl.TLSVersion) -> None:
        ca = pki.make_server_ca()
        certificate, key = pki.write_credential(pki.issue_server(ca), directory, "server")
        ca_file = pki.write_certificate(ca.certificate, directory / "ca.pem")
        self.layer = tls.TLSLayer(ctx := context(), ctx.client)
        self.child = self.layer.child_layer = Recorder(ctx)
        self.logs: list[str] = []
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        if layer_is_server:
            ours = SSL.Context(SSL.TLS_SERVER_METHOD)
            ours.use_certificate_chain_file(str(certificate))
            ours.use_privatekey_file(str(key))
            self.layer.tls = SSL.Connection(ours)
            self.layer.tls.set_accept_state()
            theirs = ssl.create_default_context(cafile=ca_file)
        else:
            ours = SSL.Context(SSL.TLS_CLIENT_METHOD)
            self.layer.tls = SSL.Connection(ours)
            self.layer.tls.set_connect_state()
            theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            theirs.load_cert_chain(certificate, key)
        theirs.minimum_version = theirs.maximum_version = version
        self.peer = theirs.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=not layer_is_server,
            server_hostname="localhost" if layer_is_server else None,
        )
        self._shake_hands()

    def _shake_hands(self) -> None:
        done = False
        self.layer.tunnel_state = tunnel.TunnelState.ESTABLISHING
        for _ in range(10):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.peer.do_handshake()
            if done:
                self.layer.tunnel_state = tunnel.TunnelState.OPEN
                return
            generator = self.layer.receive_handshake_data(self._outgoing.read())
            try:
                command = next(generator)
                while True:
                    if isinstance(command, commands.SendData):
                        self._incoming.write(command.data)
                    command = next(generator)
            except StopIteration as stop:
                done, error = stop.value
                assert error is None
        pytest.fail("no handshake")

    def deliver(self, data: bytes) -> None:
        """Let the layer receive *data*, and the peer what it answers."""
        for command in self.layer.receive_data(data):
            self._obey(command)

    def send(self, data: bytes | bytearray) -> None:
        for command in self.layer.send_data(cast("bytes", data)):
            self._obey(command)

    def _obey(self, command: commands.Command) -> None:
        match command:
            case commands.SendData(data=data):
                self._incoming.write(data)
            case commands.Log(message=message):
                self.logs.append(message)
            case _:
                pytest.fail(f"unexpected command {command!r}")

    def from_peer(self) -> bytes:
        return self._outgoing.read()

    def peer_reads(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            got += self.peer.read(size - len(got))
        return got


@pytest.fixture(params=["stock", "lever"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    enabled = levers.ALL if request.param == "lever" else NONE
    with levers.install(enabled):
        yield request.param


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    chosen: ssl.TLSVersion = request.param
    return chosen


@pytest.mark.parametrize("layer_is_server", [True, False])
@pytest.mark.parametrize(
    "size", [1, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 300_000, 1 << 20, (1 << 21) + 7]
)
def test_tls_carries_bytes_both_ways(
    size: int, layer_is_server: bool, way: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    pair = TlsPair(tmp_path, layer_is_server=layer_is_server, version=version)
    body = os.urandom(size)
    pair.peer.write(body)
    flight = pair.from_peer()
    # Whole, and cut where no record ends.
    cut = len(flight) // 3
    pair.deliver(flight[:cut])
    pair.deliver(flight[cut:])
    assert pair.child.received == body
    assert all(
        type(event.data) is bytes for event in pair.child.seen if isinstance(event, events.DataReceived)
    )
    pair.send(bytearray(body))
    assert pair.peer_reads(size) == body
    assert pair.logs == []


def test_tls_a_byte_at_a_time(way: str, version: ssl.TLSVersion, tmp_path: Path) -> None:
    pair = TlsPair(tmp_path, layer_is_server=True, version=version)
    pair.peer.write(b"hello")
    for byte in pair.from_peer():
        pair.deliver(bytes([byte]))
    assert pair.child.received == b"hello"
    assert len(pair.child.seen) == 1  # No empty events for half a record.


def test_close_notify_comes_after_the_data_before_it(
    way: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    pair = TlsPair(tmp_path, layer_is_server=True, version=version)
    pair.peer.write(b"last words")
    with contextlib.suppress(ssl.SSLError):
        pair.peer.unwrap()
    pair.deliver(pair.from_peer())
    assert [type(event) for event in pair.child.seen] == [events.DataReceived, events.ConnectionClosed]
    assert pair.child.received == b"last words"
    assert not pair.layer.conn.state & ConnectionState.CAN_READ
    # The TCP close that follows is no second close for the child.
    assert list(pair.layer.receive_close()) == []
    assert len(pair.child.seen) == 2


def test_a_damaged_record_is_logged_and_nothing_of_it_is_delivered(
    way: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    pair = TlsPair(tmp_path, layer_is_server=True, version=version)
    pair.peer.write(b"good")
    good = pair.from_peer()
    pair.peer.write(b"evil")
    bad = bytearray(pair.from_peer())
    bad[-1] ^= 1
    pair.deliver(good + bytes(bad))
    assert pair.child.received == b"good"
    assert len(pair.logs) == 1
    assert "TLS Error" in pair.logs[0]
    # The peer is told by an alert.
    with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac"):
        pair.peer.read(1)


def test_an_alert_is_logged(way: str, version: ssl.TLSVersion, tmp_path: Path) -> None:
    pair = TlsPair(tmp_path, layer_is_server=True, version=version)
    # Python's ssl sends an alert when a record does not verify.
    pair.send(b"x" * 100)
    damaged = bytearray(pair._incoming.read())
    damaged[-1] ^= 1
    pair._incoming.write(damaged)
    with pytest.raises(ssl.SSLError):
        pair.peer.read(1)
    pair.deliver(pair.from_peer())
    assert len(pair.logs) == 1
    assert "alert bad record mac" in pair.logs[0]
    assert pair.child.seen == []


def test_post_handshake_messages_are_no_data(way: str, tmp_path: Path) -> None:
    """A TLS 1.3 server sends its session tickets after the handshake: nothing for the child, no error."""
    pair = TlsPair(tmp_path, layer_is_server=False, version=ssl.TLSVersion.TLSv1_3)
    tickets = pair.from_peer()
    assert tickets
    pair.deliver(tickets)
    assert pair.child.seen == []
    assert pair.logs == []
    assert pair.layer.tls.get_session() is not None
    pair.peer.write(b"after them")
    pair.deliver(pair.from_peer())
    assert pair.child.received == b"after them"


# --- HTTP/1 bodies ------------------------------------------------------------------------------------------


def drive(pieces: list[bytes]) -> list[tuple[str, bytes]]:
    """What an HTTP/1 server connection makes of *pieces*: kinds of events, data of neighbours joined.

    Each request is answered when it has ended, so that the next one is read.
    """
    connection = _http1.Http1Server(context())
    told: list[tuple[str, bytes]] = []
    queue: list[events.Event] = [events.Start()]
    queue += [events.DataReceived(connection.conn, piece) for piece in pieces]

    def note(event: HttpEvent) -> None:
        match event:
            case RequestHeaders():
                told.append((event.request.path, b"end" if event.end_stream else b""))
            case RequestData() if told and told[-1][0] == "data":
                told[-1] = ("data", told[-1][1] + event.data)
            case RequestData():
                assert event.data
                told.append(("data", event.data))
            case RequestEndOfMessage():
                told.append(("end", b""))
            case RequestProtocolError():
                told.append(("error", event.message.encode()))
            case _:
                pytest.fail(f"unexpected {event!r}")

    def feed(event: events.Event) -> None:
        for command in connection.handle_event(event):
            match command:
                case _base.ReceiveHttp():
                    note(command.event)
                    if isinstance(command.event, RequestEndOfMessage):
                        answer = http.Response.make(204)
                        feed(ResponseHeaders(command.event.stream_id, answer, end_stream=True))
                        feed(ResponseEndOfMessage(command.event.stream_id))
                case commands.SendData():
                    pass
                case commands.CloseConnection():
                    told.append(("close", b""))

    for event in queue:
        feed(event)
    return told


REQUESTS = st.lists(
    st.one_of(
        st.integers(0, 70).map(
            lambda n: b"PUT /known HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % n + b"k" * n
        ),
        st.lists(st.integers(1, 30), max_size=3).map(
            lambda sizes: (
                b"PUT /chunked HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
                + b"".join(b"%x\r\n%s\r\n" % (n, b"c" * n) for n in sizes)
                + b"0\r\n\r\n"
            )
        ),
        st.just(b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n"),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=REQUESTS, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_pipelined_bodies_mean_the_same_with_the_lever(requests: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(requests)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]
    stock = drive(pieces)
    with levers.install(frozenset({Lever.HTTP1_BODY})):
        pulled = drive(pieces)
    assert pulled == stock
    assert sum(kind == "end" for kind, _ in stock) == stream.count(b" HTTP/1.1")


@pytest.mark.parametrize("step", [1, 7, 63, 64, 65, 1000])
def test_a_known_length_ends_exactly_there(step: int, way: str) -> None:
    stream = b"PUT /a HTTP/1.1\r\nContent-Length: 64\r\n\r\n" + b"A" * 64 + b"GET /b HTTP/1.1\r\n\r\n"
    pieces = [stream[i : i + step] for i in range(0, len(stream), step)]
    assert drive(pieces) == [("/a", b""), ("data", b"A" * 64), ("end", b""), ("/b", b"end"), ("end", b"")]


def test_a_body_that_ends_early_is_an_error_with_the_lever_too(way: str) -> None:
    connection = _http1.Http1Server(context())
    head = b"PUT /a HTTP/1.1\r\nContent-Length: 64\r\n\r\n"
    told: list[HttpEvent] = []
    for event in (
        events.Start(),
        events.DataReceived(connection.conn, head),
        events.DataReceived(connection.conn, b"A" * 63),
        events.ConnectionClosed(connection.conn),
    ):
        told += [c.event for c in connection.handle_event(event) if isinstance(c, _base.ReceiveHttp)]
    assert [type(event) for event in told] == [RequestHeaders, RequestData, RequestProtocolError]
    assert isinstance(told[2], RequestProtocolError)
    assert "received 63 bytes, expected 64" in told[2].message


def test_a_response_body_passes_in_the_pieces_it_came_in() -> None:
    """Were the fast path not taken, this would be the joined or re-sliced buffer of h11, in a new object."""
    connection = _http1.Http1Client(context())
    piece = os.urandom(1000)
    request = http.Request.make("GET", "http://h/")
    got: list[bytes] = []
    with levers.install(frozenset({Lever.HTTP1_BODY})):
        for event in (
            events.Start(),
            RequestHeaders(1, request, end_stream=True),
            RequestEndOfMessage(1),
            events.DataReceived(connection.conn, b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n"),
            events.DataReceived(connection.conn, piece),
            events.DataReceived(connection.conn, piece),
            events.DataReceived(connection.conn, piece),
        ):
            received = [c.event for c in connection.handle_event(event) if isinstance(c, _base.ReceiveHttp)]
            got += [each.data for each in received if isinstance(each, ResponseData)]
    assert got == [piece] * 3
    assert got[0] is piece
    assert got[1] is piece
    assert got[2] is not piece  # The last one takes mitmproxy's own way.


# --- reading ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    if request.param == "asyncio":
        return asyncio.run
    return uvloop.run


def start_server(*args: Any) -> Any:
    """What `AsyncioServerInstance.listen` calls."""
    return vars(mode_servers)["asyncio"].start_server(*args)


def open_connection(*args: Any) -> Any:
    """What `ConnectionHandler.open_connection` calls."""
    return vars(server)["asyncio"].open_connection(*args, local_addr=None)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[
    tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamReader, asyncio.StreamWriter]
]:
    """A client's reader and writer, and a server's, made by what mitmproxy calls `asyncio`."""
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result((reader, writer))

    listener = await start_server(accept, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    reader, writer = await open_connection(host, port)
    served_reader, served_writer = await accepted
    try:
        yield reader, writer, served_reader, served_writer
    finally:
        for each in (writer, served_writer):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()
        listener.close()


def test_bytes_arrive_in_order_and_then_the_end(run: Callable[[Any], Any], way: str) -> None:
    body = os.urandom(5_000_000)

    async def main() -> None:
        async with connected() as (_, writer, reader, _served):

            async def write() -> None:
                for start in range(0, len(body), 77_777):
                    writer.write(body[start : start + 77_777])
                    await writer.drain()
                writer.write_eof()

            sending = asyncio.create_task(write())
            got = bytearray()
            while piece := await reader.read(65535):
                assert type(piece) is bytes
                got += piece
            await sending
            assert got == body
            assert await reader.read(65535) == b""
            assert reader.at_eof()

    run(main())


def test_a_reader_that_does_not_read_stops_its_peer(run: Callable[[Any], Any], way: str) -> None:
    """The transport is paused at the limit; what the peer can still write fits into socket buffers."""

    async def main() -> None:
        async with connected() as (_, writer, reader, _served):
            total = 0
            writer.transport.set_write_buffer_limits(high=1)
            with contextlib.suppress(TimeoutError):
                while True:
                    writer.write(b"x" * 262_144)
                    total += 262_144
                    await asyncio.wait_for(writer.drain(), 0.3)
            # Limits, socket buffers of both sides (up to 4 + 6 MiB by the kernel's defaults), and a piece.
            assert total < 16 << 20
            writer.transport.set_write_buffer_limits()
            got = 0
            while got < total:
                got += len(await asyncio.wait_for(reader.read(65535), 5))
            assert got == total

    run(main())


def test_many_tiny_pieces_pause_too() -> None:
    class Transport(asyncio.ReadTransport):
        is_paused = False

        @override
        def pause_reading(self) -> None:
            self.is_paused = True

        @override
        def resume_reading(self) -> None:
            self.is_paused = False

    async def main() -> None:
        reader = levers.PieceReader(1 << 20)
        reader.set_transport(transport := Transport())
        for _ in range(levers.MAX_PIECES):
            assert not transport.is_paused
            reader.feed_data(b"ab")
        assert transport.is_paused
        assert await reader.read(1) == b"ab" * levers.MAX_PIECES
        assert not transport.is_paused

    asyncio.run(main())


def test_a_failure_reaches_the_reader_that_waits_and_the_next() -> None:
    async def main() -> None:
        reader = levers.PieceReader(1000)
        waiting = asyncio.create_task(reader.read(1))
        await asyncio.sleep(0)
        reader.set_exception(ConnectionResetError())
        for read in (waiting, reader.read(1)):
            with pytest.raises(ConnectionResetError):
                await read
        assert isinstance(reader.exception(), ConnectionResetError)

    asyncio.run(main())


def test_a_cancelled_read_loses_nothing_and_two_readers_are_refused() -> None:
    async def main() -> None:
        reader = levers.PieceReader(1000)
        first = asyncio.create_task(reader.read(1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await reader.read(1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        reader.feed_data(b"kept")
        assert await reader.read(1) == b"kept"
        for refused in (reader.readexactly(1), reader.readuntil()):
            with pytest.raises(NotImplementedError):
                await refused

    asyncio.run(main())


def test_two_processes_may_share_a_port_and_by_default_may_not() -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def open_twice() -> None:
        async with await start_server(accept, "127.0.0.1", 0) as first:
            port = first.sockets[0].getsockname()[1]
            async with await start_server(accept, "127.0.0.1", port):
                pass

    with levers.install(NONE), pytest.raises(OSError, match="address already in use"):
        asyncio.run(open_twice())
    with levers.install(NONE, reuse_port=True):
        asyncio.run(open_twice())


def test_a_service_that_does_not_answer_is_given_up() -> None:
    """A listener whose queue is full lets a connection hang, as a black hole in the network does."""

    async def connect(port: int) -> None:
        streams = levers._Streams(limit_bytes=None, reuse_port=False, backlog=1, connect_timeout_s=0.2)
        with pytest.raises(TimeoutError):
            await streams.open_connection("127.0.0.1", port)

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        asyncio.run(connect(listener.getsockname()[1]))
    assert issubclass(TimeoutError, OSError)  # what mitmproxy expects of a connection that fails


# --- headers ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([b"Host", b"host", b"HOST", b"X-\xc4", b"x-\xe4", b"Cookie", b"", b"content-length"])
FIELDS = st.lists(st.tuples(NAMES, st.binary(max_size=3)), max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    fields=FIELDS, changes=st.lists(st.tuples(NAMES, st.sampled_from(["set", "delete", "add"])), max_size=4)
)
def test_headers_look_up_the_same(
    fields: list[tuple[bytes, bytes]], changes: list[tuple[bytes, str]]
) -> None:
    def look(headers: http.Headers) -> list[object]:
        seen: list[object] = []
        for name in (
            b"host",
            "HOST",
            "x-\xc4",
            b"x-\xe4",
            "x-\udce4",
            "cookie",
            "",
            "Content-Length",
            "none",
        ):
            missing = object()
            found = headers.get(name, missing)
            seen += [headers.get_all(name), name in headers, None if found is missing else found]
            try:
                seen.append(headers[name])
            except KeyError as error:
                seen.append(error.args)
        return seen

    def story() -> list[object]:
        headers = http.Headers(fields)
        told = look(headers)
        for name, change in changes:
            if change == "set":
                headers[name] = "v"
            elif change == "add":
                headers.add(name, "w")
            elif name in headers:
                del headers[name]
            told += [headers.fields, *look(headers), *look(headers.copy())]
        return told

    stock = story()
    with levers.install(frozenset({Lever.DIRECT_HEADERS})):
        assert story() == stock


# --- the rest -----------------------------------------------------------------------------------------------


def test_messages_are_not_checked_field_by_field_and_are_the_same_otherwise() -> None:
    def state() -> dict[str, Any]:
        request = http.Request.make("PUT", "https://host/path", b"body", http.Headers(a="b"))
        fields: dict[str, Any] = request.get_state()  # type: ignore[no-untyped-call]
        return {name: value for name, value in fields.items() if not name.startswith("timestamp")}

    wrong: list[Any] = [None] * 8
    stock = state()
    with pytest.raises(TypeError):
        http.ResponseData(*wrong)
    with levers.install(frozenset({Lever.TRUSTED_MESSAGES})):
        assert state() == stock
        http.ResponseData(*wrong)


def test_a_fork_of_a_context_shares_all_but_its_layers() -> None:
    client = Client(peername=("a", 1), sockname=("b", 2))
    with levers.install(frozenset({Lever.LEAN_CONTEXTS})):
        parent = Context(client, options.Options())
        below = layer.NextLayer(parent)
        fork = parent.fork()
        assert vars(fork).keys() == vars(Context(client, parent.options)).keys()
        assert (fork.client, fork.options, fork.server) == (client, parent.options, parent.server)
        assert fork.server is parent.server
        assert fork.layers == parent.layers
        fork.layers.append(below)
        assert below not in parent.layers


def test_options_are_what_they_were_and_cannot_be_changed_from_outside() -> None:
    opts = options.Options()
    Proxyserver().load(Loader(SimpleNamespace(options=opts)))  # type: ignore[no-untyped-call]
    opts.update(mode=["regular@1"], ssl_insecure=True)  # type: ignore[no-untyped-call]
    names = list(opts.keys())  # type: ignore[no-untyped-call]
    stock = {name: getattr(opts, name) for name in names}
    with levers.install(frozenset({Lever.LEAN_CONTEXTS})):
        assert {name: getattr(opts, name) for name in names} == stock
        opts.mode.append("regular@2")
        opts.allow_hosts.append("x")
        assert opts.mode == ["regular@1"]
        assert opts.allow_hosts == []


def test_warm_up_freezes_the_heap_only_if_asked() -> None:
    gc.unfreeze()
    levers.warmed_up(NONE)
    assert gc.get_freeze_count() == 0
    levers.warmed_up(levers.ALL)
    try:
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_what_is_installed_is_undone() -> None:
    watched = [
        (server, "asyncio"),
        (mode_servers, "asyncio"),
        (tls.TLSLayer, "receive_data"),
        (tls.TLSLayer, "tls_interact"),
        (_http1.Http1Connection, "_handle_event"),
        (http.MessageData, "__post_init__"),
        (http.Headers, "get"),
        (http.Headers, "get_all"),
        (http.Headers, "__contains__"),
        (http.Headers, "__getitem__"),
    ]
    before = [getattr(owner, name) for owner, name in watched]
    with levers.install(levers.ALL):
        during = [getattr(owner, name) for owner, name in watched]
    assert all(ours is not stock for ours, stock in zip(during, before, strict=True))
    assert [getattr(owner, name) for owner, name in watched] == before
