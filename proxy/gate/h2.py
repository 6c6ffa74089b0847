"""HTTP/2 with back-pressure: credit goes back to a sender only as fast as the other side takes its bytes.

mitmproxy 12.2.3 grants windows of 2^31-1, acknowledges DATA as it arrives and parks what the receiver will
not take in an unbounded buffer: a 1 GB download to a slow client costs 1.2 GB of memory, an upload during a
slow hook 4.4 GB. HTTP/1 needs none of this, TCP holds it back. The rules here:

1. A stream may have at most STREAM_WINDOW_BYTES under way. Its credit is returned in halves, and only while
   its destination has less than HIGH_WATER_BYTES parked for it and no hook or connect of it is in progress.
2. The connection's credit is returned though streams are stalled: one of them must not stop its siblings. Not
   without end: once WAITING_BYTES wait for hooks, connects and destinations, bodies that have ended included,
   the connection stands still until some of them move. So a connection parks WAITING_BYTES +
   CONNECTION_WINDOW_BYTES at most, and HIGH_WATER_BYTES for each stream whose destination speaks HTTP/2.
3. A source that speaks HTTP/1 has no credit to withhold. If its destination speaks HTTP/2 and is full, its
   read loop waits (`BackpressureHandler`), so TCP holds the source back.
4. What was withheld is returned when the destination moves: after each event of the HTTP layer, never by a
   timer.
5. An upstream connection that has closed is forgotten as soon as no stream refers to it. mitmproxy keeps it
   until the client leaves, and opens one for each request of an HTTP/2 client to an HTTP/1 origin (8,000
   requests: 380 MiB).
6. DATA frames of a stream that arrive together are handed on as one piece.
7. HTTP/1 destinations of an HTTP/2 source hold back by TCP alone: that client waits for its slowest origin.

A peer that never grants credit keeps its stream, and the bounded bytes behind it, until `tcp_timeout`.
"""

import asyncio
import collections
import contextlib
import weakref
from collections.abc import Generator
from typing import Any, Final, override

import h2.events
from mitmproxy.addons import next_layer
from mitmproxy.connection import Connection, ConnectionState
from mitmproxy.proxy import commands, events, layer, layers, mode_servers, server, tunnel
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http import _base, _events, _http2, _http_h2

from proxy.gate import frames

STREAM_WINDOW_BYTES: Final = 1 << 20
HIGH_WATER_BYTES: Final = 256 * 1024
MAX_CONCURRENT_STREAMS: Final = 100
CONNECTION_STEP_BYTES: Final = 1 << 20
CONNECTION_WINDOW_BYTES: Final = 8 << 20
WAITING_BYTES: Final = 16 << 20
JOINED_BYTES: Final = 16 * 1024
"""One TLS record: up to this size copying costs less than a record and a write more."""

Commands = Generator[commands.Command, Any, None]

# What is replaced, leaned on, or copied in its behaviour; `pins` hashes the source of each (docs/adr/0002).
PINNED: Final[tuple[object, ...]] = (
    http.HttpLayer,
    http.HttpClient,
    http.HttpStream.passthrough,
    _http2.Http2Connection,
    _http2.Http2Server,
    _http2.Http2Client,
    _http_h2.BufferedH2Connection,
    layer.Layer,
    tunnel.TunnelLayer,
    server.ConnectionHandler.handle_connection,
    server.ConnectionHandler.drain_writers,
    server.ConnectionHandler.server_event,
)

# The HTTP/2 layer of each live connection, by the connection's id. Weak: a layer goes with its connection.
_live: Final[weakref.WeakValueDictionary[str, "_CreditedConnection"]] = weakref.WeakValueDictionary()


class ReleaseCredit(events.Event):
    """Sent down to an HTTP/2 connection that withholds credit: its destination may have room now."""


class _JoiningState(frames.FrugalState):
    """Hands on what arrives together as one piece: frames hold 16 KiB, and each would take the whole way."""

    @override
    def initiate_connection(self) -> None:
        """With a window of ours (rule 2) in place of mitmproxy's."""
        super(_http_h2.BufferedH2Connection, self).initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW_BYTES - self.inbound_flow_control_window)

    @override
    def receive_data(self, data: bytes) -> list[h2.events.Event]:
        received: list[h2.events.Event] = super().receive_data(data)
        joined: list[h2.events.Event] = []
        pieces: list[h2.events.DataReceived] = []
        for event in received:
            if pieces and not (
                isinstance(event, h2.events.DataReceived) and event.stream_id == pieces[0].stream_id
            ):
                joined.append(_join(pieces))
                pieces = []
            if isinstance(event, h2.events.DataReceived):
                pieces.append(event)
            else:
                joined.append(event)
        if pieces:
            joined.append(_join(pieces))
        return joined


