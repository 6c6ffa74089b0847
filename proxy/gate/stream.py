"""The guarded state machine of one HTTP flow: nothing leaves it that the addon has not permitted.

mitmproxy's `HttpStream` decides what to send; `GuardedStream` sees each command before it leaves and lets it
pass, or ends the flow. The rules:

1. A flow begins refused. A request leaves when `permit.request` covers it, judged after `requestheaders`,
   before the connect, after the connect and at every piece; a response when `permit.response` covers it.
2. The permit and the stream object are compared by identity with what they were at the head, at every piece.
3. What leaves is framed, once and truly: no more and no fewer bytes than the head declared. The piece that
   completes a declared length waits until the transform has finished and the hook after it has agreed.
4. A refused upload is answered at once and not read. The connection lingers LINGER_S, then it is cut.
5. Before the head of the response has left, a refusal is a proper answer; after that there is only the cut:
   RST on HTTP/1 (a client of a length-less HTTP/1.0 body must see it too), RST_STREAM on HTTP/2.
6. An aborted body has no end: the upstream socket is reset, or its stream.
7. Trailers pass for CLEAR alone, between two HTTP/2 peers. With HTTP/1 on either side a response's are
   dropped (RFC 9110, 6.5), a request's refused.
8. 101 is never forwarded, 100 never sent to a request that is refused already.
9. While a hook or a connect of the flow is awaited, its HTTP/1 peers are not read (HTTP/2: see `h2`).
10. A CONNECT sends nothing upstream and needs no permit: whatever comes through it meets this gate again, or
    the protocol whitelist. It is refused by `permit.refusal`, by a non-2xx `flow.response`, or by a hook of
    it that fails.
11. A response set by an addon in `requestheaders` answers at once, without reading a body that is to come.
12. A body that is collected never reaches mitmproxy's buffers: it ends up in its `Collect`, within the limit.
    What leaves in its place is the approved object, by identity.
13. A head that is held may change until it leaves; then it is checked again, and its length counts.
14. While a transform is pending its `settle` is awaited before anything more is fed to it.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast, override

from h2.errors import ErrorCodes
from h2.stream import StreamState
from mitmproxy import flow as flows
from mitmproxy.connection import Connection, ConnectionState
from mitmproxy.http import Headers, HTTPFlow, Message, Response
from mitmproxy.net.http import status_codes, validate
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http import DropStream, SendHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    RequestTrailers,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)
from mitmproxy.proxy.layers.http._hooks import (
    HttpConnectHook,
    HttpErrorHook,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
    HttpResponseHook,
)
from mitmproxy.proxy.layers.http._http1 import Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Server

from proxy import refusals
from proxy.gate import heads
from proxy.gate.permit import CLEAR, Collect, Grant, Shape, Transform, permit
from proxy.refusals import Refusal, RefusedError, Shaped

LINGER_S: Final = 5.0
"""How long a client may go on sending an upload that was refused, so that it comes to read the answer."""

_LAST: Final = (refusals.BAD_MESSAGE, refusals.USER_MISMATCH)
"""Their answer ends an HTTP/1 connection. Others may see the end of a bad message elsewhere: what follows it
is nobody's request. A proxy in front that pools its connections opens another one for another tenant."""

type Commands = Generator[commands.Command, Any, None]

log = logging.getLogger(__name__)
_engine_log: Final = logging.getLogger("mitmproxy.proxy.server")
"""Where `commands.Log` end up."""


class Keeper(Protocol):
    """What a stream needs of the handler of its client connection."""

    def adopt(self, stream: "GuardedStream") -> None:
        """Tell *stream* to `abandon` when every socket of this client is aborted."""

    def head_begins(self) -> None:
        """A part of a request head has come, and not the whole of it."""

    def hold(self, connection: Connection) -> None:
        """Read no more from *connection* until it was released as often as held."""

    def release(self, connection: Connection) -> None: ...

    def begin(self, hook: commands.StartHook) -> bool:
        """Start *hook* at once; True: it is over already, else it is to be yielded as ever."""

    def cut_on_close(self, connection: Connection) -> None:
        """When *connection* is closed, reset it: its peer must not take the end for a proper one."""

    def has_finished(self, connection: Connection) -> bool:
        """At the close of *connection*: True if its peer sent a FIN, and all before it was read."""

    def report(self, flow: HTTPFlow, refusal: Refusal, *, bytes_sent: bool) -> None:
        """Tell the application; what it raises means that nothing was recorded."""


_keepers: Final[weakref.WeakValueDictionary[str, Keeper]] = weakref.WeakValueDictionary()


def keep(client_id: str, keeper: Keeper) -> None:
    """Streams of this client connection belong to *keeper* from now on. Held weakly."""
    _keepers[client_id] = keeper


def keeper_of(client_id: str) -> Keeper | None:
    return _keepers.get(client_id)


