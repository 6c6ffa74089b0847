"""HTTP/1 at the gate's edges: what mitmproxy crashes on, passes on wrongly, or keeps without a bound.

1. Trailers reach the stream, which decides (`stream`, rule 7); mitmproxy raises NotImplementedError.
2. Interim responses of an origin (100, 102, 103) are dropped, as mitmproxy does for HTTP/2; on HTTP/1 it
   takes the first for the response and loses the real one. 101 goes to the stream, which refuses it.
3. A message head is at most MAX_HEAD_BYTES; mitmproxy collects it for as long as it grows.
4. A request that does not parse is answered by `refusals.BAD_MESSAGE`, not by mitmproxy's page.
"""

from collections.abc import Generator
from typing import Any, Final, override

from mitmproxy.http import Headers
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestTrailers,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server

from proxy import refusals

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

    @override
    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        yield from super().read_headers(event)
        if self.state == self.read_headers and len(self.buf) > MAX_HEAD_BYTES:
            yield commands.SendData(self.conn, bad_message_response(400))
            yield commands.CloseConnection(self.conn)
            self.state = self.done

    @override
    def read_body(self, event: events.Event) -> Commands:
        try:
            yield from super().read_body(event)
        except NotImplementedError:
            yield ReceiveHttp(RequestTrailers(self.stream_id, Headers()))
            yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(request=True)


class GuardedHttp1Client(Http1Client):
    """A connection to an origin."""

    @override
    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        for command in super().read_headers(event):
            if isinstance(command, ReceiveHttp) and _is_interim(command.event):
                # The state is still this one: go on with what follows, if it is here.
                self.response = None
                if self.buf:
                    yield from self.state(events.DataReceived(self.conn, b""))
                return
            yield command
        if self.state == self.read_headers and len(self.buf) > MAX_HEAD_BYTES and self.stream_id is not None:
            yield commands.CloseConnection(self.conn)
            error = ResponseProtocolError(
                self.stream_id, "response head too large", ErrorCode.GENERIC_SERVER_ERROR
            )
            yield ReceiveHttp(error)
            self.state = self.done

    @override
    def read_body(self, event: events.Event) -> Commands:
        try:
            yield from super().read_body(event)
        except NotImplementedError:
            if self.stream_id is not None:
                yield ReceiveHttp(ResponseTrailers(self.stream_id, Headers()))
                yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(response=True)


def _is_interim(event: events.Event) -> bool:
    return isinstance(event, ResponseHeaders) and event.response.status_code in (100, *range(102, 200))
