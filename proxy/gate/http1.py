"""HTTP/1 at the gate's edges: what mitmproxy crashes on, passes on wrongly, or keeps without a bound.

1. Trailers reach the stream, which decides (`judge`, rule 3); mitmproxy raises NotImplementedError.
2. Interim responses of an origin (100, 102, 103) are dropped, as mitmproxy does for HTTP/2; on HTTP/1 it
   takes the first for the response and loses the real one. 101 goes to the stream, which refuses it.
3. A message head is at most MAX_HEAD_BYTES, and so are a chunk's header line and the trailers; mitmproxy
   collects them for as long as they grow.
4. A request that does not parse is answered by `refusals.BAD_MESSAGE`, not by mitmproxy's page.
5. What a client sends after its request is for the next one. Of that MAX_HEAD_BYTES are kept, then the client
   is not read until the response is complete; mitmproxy keeps all of it.
6. Chunks that came together go on as one piece, however small a peer makes them.
7. A head that not every reader reads alike is a bad message (`heads`).
8. A body that ends with its connection has ended if the peer ended that (`ends`); else it was cut.
9. A connection has taken in all there is of a piece before a stream sees any of it: what the stream does at
   once, a local answer say, then meets a connection that knows whether its request was complete.
"""

from collections.abc import Generator
from typing import Any, Final, override

from mitmproxy.http import Headers
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http._base import HttpEvent, ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestData,
    RequestHeaders,
    RequestTrailers,
    ResponseData,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server

from proxy import refusals
from proxy.gate import ends, heads
from proxy.gate.keeper import keeper_of

MAX_HEAD_BYTES: Final = 256 * 1024
"""nginx allows a quarter of it; cookies and signed URLs grow."""

type Commands = Generator[commands.Command, Any, None]


def bad_message_response(_status_code: int, _message: str = "") -> bytes:
    """Stands in for `mitmproxy.proxy.layers.http._http1.make_error_response`."""
    refusal = refusals.BAD_MESSAGE
    lines = [f"HTTP/1.1 {refusal.status} Bad Request", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in refusal.headers()]
    return "\r\n".join([*lines, "", ""]).encode() + refusal.body()