@dataclass
class SettleHook(commands.StartHook):  # type: ignore[no-untyped-call]
    """Not for addons: the handler awaits `settle` of a pending transform, as if it were a hook."""

    transform: Transform
    failure: BaseException | None = field(default=None, init=False)


class _VetoError(RefusedError):
    """The gate itself refuses; *cause* goes to the log only."""

    def __init__(self, refusal: Refusal, cause: str) -> None:
        super().__init__(refusal)
        self.cause = cause


class _ClientGoneError(Exception):
    """Nobody is left to answer."""


class _Leg:
    """One direction of a flow: what was granted for it, and what has left."""

    __slots__ = (
        "collect",
        "declared_bytes",
        "ended",
        "framing",
        "granted",
        "held_head",
        "is_collected",
        "last",
        "sent_bytes",
        "started",
        "transform",
    )

    def __init__(self) -> None:
        self.granted: Grant | None = None
        self.transform: Transform | None = None
        """The same, if it is one."""
        self.framing: tuple[object, object, int | None, bool] | None = None
        """What the last check of the framing was of, and what it came to."""
        self.declared_bytes: int | None = None
        self.sent_bytes = 0
        self.started = False
        self.ended = False
        self.last: SendHttp | None = None
        """The piece that completes the declared length, held back."""
        self.held_head: SendHttp | None = None
        self.collect: Collect | None = None
        """Where the body goes that is coming in."""
        self.is_collected = False
        """The hook that comes after the body has run."""

    def start(self, granted: Grant | None, declared_bytes: int | None) -> None:
        self.granted = granted
        self.transform = granted if isinstance(granted, Transform) else None
        self.declared_bytes = declared_bytes
        self.started = True

    def completes(self, piece: SendHttp, size_bytes: int) -> bool:
        """Count *piece*; True: it completes the declared length and is held back here."""
        self.sent_bytes += size_bytes
        if self.declared_bytes is None or self.sent_bytes < self.declared_bytes:
            return False
        if self.sent_bytes > self.declared_bytes:
            raise _VetoError(refusals.INTERNAL, "the body outgrows its declared length")
        self.last = piece
        return True

    def check_end(self) -> None:
        if isinstance(self.granted, Transform):
            if not self.granted.finished:
                raise _VetoError(refusals.INTERNAL, "the message ends before its transform has finished")
            if self.sent_bytes != self.granted.out_bytes:
                raise _VetoError(refusals.INTERNAL, "what left is not what the transform made")
        if self.declared_bytes is not None and self.sent_bytes != self.declared_bytes:
            raise _VetoError(refusals.INTERNAL, "the body ends before its declared length")