def _join(pieces: list[h2.events.DataReceived]) -> h2.events.DataReceived:
    """One event for consecutive *pieces* of a stream, of which the last may end it."""
    if len(pieces) == 1:
        return pieces[0]
    return h2.events.DataReceived(
        stream_id=pieces[0].stream_id,
        data=b"".join(piece.data for piece in pieces),
        flow_controlled_length=sum(piece.flow_controlled_length for piece in pieces),
        stream_ended=pieces[-1].stream_ended,
    )


class _CreditedConnection(_http2.Http2Connection):
    """Keeps accounts of what it owes its peer. Stream ids are the connection's own unless named otherwise."""

    def __init__(self, context: Context, *args: Any) -> None:
        super().__init__(context, *args)
        # hyper-h2 wants settings acknowledged before the connection starts, or the old ones go out.
        self.h2_conn.local_settings.initial_window_size = STREAM_WINDOW_BYTES
        self.h2_conn.local_settings.max_concurrent_streams = MAX_CONCURRENT_STREAMS
        self.h2_conn.local_settings.acknowledge()
        self._http_layer: _HttpLayer = next(x for x in reversed(context.layers) if isinstance(x, _HttpLayer))
        self._connection_debt_bytes = 0
        self._stream_debt_bytes: collections.Counter[int] = collections.Counter()
        self._withheld: set[int] = set()
        self._ended: set[int] = set()
        """Of those that still wait, the streams to which no more comes."""
        _live[self.conn.id] = self

    def http_stream_id(self, stream_id: int) -> int:
        """The HTTP layer's name of this connection's stream: the id the client gave it."""
        return stream_id

    def parked_bytes(self, http_stream_id: int) -> int:
        """What waits here because the peer has granted no window for it."""
        parked = self.h2_conn.stream_buffers.get(http_stream_id)
        return sum(len(piece.data) for piece in parked) if parked else 0

    def destination(self, stream: http.HttpStream) -> Connection:
        """Where the body that arrives on this connection goes."""
        return stream.context.server

    @override
    def handle_h2_event(self, event: h2.events.Event) -> Generator[commands.Command, Any, bool]:
        if (
            isinstance(event, h2.events.DataReceived)
            and self.streams.get(event.stream_id) is _http2.StreamState.HEADERS_RECEIVED
        ):
            if event.data or not event.stream_ended:
                yield _base.ReceiveHttp(self.ReceiveData(event.stream_id, event.data))
            self._owe(event.stream_id, event.flow_controlled_length)
            return False
        stop = yield from super().handle_h2_event(event)
        if isinstance(event, h2.events.StreamReset):
            self._forget(event.stream_id)
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id in self._stream_debt_bytes:
            self._ended.add(event.stream_id)
            self._credit_stream(event.stream_id)
            self._credit_connection()
        return stop

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, ReleaseCredit):
            for stream_id in list(self._withheld):
                self._credit_stream(stream_id)
            self._credit_connection()
            if data := self.h2_conn.data_to_send():
                yield commands.SendData(self.conn, data)
        else:
            yield from super()._handle_event(event)
            if isinstance(event, (_events.RequestProtocolError, _events.ResponseProtocolError)):
                self._forget(event.stream_id)  # We have reset it; its peer need not end it any more.
                if data := self.h2_conn.data_to_send():
                    yield commands.SendData(self.conn, data)

    @override
    def done(self, _: events.Event) -> Commands:
        # mitmproxy's own accepts a list of events that ReleaseCredit is not on.
        self._withheld.clear()
        yield from ()

    def _owe(self, stream_id: int, size_bytes: int) -> None:
        self._connection_debt_bytes += size_bytes
        self._stream_debt_bytes[stream_id] += size_bytes
        if len(self._stream_debt_bytes) > 2 * MAX_CONCURRENT_STREAMS:
            # Streams that we have reset need not be ended by their peer.
            for closed in [one for one in self._stream_debt_bytes if self.is_closed(one)]:
                self._credit_stream(closed)
        # Below half a window the peer is not waiting for us.
        if self._stream_debt_bytes[stream_id] >= STREAM_WINDOW_BYTES // 2:
            self._credit_stream(stream_id)
        if self._stream_debt_bytes.total() > WAITING_BYTES:
            for one in list(self._stream_debt_bytes):
                self._credit_stream(one)
        self._credit_connection()

    def _credit_connection(self) -> None:
        if (
            self._connection_debt_bytes >= CONNECTION_STEP_BYTES
            and self._stream_debt_bytes.total() <= WAITING_BYTES
        ):
            self.h2_conn.increment_flow_control_window(self._connection_debt_bytes)
            self._connection_debt_bytes = 0

    def _credit_stream(self, stream_id: int) -> None:
        if self._is_congested(self.http_stream_id(stream_id)):
            self._withheld.add(stream_id)
            self._http_layer.withholding.add(self.conn)
            return
        debt_bytes, has_ended = self._stream_debt_bytes[stream_id], stream_id in self._ended
        self._forget(stream_id)
        if debt_bytes and not has_ended and not self.is_closed(stream_id):
            self.h2_conn.increment_flow_control_window(debt_bytes, stream_id)

    def _forget(self, stream_id: int) -> None:
        self._stream_debt_bytes.pop(stream_id, None)
        self._withheld.discard(stream_id)
        self._ended.discard(stream_id)
        self._credit_connection()

    def _is_congested(self, http_stream_id: int) -> bool:
        stream = self._http_layer.streams.get(http_stream_id)
        if stream is None:
            return self.is_parked_behind(http_stream_id)
        if stream.child_layer is not None:
            return False  # It has become a tunnel with a layer stack of its own.
        if stream._paused is not None:  # noqa: SLF001 - a hook or a connect is in progress: bytes would queue up
            return True
        destination = _live.get(self.destination(stream).id)
        return destination is not None and destination.parked_bytes(http_stream_id) > HIGH_WATER_BYTES

    def is_parked_behind(self, http_stream_id: int) -> bool:  # noqa: ARG002 - for the one who overrides it
        """Whether what came on a stream that is over here still waits at its destination."""
        return False

    @property
    def withholds(self) -> bool:
        return bool(self._withheld)