class GuardedHttp1Server(Http1Server):
    """The client's connection."""

    _is_held = False
    _empty_lines = 0
    """Before the head that is awaited."""
    is_sending = False
    """A stream is being served. What it lets begin, a pipelined request, began inside of its call."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._search = heads.HeadSearch()

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        settled = list(super()._handle_event(event))
        was_sending, self.is_sending = self.is_sending, isinstance(event, HttpEvent)
        yield from settled
        self.is_sending = was_sending

    @override
    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        if isinstance(event, events.DataReceived) and not self._is_sound():
            yield from self._refuse_head()
            return
        is_read = False
        for command in super().read_headers(event):
            if isinstance(command, ReceiveHttp) and isinstance(command.event, RequestHeaders):
                if not heads.names_one_host(command.event.request):
                    yield from self._refuse_head()
                    return
                is_read = True
            yield command
            if isinstance(command, commands.CloseConnection) and not is_read:
                # Answered; mitmproxy would show it to the addons as well, and be answered by them once more.
                self.state = self.done
                return
        if self.state != self.read_headers:
            return
        if len(self.buf) > MAX_HEAD_BYTES:
            yield from self._refuse_head()
        elif (
            isinstance(event, events.DataReceived)
            and (event.data or self.buf)
            and (keeper := keeper_of(self.conn.id)) is not None
        ):
            keeper.head_begins()

    def _is_sound(self) -> bool:
        """False: what is here cannot become a request, or is one that not everybody reads alike."""
        data = self.buf._data  # noqa: SLF001 - pinned
        while data[:2] == b"\r\n" and self._empty_lines < heads.MAX_EMPTY_LINES:
            self.buf.maybe_extract_lines()
            self._empty_lines += 1
        if data.startswith((b"\r", b"\n")) and data != b"\r":
            return False
        end = self._search.end_of(data)
        if end is None:
            return True
        self._empty_lines = 0
        return end <= MAX_HEAD_BYTES and heads.is_request_head(data, end)

    def _refuse_head(self) -> Commands:
        yield commands.SendData(self.conn, bad_message_response(400))
        yield commands.CloseConnection(self.conn)
        self.state = self.done

    @override
    def read_body(self, event: events.Event) -> Commands:
        try:
            yield from _gathered(super().read_body(event))
        except NotImplementedError:
            yield ReceiveHttp(RequestTrailers(self.stream_id, Headers()))
            yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(request=True)
        yield from _bound_lines(self)

    @override
    def wait(self, event: events.Event) -> Commands:
        yield from super().wait(event)
        self._hold_back()

    def _hold_back(self) -> None:
        if self.state == self.wait and not self._is_held and len(self.buf) > MAX_HEAD_BYTES:
            keeper = keeper_of(self.conn.id)
            if keeper is not None:
                keeper.hold(self.conn)
                self._is_held = True

    @override
    def mark_done(self, *, request: bool = False, response: bool = False) -> Commands:
        if response and self._is_held:
            self._is_held = False
            keeper = keeper_of(self.conn.id)
            if keeper is not None:
                keeper.release(self.conn)
        yield from super().mark_done(request=request, response=response)
        self._hold_back()  # it may have come together with the end of the body


class GuardedHttp1Client(Http1Client):
    """A connection to an origin."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._search = heads.HeadSearch()

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        yield from list(super()._handle_event(event))

    @override
    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        if isinstance(event, events.DataReceived) and self.stream_id is not None:
            data = self.buf._data  # noqa: SLF001 - pinned
            end = self._search.end_of(data)
            if end is not None and (end > MAX_HEAD_BYTES or not heads.is_response_head(data, end)):
                yield from self._refuse_head("not a response head")
                return
        for command in super().read_headers(event):
            if isinstance(command, ReceiveHttp) and _is_interim(command.event):
                # The state is still this one: go on with what follows, if it is here.
                self.response = None
                if self.buf:
                    yield from self.state(events.DataReceived(self.conn, b""))
                return
            if (
                isinstance(command, ReceiveHttp)
                and isinstance(command.event, ResponseHeaders)
                and not heads.unfold(command.event.response)
            ):
                yield from self._refuse_head("control characters in a response head")
                return
            yield command
        if self.state == self.read_headers and len(self.buf) > MAX_HEAD_BYTES:
            yield from self._refuse_head("response head too large")

    def _refuse_head(self, cause: str) -> Commands:
        if self.stream_id is not None:
            yield commands.CloseConnection(self.conn)
            yield ReceiveHttp(ResponseProtocolError(self.stream_id, cause, ErrorCode.GENERIC_SERVER_ERROR))
            self.state = self.done

    @override
    def read_body(self, event: events.Event) -> Commands:
        if isinstance(event, events.ConnectionClosed) and not ends.is_ended_by_peer(self.context, self.conn):
            yield from _fail(self, "the connection was cut")
            return
        try:
            yield from _gathered(super().read_body(event))
        except NotImplementedError:
            if self.stream_id is not None:
                yield ReceiveHttp(ResponseTrailers(self.stream_id, Headers()))
                yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(response=True)
        yield from _bound_lines(self)


def _gathered(stock: Commands) -> Commands:
    """The chunks that came together as one piece: each piece costs a walk through all layers."""
    pieces: list[RequestData | ResponseData] = []
    try:
        for command in stock:
            if isinstance(command, ReceiveHttp) and isinstance(command.event, RequestData | ResponseData):
                pieces.append(command.event)
            else:
                yield from _joined(pieces)
                yield command
    except NotImplementedError:  # trailers, after the last chunk
        yield from _joined(pieces)
        raise
    yield from _joined(pieces)


def _joined(pieces: list[RequestData | ResponseData]) -> Commands:
    if pieces:
        first = pieces[0]
        if len(pieces) > 1:
            first = type(first)(first.stream_id, b"".join(piece.data for piece in pieces))
        pieces.clear()
        yield ReceiveHttp(first)


def _bound_lines(connection: Http1Server | Http1Client) -> Commands:
    """Inside a body only unfinished lines are left over: of a chunk's header, or of trailers."""
    if connection.state == connection.read_body and len(connection.buf) > MAX_HEAD_BYTES:
        yield from _fail(connection, "a line without an end")


def _fail(connection: Http1Server | Http1Client, cause: str) -> Commands:
    """The body that is being read will not come to its end."""
    yield commands.CloseConnection(connection.conn)
    connection.state = connection.done
    if connection.stream_id is not None:
        kind = connection.ReceiveProtocolError
        yield ReceiveHttp(kind(connection.stream_id, cause, code=kind.code))


def _is_interim(event: events.Event) -> bool:
    return isinstance(event, ResponseHeaders) and event.response.status_code in (100, *range(102, 200))