class GuardedStream(http.HttpStream):
    """Stands in for `mitmproxy.proxy.layers.http.HttpStream`."""

    def __init__(self, context: Context, stream_id: int) -> None:
        super().__init__(context, stream_id)
        self._request = _Leg()
        self._response = _Leg()
        self._over = False  # nothing is let out any more
        self._head: RequestHeaders | ResponseHeaders | None = None  # of the message whose hook comes next
        self._body_follows = False  # of the request, as it will be sent
        self._is_busy = False  # more may be to do with a piece of a body than to feed it
        self._head_left = False  # a part of the final response has been given to the client connection
        self._response_received = False
        self._error_hooked = False
        self._is_given_up = False

    @property
    def is_under_way(self) -> bool:
        """It is being answered. A CONNECT that became a tunnel is not: what is inside of it is asked."""
        return self.child_layer is None and hasattr(self, "flow") and self.flow.live

    @property
    def waits_for_service(self) -> bool:
        """The whole request has left, nothing of an answer has come, and nobody has given up."""
        return self._request.ended and self.flow.response is None and not self._is_given_up

    def give_up(self) -> None:
        """The service is being left, for it does not answer: its connection's end is told as that."""
        self._is_given_up = True

    # ---- what comes in

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, events.Wakeup):
            yield from self._end_linger()
        elif not self._over:
            if isinstance(event, (RequestHeaders, ResponseHeaders)):
                self._head = event
            elif isinstance(event, ResponseEndOfMessage):
                self._response_received = True
            if isinstance(event, RequestHeaders) and (keeper := self._keeper()):
                keeper.adopt(self)
            if isinstance(event, (RequestTrailers, ResponseTrailers)):
                yield from self._guard(self._take_trailers(event))
            elif self._is_busy and (leg := self._busy_leg(event)) is not None:
                yield from self._guard(self._take_body(leg, event))
            else:
                yield from self._guard(super()._handle_event(event))

    def _busy_leg(self, event: events.Event) -> _Leg | None:
        """The leg of this piece of a body, or its end, if more is to be done than to feed it."""
        if isinstance(event, (RequestData, RequestEndOfMessage)):
            leg = self._request
        elif isinstance(event, (ResponseData, ResponseEndOfMessage)):
            leg = self._response
        else:
            return None
        is_pending = leg.transform is not None and leg.transform.pending
        return leg if is_pending or leg.collect is not None else None

    def _take_body(self, leg: _Leg, event: events.Event) -> Commands:
        if leg.collect is not None:
            if isinstance(event, (RequestData, ResponseData)):
                leg.collect.take(event.data)
                return
        elif leg.transform is not None:
            hook = SettleHook(leg.transform)
            yield hook
            if hook.failure is not None:
                leg.transform.fail(hook.failure)
                raise hook.failure
            if leg.transform.pending:
                raise _VetoError(refusals.INTERNAL, "a transform is pending still")
        yield from super()._handle_event(event)

    def _take_trailers(self, event: RequestTrailers | ResponseTrailers) -> Commands:
        is_request = isinstance(event, RequestTrailers)
        leg = self._request if is_request else self._response
        is_http2 = self.context.client.alpn == self.context.server.alpn == b"h2"
        if leg.granted is not CLEAR or (is_request and not is_http2):
            raise _VetoError(refusals.TRAILERS, "trailers")
        if is_http2:
            yield from super()._handle_event(event)

    @override
    def make_server_connection(self) -> Generator[commands.Command, Any, bool]:
        self._check_request()
        if not (yield from super().make_server_connection()):
            return False
        self._check_request()
        self._frame_request()
        return True

    @override
    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Commands:
        if isinstance(event, ResponseProtocolError):
            if self._is_client_gone():
                raise _ClientGoneError  # the connect was cancelled because of that
            if self.server_state != self.state_done:
                # Messages of HTTP errors quote what the peer sent; those of connects are mitmproxy's own.
                detail = event.message if event.code is ErrorCode.CONNECT_FAILED else event.code.name
                raise _VetoError(refusals.IDLE if self._is_given_up else refusals.UPSTREAM, detail)
            # Answered early, and now the origin has gone: the rest of the upload has nowhere to go.
            if not self._response.ended:
                yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
            yield from self._retire()
            if not self._is_request_complete():
                yield from self._end_upload()
        else:
            yield from super().handle_protocol_error(event)
            yield from self._retire()

    # ---- what goes out

    def _guard(self, stock: Commands) -> Commands:
        """Run mitmproxy's generator; every `SendHttp` of it is judged, every failure ends the flow."""
        reply: Any = None
        while True:
            try:
                command = stock.send(reply)
                reply = None
                if isinstance(command, SendHttp):
                    if not self._over:
                        yield from self._judge(command)
                    continue
                if isinstance(command, commands.Log) and not _engine_log.isEnabledFor(command.level):
                    continue  # two for each flow, which all layers would hand up
                if command.blocking:
                    if isinstance(command, HttpResponseHeadersHook):
                        # Decided for the response that is here, not in advance.
                        permit(self.flow).response = permit(self.flow).refusal = None
                    if not self._is_answered_now(command):
                        with self._peers_held():
                            reply = yield command
                    if self._over:  # abandoned meanwhile
                        stock.close()
                        return
                    if isinstance(command, commands.StartHook):
                        if self._answers_after(command):
                            stock.close()
                            yield from self._answer_at_once()
                            return
                        # An early response must not wait for the end of the request.
                        if isinstance(command, HttpResponseHook) and self._response.last is not None:
                            yield from self._release_last(self._response)
                else:
                    yield command
            except StopIteration:
                return
            except RefusedError as refused:
                stock.close()
                cause = getattr(refused, "cause", "by the transform")
                log.info("refused %s: %s (%s)", self._describe(), refused.refusal.code, cause)
                yield from self._stop(refused.refusal)
                return
            except _ClientGoneError:
                stock.close()
                yield from self._stop(None)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the flow must not go on
                stock.close()
                # Never the text: mitmproxy's assertions quote the body.
                log.error("aborted %s: %s", self._describe(), origin_of(error))  # noqa: TRY400
                yield from self._stop(refusals.INTERNAL)
                return

    def _is_answered_now(self, command: commands.Command) -> bool:
        """Most hooks have nothing to wait for: those need no walk up through all layers and down again.

        Not on HTTP/2, whose connections act on streams while they take in what came; not for a request that
        begins while the answer before it is being sent: a hundred of them would be as many calls deep.
        """
        if not isinstance(command, commands.StartHook):
            return False
        if b"h2" in (self.context.client.alpn, self.context.server.alpn):
            return False
        if isinstance(command, HttpRequestHeadersHook):
            client = self._client_connection()
            if getattr(client, "is_sending", True):  # of `http1`, which builds on this module
                return False
        keeper = self._keeper()
        return keeper is not None and keeper.begin(command)

    def _answers_after(self, hook: commands.StartHook) -> bool:
        """Judge what *hook* has decided; True if a local answer is due now, before the body."""
        if isinstance(hook, HttpErrorHook):
            self._error_hooked = True
            return False
        decided = permit(self.flow)
        if decided.revoked:
            raise _VetoError(decided.refusal or refusals.INTERNAL, f"the hook {hook.name} failed")
        if isinstance(hook, HttpRequestHeadersHook):
            return self._after_requestheaders()
        if isinstance(hook, HttpResponseHeadersHook) and self._request.started:
            self._after_responseheaders()
        elif isinstance(hook, HttpRequestHook) and self._request.collect is not None:
            self._request.is_collected = True
            self._body_follows = bool(self._request.collect.approved)
        elif isinstance(hook, HttpResponseHook) and self._response.collect is not None:
            self._response.is_collected = True
        elif isinstance(hook, HttpConnectHook) and decided.refusal is not None:
            raise _VetoError(decided.refusal, "CONNECT")
        return False

    def _after_requestheaders(self) -> bool:
        head, request = _the(self._head, RequestHeaders), self.flow.request
        self._check_error()
        if self.context.client.alpn != b"h2" and request.http_version not in ("HTTP/1.1", "HTTP/1.0"):
            raise _VetoError(refusals.BAD_MESSAGE, "HTTP version")
        if self.context.client.alpn == b"h2" and not heads.is_sound(request.headers):
            raise _VetoError(refusals.BAD_MESSAGE, "control characters, or too many fields")
        if self.flow.response is not None:
            if request.stream:
                raise _VetoError(refusals.INTERNAL, "a response and a streamed request")
            return not head.end_stream
        granted = permit(self.flow).request
        if isinstance(granted, Transform):
            granted.claim(self)
            self._is_busy |= granted.may_wait
            # A body of no bytes is transformed as well: mitmproxy would send it as it is.
            head.end_stream = False
        elif isinstance(granted, Collect):
            if request.stream is not False:
                raise _VetoError(refusals.INTERNAL, "a body to be collected is streamed")
            self._request.collect, self._is_busy = granted, True
            return False  # it is judged when it has been collected
        elif granted is CLEAR and not head.end_stream and not request.stream:
            request.stream = True  # mitmproxy would collect it in memory
        self._body_follows = not head.end_stream
        self._check_request()
        return False

    def _after_responseheaders(self) -> None:
        head, response = _the(self._head, ResponseHeaders), _the(self.flow.response, Response)
        if response.status_code == 101:
            raise _VetoError(refusals.UPGRADE, "101")
        granted = permit(self.flow).response
        if isinstance(granted, Transform):
            if not self._may_have_body(response):
                raise _VetoError(refusals.INTERNAL, "a transform where no body comes")
            granted.claim(self)
            self._is_busy |= granted.may_wait
            head.end_stream = False
        elif isinstance(granted, Collect):
            if not self._may_have_body(response) or response.stream is not False:
                raise _VetoError(refusals.INTERNAL, "a body to be collected is streamed, or none comes")
            self._response.collect, self._is_busy = granted, True
            return
        elif granted is CLEAR and not head.end_stream and not response.stream:
            response.stream = True
        self._check_response(response)
        if not head.end_stream:
            self._frame_response(response)

    # ---- checks

    def _check_error(self) -> None:
        if self.flow.error is not None:
            if self.flow.error.msg == flows.Error.KILLED_MESSAGE:
                raise _VetoError(permit(self.flow).refusal or refusals.NO_PERMIT, "killed")
            raise _VetoError(refusals.BAD_MESSAGE, "invalid message")

    def _check_grant(self, leg: _Leg, granted: Grant | None, message: Message) -> None:
        self._check_error()
        if granted is None:
            raise _VetoError(permit(self.flow).refusal or refusals.NO_PERMIT, "no permit")
        if leg.started and granted is not leg.granted:
            raise _VetoError(refusals.INTERNAL, "the permit was exchanged in mid-body")
        if leg.collect is not None:
            self._check_collected(leg, granted, message)
        # Asking a class with abstract methods is slow; a leg that has started has asked.
        elif leg.transform is granted if leg.started else isinstance(granted, Transform):
            stream: object = message.stream
            if stream is not granted:
                raise _VetoError(refusals.INTERNAL, "the stream is not the permitted transform")
            if cast("Transform", granted).failure is not None:
                raise _VetoError(refusals.INTERNAL, "the transform has failed already")
        elif granted is not CLEAR:
            raise _VetoError(refusals.INTERNAL, "the permit is neither CLEAR nor a transform")
        elif message.stream is not True and message.stream is not False:
            raise _VetoError(refusals.INTERNAL, "permitted as it is, yet something would transform it")

    def _check_collected(self, leg: _Leg, granted: Grant, message: Message) -> None:
        if granted is not leg.collect:
            raise _VetoError(refusals.INTERNAL, "the permit was exchanged while the body was collected")
        if not leg.is_collected or leg.collect.approved is None:
            raise _VetoError(permit(self.flow).refusal or refusals.NO_PERMIT, "what was collected")
        if message.stream is not False or message.raw_content is not leg.collect.approved:
            raise _VetoError(refusals.INTERNAL, "what is to leave is not what was approved")

    def _check_request(self) -> None:
        request = self.flow.request
        granted = permit(self.flow).request
        self._check_grant(self._request, granted, request)
        framed = self._check_framing(self._request, granted, request)
        # HTTP/2 frames by itself; what came by it, the gate frames for HTTP/1. Else it does not guess.
        speaks_http2 = b"h2" in (self.context.client.alpn, self.context.server.alpn)
        if self._body_follows and not framed and not speaks_http2:
            raise _VetoError(refusals.INTERNAL, "unframed body")

    def _check_response(self, response: Response) -> None:
        granted = permit(self.flow).response
        self._check_grant(self._response, granted, response)
        self._check_framing(self._response, granted, response)

    def _check_framing(self, leg: _Leg, granted: Grant | None, message: Message) -> bool:
        """As `_check_framing` says; again only if there is something new to look at."""
        fields, known = message.headers.fields, leg.framing
        if leg.collect is not None:
            expected: int | None = len(leg.collect.approved or b"")
        else:
            expected = getattr(granted, "expected_out_bytes", None)  # CLEAR promises none
        is_same = known is not None and known[0] is fields and known[1] is granted and known[2] == expected
        if known is None or not is_same or type(fields) is not tuple:  # a list could be changed in place
            known = leg.framing = (fields, granted, expected, _check_framing(message, granted, expected))
        return known[3]

    def _may_have_body(self, response: Response) -> bool:
        return self.flow.request.method != "HEAD" and response.status_code not in (204, 304)

    def _frame_request(self) -> None:
        """What the upstream speaks is known only now. mitmproxy sends HTTP/2 bodies to HTTP/1 unframed."""
        headers = self.flow.request.headers
        if self.context.server.alpn == b"h2":
            headers.pop("transfer-encoding", None)
        elif "content-length" not in headers and "transfer-encoding" not in headers:
            if self._body_follows:
                headers["transfer-encoding"] = "chunked"
            elif self.flow.request.raw_content:
                headers["content-length"] = str(len(self.flow.request.raw_content))

    def _frame_response(self, response: Response) -> None:
        """A body that ends with its connection ends visibly only if it is chunked."""
        headers = response.headers
        if (
            self.context.client.alpn != b"h2"
            and self.flow.request.http_version != "HTTP/1.0"
            and "content-length" not in headers
            and "transfer-encoding" not in headers
        ):
            headers["transfer-encoding"] = "chunked"
            response.http_version = "HTTP/1.1"

    # ---- the judge

    def _judge(self, command: SendHttp) -> Commands:
        event = command.event
        if isinstance(event, ResponseProtocolError):
            self._refuse_for(event)
        if self.flow.request.data.method.upper() == b"CONNECT":
            yield from self._judge_connect(command)
        elif isinstance(event, RequestProtocolError):
            yield from self._cut_upstream(event)
        elif command.connection is self.context.client:
            yield from self._judge_response(command)
        else:
            yield from self._judge_request(command)

    def _judge_connect(self, command: SendHttp) -> Commands:
        event = command.event
        if isinstance(event, ResponseHeaders):
            status = event.response.status_code
            if 200 < status < 300 or status < 200:
                raise _VetoError(refusals.INTERNAL, f"CONNECT answered by {status}")
            self._head_left = True
        yield command

    def _judge_request(self, command: SendHttp) -> Commands:
        event, request, leg = command.event, self.flow.request, self._request
        granted = permit(self.flow).request
        if isinstance(event, RequestHeaders):
            self._check_request()
            declared = _declared_length(request)
            if event.end_stream and (isinstance(granted, Transform) or declared):
                raise _VetoError(refusals.INTERNAL, "a body was announced and none comes")
            leg.start(granted, declared)
            if leg.transform is not None and leg.transform.holds_head:
                leg.held_head = command
                return
        elif isinstance(event, RequestData):
            if not event.data:
                return  # would end a chunked body
            self._check_grant(leg, granted, request)
            self._check_held(leg, request)
            if leg.collect is not None and event.data is not leg.collect.approved:
                raise _VetoError(refusals.INTERNAL, "what leaves is not what was approved")
            if leg.completes(command, len(event.data)):
                return
            yield from self._release_head(leg)
        elif isinstance(event, RequestEndOfMessage):
            yield from self._release_last(leg)
            leg.ended = True
        elif isinstance(event, RequestTrailers):
            self._check_grant(leg, granted, request)
            if granted is not CLEAR:
                raise _VetoError(refusals.TRAILERS, "trailers")
        else:
            raise _VetoError(refusals.INTERNAL, f"unknown event {type(event).__name__}")
        if self._is_connected():
            yield command

    def _judge_response(self, command: SendHttp) -> Commands:
        event, leg = command.event, self._response
        if isinstance(event, ResponseHeaders):
            yield from self._judge_response_head(command, event)
            return
        response = _the(self.flow.response, Response)
        if self._request.started:
            self._check_grant(leg, permit(self.flow).response, response)
        if isinstance(event, ResponseData):
            if not event.data:
                return
            self._check_held(leg, response)
            if leg.collect is not None and event.data is not leg.collect.approved:
                raise _VetoError(refusals.INTERNAL, "what leaves is not what was approved")
            if leg.completes(command, len(event.data)):
                return
        elif isinstance(event, ResponseEndOfMessage):
            yield from self._release_last(leg)
            leg.ended = True
        elif isinstance(event, ResponseTrailers):
            if leg.granted is not CLEAR:
                raise _VetoError(refusals.TRAILERS, "trailers")
        else:
            raise _VetoError(refusals.INTERNAL, f"unknown event {type(event).__name__}")
        yield from self._release_head(leg)
        yield command

    def _check_held(self, leg: _Leg, message: Message) -> None:
        """A head that is held may have been changed: judge it again, and go by the length it declares now."""
        if leg.held_head is None or leg.transform is None:
            return
        known, fields, expected = leg.framing, message.headers.fields, leg.transform.expected_out_bytes
        if known is not None and known[0] is fields and known[2] == expected and type(fields) is tuple:
            return  # mostly: nothing has changed since the last check
        if leg is self._request:
            self._check_request()
        else:
            self._check_response(_the(message, Response))
        if not leg.sent_bytes:
            leg.declared_bytes = _declared_length(message)
        elif leg.declared_bytes != _declared_length(message):
            raise _VetoError(refusals.INTERNAL, "the length changed after the first output")

    def _release_head(self, leg: _Leg) -> Commands:
        if leg.held_head is None:
            return
        self._check_held(
            leg, self.flow.request if leg is self._request else _the(self.flow.response, Response)
        )
        head, leg.held_head = leg.held_head, None
        if leg is self._response:
            self._head_left = True
            yield head
        elif self._is_connected():
            yield head

    def _release_last(self, leg: _Leg) -> Commands:
        """The body is whole: check that, and let its last piece go."""
        message = self.flow.request if leg is self._request else _the(self.flow.response, Response)
        if self._request.started:  # else it is an addon's own answer
            granted = permit(self.flow).request if leg is self._request else permit(self.flow).response
            self._check_grant(leg, granted, message)
        self._check_held(leg, message)
        leg.check_end()
        last, leg.last = leg.last, None
        yield from self._release_head(leg)
        if last is not None and (leg is self._response or self._is_connected()):
            yield last

    def _judge_response_head(self, command: SendHttp, event: ResponseHeaders) -> Commands:
        response, leg = event.response, self._response
        if response.status_code < 200:
            if response.status_code != 100 or self._head_left:
                raise _VetoError(refusals.UPGRADE, f"status {response.status_code}")
            if self._request.collect is None:
                self._check_request()
            else:
                self._check_error()
            yield command
            client = self._client_connection()
            if isinstance(client, Http1Server):
                client.response = None  # mitmproxy takes the 100 for the response and would send no other
            return
        granted: Grant | None = CLEAR  # an addon's own answer to a request that never left
        if self._request.started:
            self._check_response(response)
            granted = permit(self.flow).response
        declared = _declared_length(response) if self._may_have_body(response) else 0
        if (
            event.end_stream
            and self._may_have_body(response)
            and (isinstance(granted, Transform) or declared)
        ):
            raise _VetoError(refusals.INTERNAL, "a body was announced and none comes")
        leg.start(granted, declared)
        if isinstance(granted, Transform) and granted.holds_head:
            leg.held_head = command
        else:
            self._head_left = True
            yield command

    def _refuse_for(self, event: ResponseProtocolError) -> None:
        """mitmproxy would answer by a page of its own, or close."""
        match event.code:
            case ErrorCode.GENERIC_CLIENT_ERROR | ErrorCode.DESTINATION_UNKNOWN:
                raise _VetoError(refusals.BAD_MESSAGE, event.code.name)
            case ErrorCode.REQUEST_VALIDATION_FAILED:
                raise _VetoError(refusals.BAD_MESSAGE, event.code.name)
            case ErrorCode.KILL:
                if self.flow.error is None or self.flow.error.msg != flows.Error.KILLED_MESSAGE:
                    raise _ClientGoneError
                raise _VetoError(permit(self.flow).refusal or refusals.NO_PERMIT, "killed")
            case _:
                raise _VetoError(refusals.UPSTREAM, event.code.name)

    # ---- how a flow ends badly

    def abandon(self, refusal: Refusal) -> None:
        """Every socket of this client is being aborted: let nothing out any more, and say so."""
        if self._over or self._response.ended or self.child_layer is not None or not hasattr(self, "flow"):
            return
        self._over = True
        self._fail_transforms()
        self._report(refusal)

    def _stop(self, refusal: Refusal | None) -> Commands:
        """End the flow on both sides; None: the client has gone."""
        self._over = True
        self.client_state = self.server_state = self.state_errored
        self._fail_transforms()
        flow = self.flow
        if flow.error is None:
            flow.error = flows.Error(refusal.code if refusal else "client disconnected")
        told = self._report(refusal) if refusal else None
        if self._request.started and not (self._request.ended and self._response_received):
            cancel = RequestProtocolError(self.stream_id, "aborted by the gate", ErrorCode.CANCEL)
            yield from self._cut_upstream(cancel)
        if told is None or self._is_client_gone():
            pass
        elif self._head_left:
            yield from self._cut_client()
        else:
            flow.response = _response_for(told, permit(flow).shape)
            yield from self._answer(flow.response, is_last=told in _LAST)
        yield from self._retire()
        if not self._error_hooked:
            self._error_hooked = True
            yield HttpErrorHook(flow)

    def _retire(self) -> Commands:
        """Nothing of this flow is wanted any more; pieces that still come are dropped where they are read."""
        self._over = True
        self._fail_transforms()
        self.flow.live = False
        yield DropStream(self.stream_id)

    def _fail_transforms(self) -> None:
        for leg in (self._request, self._response):
            if isinstance(leg.granted, Transform) and not leg.granted.finished:
                leg.granted.fail(RefusedError(refusals.INTERNAL))
            if leg.collect is not None:
                leg.collect.discard()

    def _report(self, refusal: Refusal) -> Refusal:
        """Returns what the client is told: another refusal where this one cannot be recorded."""
        if keeper := self._keeper():
            try:
                keeper.report(self.flow, refusal, bytes_sent=self._head_left)
            except Exception as error:  # noqa: BLE001 - it is refused already, and stays so
                log.error("refusal not recorded: %s", origin_of(error))  # noqa: TRY400
                return refusals.AUDIT_UNAVAILABLE
        return refusal

    def _cut_upstream(self, event: RequestProtocolError) -> Commands:
        if self._is_connected():
            if self.context.server.alpn != b"h2" and (keeper := self._keeper()):
                keeper.cut_on_close(self.context.server)
            yield SendHttp(event, self.context.server)

    def _cut_client(self) -> Commands:
        if self.context.client.alpn != b"h2" and (keeper := self._keeper()):
            keeper.cut_on_close(self.context.client)
        cut = ResponseProtocolError(self.stream_id, "aborted by the gate", ErrorCode.KILL)
        yield SendHttp(cut, self.context.client)

    def _answer_at_once(self) -> Commands:
        """The addon's own response, given in `requestheaders` while a body is to come."""
        self._over = True
        self.client_state = self.server_state = self.state_errored
        yield from self._answer(_the(self.flow.response, Response))
        yield from self._retire()

    def _answer(self, response: Response, *, is_last: bool = False) -> Commands:
        client, is_complete = self.context.client, self._is_request_complete()
        if (is_last or not is_complete) and client.alpn != b"h2":
            response.headers["connection"] = "close"
        content = response.raw_content if self.flow.request.method != "HEAD" else None
        self._head_left = True
        yield SendHttp(ResponseHeaders(self.stream_id, response, end_stream=not content), client)
        if content:
            yield SendHttp(ResponseData(self.stream_id, content), client)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), client)
        self._response.ended = True
        if not is_complete:
            yield from self._end_upload()

    def _end_upload(self) -> Commands:
        """The response is complete, the request is not: ask the client to stop, and give it LINGER_S."""
        client = self._client_connection()
        if isinstance(client, Http2Server) and not client.h2_conn.stream_buffers.get(self.stream_id):
            # RFC 9113, 8.1: the response stands, only the rest of the request is not wanted.
            client.h2_conn.reset_stream(self.stream_id, ErrorCodes.NO_ERROR)
            client.streams.pop(self.stream_id, None)
            # The stream is closed by now: this sends the frame, and settles what is owed for the stream.
            done = ResponseProtocolError(self.stream_id, "not wanted any more", ErrorCode.CANCEL)
            yield SendHttp(done, self.context.client)
        else:
            yield commands.RequestWakeup(LINGER_S)

    def _end_linger(self) -> Commands:
        client = self._client_connection()
        if self._is_request_complete() or client is None:
            return
        if isinstance(client, Http2Server):
            yield from self._cut_client()
        elif client.stream_id == self.stream_id:
            if keeper := self._keeper():
                keeper.cut_on_close(self.context.client)
            yield commands.CloseConnection(self.context.client)

    # ---- surroundings

    @contextlib.contextmanager
    def _peers_held(self) -> Iterator[None]:
        """What arrives while the stream is paused is queued without a limit: so nothing may arrive."""
        keeper = self._keeper()
        if keeper is None:
            yield
            return
        held: list[Connection] = []
        if self.context.client.alpn != b"h2":
            held.append(self.context.client)
        if self._request.started and self.context.server.alpn != b"h2":
            held.append(self.context.server)
        for connection in held:
            keeper.hold(connection)
        try:
            yield
        finally:
            for connection in held:
                keeper.release(connection)

    def _keeper(self) -> Keeper | None:
        return keeper_of(self.context.client.id)

    def _http_layer(self) -> http.HttpLayer:
        return _the(self.context.layers[self.context.layers.index(self) - 1], http.HttpLayer)

    def _client_connection(self) -> Http1Server | Http2Server | None:
        connection = self._http_layer().connections.get(self.context.client)
        return connection if isinstance(connection, Http1Server | Http2Server) else None

    def _is_client_gone(self) -> bool:
        return not self.context.client.state & ConnectionState.CAN_WRITE

    def _is_connected(self) -> bool:
        """The upstream connection is still known: it is forgotten once it has closed."""
        return self.context.server in self._http_layer().connections

    def _is_request_complete(self) -> bool:
        client = self._client_connection()
        if isinstance(client, Http1Server):
            return client.request_done or client.stream_id != self.stream_id
        if isinstance(client, Http2Server):
            stream = client.h2_conn.streams.get(self.stream_id)
            return stream is None or stream.state_machine.state not in (
                StreamState.OPEN,
                StreamState.HALF_CLOSED_LOCAL,
            )
        return True

    def _describe(self) -> str:
        """Method and host: paths and query strings may be the user's."""
        return f"{self.flow.request.method} {self.flow.request.pretty_host}"