class _Http2Server(_CreditedConnection, _http2.Http2Server):
    """The client's connection: requests arrive here, responses leave."""


class _Http2Client(_CreditedConnection, _http2.Http2Client):
    """A connection to an origin: responses arrive here, requests leave."""

    @override
    def http_stream_id(self, stream_id: int) -> int:
        return self.their_stream_id.get(stream_id, stream_id)

    @override
    def parked_bytes(self, http_stream_id: int) -> int:
        if http_stream_id in self.stream_queue:
            return HIGH_WATER_BYTES + 1  # Not even opened yet: the origin takes no more streams for now.
        ours = self.our_stream_id.get(http_stream_id)
        return 0 if ours is None else super().parked_bytes(ours)

    @override
    def destination(self, stream: http.HttpStream) -> Connection:
        return stream.context.client

    @override
    def is_parked_behind(self, http_stream_id: int) -> bool:
        client = _live.get(self._http_layer.context.client.id)
        return client is not None and client.parked_bytes(http_stream_id) > HIGH_WATER_BYTES


class _HttpLayer(http.HttpLayer):
    """Releases withheld credit when a destination may have moved, and forgets closed upstream connections."""

    def __init__(self, context: Context, mode: http.HTTPMode) -> None:
        super().__init__(context, mode)
        self.withholding: set[Connection] = set()
        self._closed: set[Connection] = set()

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        yield from _in_one_piece(super()._handle_event(event))
        if isinstance(event, events.ConnectionClosed):
            self._closed.add(event.connection)
        if self._closed:
            self._forget_closed()
        if self.withholding:
            yield from self._release()

    @override
    def event_to_child(self, child: layer.Layer, event: events.Event) -> Commands:
        # As mitmproxy's, which asks up to nine times what a command is: the frequent kinds first.
        for command in child.handle_event(event):
            if isinstance(command, http.SendHttp):
                yield from self.event_to_child(self.connections[command.connection], command.event)
            elif isinstance(command, _base.ReceiveHttp):
                if isinstance(command.event, _events.RequestHeaders):
                    yield from self.make_stream(command.event.stream_id)
                # None: for a stream that has been dropped.
                if (receiver := self.streams.get(command.event.stream_id)) is not None:
                    yield from self.event_to_child(receiver, command.event)
            elif isinstance(command, commands.SendData):
                yield command
            else:
                yield from self._carry_out(child, command)

    def _carry_out(self, child: layer.Layer, command: commands.Command) -> Commands:
        if command.blocking or isinstance(command, commands.RequestWakeup):
            self.command_sources[command] = child
        if isinstance(command, http.DropStream):
            self.streams.pop(command.stream_id, None)
        elif isinstance(command, http.GetHttpConnection):
            yield from self.get_connection(command)
        elif isinstance(command, http.RegisterHttpConnection):
            yield from self.register_connection(command)
        else:
            if isinstance(command, commands.OpenConnection):
                self.connections[command.connection] = child
            yield command

    def _release(self) -> Commands:
        for connection in list(self.withholding):
            top = self.connections.get(connection)
            source = _live.get(connection.id)
            if top is None or source is None or not source.withholds:
                self.withholding.discard(connection)
                continue
            yield from self.event_to_child(top, ReleaseCredit())

    def _forget_closed(self) -> None:
        for connection in list(self._closed):
            if connection.state is not ConnectionState.CLOSED or connection in self.waiting_for_establishment:
                continue
            # A stream in the middle of a hook still sends to its origin afterwards, closed or not.
            if any(stream.context.server is connection for stream in self.streams.values()):
                continue
            self._closed.discard(connection)
            if connection is not self.context.client and connection is not self.context.server:
                self.connections.pop(connection, None)


