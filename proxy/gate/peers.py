"""The two connections of one stream: who is there still, and how each is answered, held or cut.

1. A cut is RST on HTTP/1 (a client of a length-less HTTP/1.0 body must see it too), RST_STREAM on HTTP/2.
2. A refused upload is answered at once and not read. The connection lingers LINGER_S, then it is cut.
3. While a hook or a connect of the flow is awaited, its HTTP/1 peers are not read (HTTP/2: see `h2`).
"""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, Final

from h2.errors import ErrorCodes
from h2.stream import StreamState
from mitmproxy.connection import Connection, ConnectionState
from mitmproxy.http import Request, Response
from mitmproxy.proxy import commands
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http import SendHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._http1 import Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Server

from proxy.gate.failures import the
from proxy.gate.keeper import Keeper, keeper_of

LINGER_S: Final = 5.0
"""How long a client may go on sending an upload that was refused, so that it comes to read the answer."""

type Commands = Generator[commands.Command, Any, None]


class Peers:
    def __init__(self, context: Context, stream: http.HttpStream, stream_id: int) -> None:
        """Of *stream*, whose own *context* it is: its `server` is known once the request has found one."""
        self._context = context
        self._http = the(context.layers[context.layers.index(stream) - 1], http.HttpLayer)
        self._stream_id = stream_id

    # ---- who is there

    def keeper(self) -> Keeper | None:
        return keeper_of(self._context.client.id)

    def client_connection(self) -> Http1Server | Http2Server | None:
        connection = self._http.connections.get(self._context.client)
        return connection if isinstance(connection, Http1Server | Http2Server) else None

    def is_client_gone(self) -> bool:
        return not self._context.client.state & ConnectionState.CAN_WRITE

    def is_connected(self) -> bool:
        """The upstream connection is still known: it is forgotten once it has closed."""
        return self._context.server in self._http.connections

    def is_request_complete(self) -> bool:
        client = self.client_connection()
        if isinstance(client, Http1Server):
            return client.request_done or client.stream_id != self._stream_id
        if isinstance(client, Http2Server):
            stream = client.h2_conn.streams.get(self._stream_id)
            return stream is None or stream.state_machine.state not in (
                StreamState.OPEN,
                StreamState.HALF_CLOSED_LOCAL,
            )
        return True

    @contextlib.contextmanager
    def held(self, *, server: bool) -> Iterator[None]:
        """What arrives while the stream is paused is queued without a limit: so nothing may arrive.

        *server*: the upstream connection is in use.
        """
        keeper = self.keeper()
        if keeper is None:
            yield
            return
        held: list[Connection] = []
        if self._context.client.alpn != b"h2":
            held.append(self._context.client)
        if server and self._context.server.alpn != b"h2":
            held.append(self._context.server)
        for connection in held:
            keeper.hold(connection)
        try:
            yield
        finally:
            for connection in held:
                keeper.release(connection)

    # ---- how each is left

    def cut_upstream(self, event: RequestProtocolError) -> Commands:
        if self.is_connected():
            if self._context.server.alpn != b"h2" and (keeper := self.keeper()):
                keeper.cut_on_close(self._context.server)
            yield SendHttp(event, self._context.server)

    def cut_client(self) -> Commands:
        if self._context.client.alpn != b"h2" and (keeper := self.keeper()):
            keeper.cut_on_close(self._context.client)
        cut = ResponseProtocolError(self._stream_id, "aborted by the gate", ErrorCode.KILL)
        yield SendHttp(cut, self._context.client)

    def answer(self, response: Response, request: Request, *, closes: bool) -> Commands:
        """Send a whole *response* to *request*. *closes*: nothing is read of an HTTP/1 client after it."""
        client = self._context.client
        if closes and client.alpn != b"h2":
            response.headers["connection"] = "close"
        content = response.raw_content if request.method != "HEAD" else None
        yield SendHttp(ResponseHeaders(self._stream_id, response, end_stream=not content), client)
        if content:
            yield SendHttp(ResponseData(self._stream_id, content), client)
        yield SendHttp(ResponseEndOfMessage(self._stream_id), client)

    def end_upload(self) -> Commands:
        """The response is complete, the request is not: ask the client to stop, and give it LINGER_S."""
        client = self.client_connection()
        if isinstance(client, Http2Server) and not client.h2_conn.stream_buffers.get(self._stream_id):
            # RFC 9113, 8.1: the response stands, only the rest of the request is not wanted.
            client.h2_conn.reset_stream(self._stream_id, ErrorCodes.NO_ERROR)
            client.streams.pop(self._stream_id, None)
            # The stream is closed by now: this sends the frame, and settles what is owed for the stream.
            done = ResponseProtocolError(self._stream_id, "not wanted any more", ErrorCode.CANCEL)
            yield SendHttp(done, self._context.client)
        else:
            yield commands.RequestWakeup(LINGER_S)

    def end_linger(self) -> Commands:
        """LINGER_S are over."""
        client = self.client_connection()
        if self.is_request_complete() or client is None:
            return
        if isinstance(client, Http2Server):
            yield from self.cut_client()
        elif client.stream_id == self._stream_id:
            if keeper := self.keeper():
                keeper.cut_on_close(self._context.client)
            yield commands.CloseConnection(self._context.client)