def _the[T](value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise _VetoError(refusals.INTERNAL, f"{type(value).__name__} instead of {kind.__name__}")
    return value


def origin_of(error: BaseException) -> str:
    """Type of *error* and where it was raised; its text may quote a body."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else "unknown"
    return f"{type(error).__name__} in {where}"


def _declared_length(message: Message) -> int | None:
    value = message.headers.get("content-length")
    return None if value is None else int(value)


def _check_framing(message: Message, granted: Grant | None, expected_bytes: int | None) -> bool:
    """True if *message* says how its body ends."""
    lengths = message.headers.get_all("content-length")
    codings = message.headers.get_all("transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise _VetoError(refusals.INTERNAL, "ambiguous framing")
    if lengths:
        try:
            declared = validate.parse_content_length(lengths[0])
        except ValueError:
            raise _VetoError(refusals.INTERNAL, "invalid content-length") from None
        if granted is not CLEAR and expected_bytes != declared:
            raise _VetoError(refusals.INTERNAL, "content-length is not the length of what leaves")
    if codings and isinstance(granted, Collect):
        raise _VetoError(refusals.INTERNAL, "a collected body has a length")
    if codings and granted is not CLEAR and codings[0].strip().lower() != "chunked":
        raise _VetoError(refusals.INTERNAL, "a transfer coding besides chunked")
    return bool(lengths or codings)


def _response_for(refusal: Refusal, shape: Shape | None) -> Response:
    body, headers = refusal.body(), Headers([(n.encode(), v.encode()) for n, v in refusal.headers()])
    if shape is not None and (shaped := _shaped(refusal, shape)) is not None:
        body = shaped.body
        for name, value in shaped.fields:
            headers[name] = value
        headers["content-type"] = shaped.content_type
        headers["content-length"] = str(len(body))
        headers["sealgate-error"] = refusal.code
    now_s = time.time()
    reason = status_codes.RESPONSES.get(refusal.status, "").encode()
    return Response(b"HTTP/1.1", refusal.status, reason, headers, body, None, now_s, now_s)


def _shaped(refusal: Refusal, shape: Shape) -> Shaped | None:
    """The refusal in the client's dialect. None where that fails: it must be told all the same."""
    try:
        shaped = shape(refusal)
        if shaped is None:
            return None
        texts = [shaped.content_type, *(text for field in shaped.fields for text in field)]
        if type(shaped.body) is bytes and all(text.isascii() and text.isprintable() for text in texts):
            return shaped
    except Exception as error:  # noqa: BLE001 - whatever a profile raises
        log.error("refusal not shaped: %s", origin_of(error))  # noqa: TRY400
    return None