def _in_one_piece(stock: Commands) -> Commands:
    """A head and a small body that leave together: one TLS record and one system call for both.

    Not on HTTP/2, which frames them anyway: an answer and a RST_STREAM (NO_ERROR) after it in one record make
    curl 7.88 forget the answer.
    """
    waiting: commands.SendData | None = None
    for command in stock:
        if type(command) is commands.SendData and command.connection.alpn != b"h2":
            if waiting is None:
                waiting = command
                continue
            if (
                waiting.connection is command.connection
                and len(waiting.data) + len(command.data) <= JOINED_BYTES
            ):
                waiting = commands.SendData(command.connection, b"".join((waiting.data, command.data)))
                continue
            yield waiting
            waiting = command
        else:
            if waiting is not None:
                yield waiting
                waiting = None
            yield command
    if waiting is not None:
        yield waiting


class BackpressureHandler(mode_servers.ProxyConnectionHandler):
    """The connection handler's share: an HTTP/1 source waits while its HTTP/2 destination is full (rule 3).

    The wait stands in `drain_writers` because that is where mitmproxy's read loop expects to be held, and to
    be cancelled. To be subclassed by the gate's handler; without `install` it never waits.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)  # type: ignore[no-untyped-call]
        self._moved = asyncio.Event()

    @override
    async def server_event(self, event: events.Event) -> None:
        await super().server_event(event)
        self._moved.set()

    @override
    async def drain_writers(self) -> None:
        await super().drain_writers()  # type: ignore[no-untyped-call]
        if not _live:
            return
        task = asyncio.current_task()
        source = next((c for c, io in self.transports.items() if io.handler is task), None)
        while source is not None and source in self.transports and self._is_congested(source):
            self._moved.clear()
            await self._moved.wait()

    def _is_congested(self, source: Connection) -> bool:
        if source.id in _live:
            return False  # It speaks HTTP/2 and is held back by credit.
        return any(
            connection is not source
            and (destination := _live.get(connection.id)) is not None
            and any(
                destination.parked_bytes(stream_id) > HIGH_WATER_BYTES
                for stream_id, stream in destination._http_layer.streams.items()  # noqa: SLF001 - same module
                if source in (stream.context.client, stream.context.server)
            )
            for connection in self.transports
        )


def install() -> contextlib.ExitStack:
    """Replace mitmproxy's HTTP/2 layers by ours, for connections accepted from now on.

    Returns what undoes it when closed. Call it before a Master exists, and once.
    """
    undo = contextlib.ExitStack()
    for owner, name, ours in (
        (_http2, "BufferedH2Connection", _JoiningState),
        (http, "Http2Server", _Http2Server),
        (http, "Http2Client", _Http2Client),
        (http, "HttpLayer", _HttpLayer),
        (layers, "HttpLayer", _HttpLayer),
        (next_layer, "HttpLayer", _HttpLayer),
    ):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, ours)
    return undo
