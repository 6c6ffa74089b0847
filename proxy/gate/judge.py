"""Judges what mitmproxy wants to send for one flow: it leaves as it was permitted, or a VetoError is raised.

1. A request leaves when `permit.request` covers it, judged after `requestheaders`, before the connect, after
   the connect and at every piece; a response when `permit.response` covers it.
2. What leaves is framed (`framing`), and no more and no less of it than its leg allows (`leg`).
3. Trailers pass for CLEAR alone, between two HTTP/2 peers. With HTTP/1 on either side a response's are
   dropped (RFC 9110, 6.5), a request's refused.
4. 101 is never forwarded, 100 never sent to a request that is refused already.
5. A CONNECT sends nothing upstream and needs no permit: whatever comes through it meets the gate again, or
   the protocol whitelist.
"""

from collections.abc import Generator
from typing import Any

from mitmproxy import flow as flows
from mitmproxy.http import HTTPFlow, Message, Response
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import SendHttp
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
from mitmproxy.proxy.layers.http._http1 import Http1Server

from proxy import refusals
from proxy.gate import heads
from proxy.gate.failures import ClientGoneError, VetoError, the
from proxy.gate.framing import declared_length, frame_request, frame_response, may_have_body
from proxy.gate.leg import Leg, check_error
from proxy.gate.peers import Peers
from proxy.gate.permit import CLEAR, Collect, Grant, Transform, permit

type Commands = Generator[commands.Command, Any, None]


class Judge:
    """Of one stream. *owner* is whom a transform serves."""

    def __init__(self, context: Context, peers: Peers, owner: object) -> None:
        self._context = context
        self._peers = peers
        self._owner = owner
        self.request = Leg()
        self.response = Leg()
        self.is_busy = False
        """More may be to do with a piece of a body than to feed it: ask for its `busy_leg`."""
        self.head_left = False
        """A part of the final response has been given to the client connection."""
        self._body_follows = False  # of the request, as it will be sent

    # ---- what comes in

    def busy_leg(self, event: events.Event) -> Leg | None:
        """The leg of this piece of a body, or its end, if more is to be done than to feed it."""
        if isinstance(event, (RequestData, RequestEndOfMessage)):
            leg = self.request
        elif isinstance(event, (ResponseData, ResponseEndOfMessage)):
            leg = self.response
        else:
            return None
        is_pending = leg.transform is not None and leg.transform.pending
        return leg if is_pending or leg.collect is not None else None

    def takes_trailers(self, event: RequestTrailers | ResponseTrailers) -> bool:
        """False: they are dropped."""
        is_request = isinstance(event, RequestTrailers)
        leg = self.request if is_request else self.response
        is_http2 = self._context.client.alpn == self._context.server.alpn == b"h2"
        if leg.granted is not CLEAR or (is_request and not is_http2):
            raise VetoError(refusals.TRAILERS, "trailers")
        return is_http2

    # ---- what the hooks have decided

    def after_requestheaders(self, flow: HTTPFlow, head: RequestHeaders) -> bool:
        """True if a local answer is due now, before the body."""
        request = flow.request
        check_error(flow)
        if self._context.client.alpn != b"h2" and request.http_version not in ("HTTP/1.1", "HTTP/1.0"):
            raise VetoError(refusals.BAD_MESSAGE, "HTTP version")
        if self._context.client.alpn == b"h2" and not heads.is_sound(request.headers):
            raise VetoError(refusals.BAD_MESSAGE, "control characters, or too many fields")
        if flow.response is not None:
            if request.stream:
                raise VetoError(refusals.INTERNAL, "a response and a streamed request")
            return not head.end_stream
        granted = permit(flow).request
        if isinstance(granted, Transform):
            granted.claim(self._owner)
            self.is_busy |= granted.may_wait
            # A body of no bytes is transformed as well: mitmproxy would send it as it is.
            head.end_stream = False
        elif isinstance(granted, Collect):
            if request.stream is not False:
                raise VetoError(refusals.INTERNAL, "a body to be collected is streamed")
            self.request.collect, self.is_busy = granted, True
            return False  # it is judged when it has been collected
        elif granted is CLEAR and not head.end_stream and not request.stream:
            request.stream = True  # mitmproxy would collect it in memory
        self._body_follows = not head.end_stream
        self._check_request(flow)
        return False

    def after_request(self) -> None:
        if self.request.collect is not None:
            self.request.is_collected = True
            self._body_follows = bool(self.request.collect.approved)

    def before_connect(self, flow: HTTPFlow) -> None:
        self._check_request(flow)

    def after_connect(self, flow: HTTPFlow) -> None:
        self._check_request(flow)
        frame_request(flow.request, self._context, body_follows=self._body_follows)

    def after_responseheaders(self, flow: HTTPFlow, head: ResponseHeaders) -> None:
        response = the(flow.response, Response)
        if response.status_code == 101:
            raise VetoError(refusals.UPGRADE, "101")
        granted = permit(flow).response
        if isinstance(granted, Transform):
            if not may_have_body(flow, response):
                raise VetoError(refusals.INTERNAL, "a transform where no body comes")
            granted.claim(self._owner)
            self.is_busy |= granted.may_wait
            head.end_stream = False
        elif isinstance(granted, Collect):
            if not may_have_body(flow, response) or response.stream is not False:
                raise VetoError(refusals.INTERNAL, "a body to be collected is streamed, or none comes")
            self.response.collect, self.is_busy = granted, True
            return
        elif granted is CLEAR and not head.end_stream and not response.stream:
            response.stream = True
        self._check_response(flow, response)
        if not head.end_stream:
            frame_response(response, flow.request, self._context)

    def after_response(self) -> None:
        if self.response.collect is not None:
            self.response.is_collected = True

    # ---- what goes out

    def fail(self) -> None:
        """The flow was aborted."""
        self.request.fail()
        self.response.fail()

    def judge(self, flow: HTTPFlow, command: SendHttp) -> Commands:
        """What may leave for *command*, now: itself, what was held back before it, or nothing yet."""
        event = command.event
        if isinstance(event, ResponseProtocolError):
            self._refuse_for(flow, event)
        if flow.request.data.method.upper() == b"CONNECT":
            yield from self._judge_connect(command)
        elif isinstance(event, RequestProtocolError):
            yield from self._peers.cut_upstream(event)
        elif command.connection is self._context.client:
            yield from self._judge_response(flow, command)
        else:
            yield from self._judge_request(flow, command)

    def release_last(self, flow: HTTPFlow, leg: Leg) -> Commands:
        """The body is whole: check that, and let its last piece go."""
        message = flow.request if leg is self.request else the(flow.response, Response)
        if self.request.started:  # else it is an addon's own answer
            granted = permit(flow).request if leg is self.request else permit(flow).response
            leg.check_grant(flow, granted, message)
        if leg.held_head is not None:
            self._check_held(flow, leg, message)
        leg.check_end()
        last, leg.last = leg.last, None
        yield from self._release_head(flow, leg)
        if last is not None and (leg is self.response or self._peers.is_connected()):
            yield last

    def _check_request(self, flow: HTTPFlow) -> None:
        request = flow.request
        granted = permit(flow).request
        self.request.check_grant(flow, granted, request)
        framed = self.request.is_framed(granted, request)
        # HTTP/2 frames by itself; what came by it, the gate frames for HTTP/1. Else it does not guess.
        speaks_http2 = b"h2" in (self._context.client.alpn, self._context.server.alpn)
        if self._body_follows and not framed and not speaks_http2:
            raise VetoError(refusals.INTERNAL, "unframed body")

    def _check_response(self, flow: HTTPFlow, response: Response) -> None:
        granted = permit(flow).response
        self.response.check_grant(flow, granted, response)
        self.response.is_framed(granted, response)

    def _check_held(self, flow: HTTPFlow, leg: Leg, message: Message) -> None:
        """A head that is held may have been changed: judge it again, and go by the length it declares now."""
        if not leg.is_held_head_changed(message):
            return
        if leg is self.request:
            self._check_request(flow)
        else:
            self._check_response(flow, the(message, Response))
        leg.redeclare(message)

    def _release_head(self, flow: HTTPFlow, leg: Leg) -> Commands:
        if leg.held_head is None:
            return
        self._check_held(flow, leg, flow.request if leg is self.request else the(flow.response, Response))
        head, leg.held_head = leg.held_head, None
        if leg is self.response:
            self.head_left = True
            yield head
        elif self._peers.is_connected():
            yield head

    def _judge_connect(self, command: SendHttp) -> Commands:
        event = command.event
        if isinstance(event, ResponseHeaders):
            status = event.response.status_code
            if 200 < status < 300 or status < 200:
                raise VetoError(refusals.INTERNAL, f"CONNECT answered by {status}")
            self.head_left = True
        yield command

    def _judge_request(self, flow: HTTPFlow, command: SendHttp) -> Commands:
        event, request, leg = command.event, flow.request, self.request
        granted = permit(flow).request
        if isinstance(event, RequestHeaders):
            self._check_request(flow)
            declared = declared_length(request)
            if event.end_stream and (isinstance(granted, Transform) or declared):
                raise VetoError(refusals.INTERNAL, "a body was announced and none comes")
            leg.start(granted, declared)
            if leg.transform is not None and leg.transform.holds_head:
                leg.held_head = command
                return
        elif isinstance(event, RequestData):
            if not event.data:
                return  # would end a chunked body
            leg.check_grant(flow, granted, request)
            if leg.held_head is not None:
                self._check_held(flow, leg, request)
            if leg.collect is not None and event.data is not leg.collect.approved:
                raise VetoError(refusals.INTERNAL, "what leaves is not what was approved")
            if leg.completes(command, len(event.data)):
                return
            if leg.held_head is not None:
                yield from self._release_head(flow, leg)
        elif isinstance(event, RequestEndOfMessage):
            yield from self.release_last(flow, leg)
            leg.ended = True
        elif isinstance(event, RequestTrailers):
            leg.check_grant(flow, granted, request)
            if granted is not CLEAR:
                raise VetoError(refusals.TRAILERS, "trailers")
        else:
            raise VetoError(refusals.INTERNAL, f"unknown event {type(event).__name__}")
        if self._peers.is_connected():
            yield command

    def _judge_response(self, flow: HTTPFlow, command: SendHttp) -> Commands:
        event, leg = command.event, self.response
        if isinstance(event, ResponseHeaders):
            yield from self._judge_response_head(flow, command, event)
            return
        response = the(flow.response, Response)
        if self.request.started:
            leg.check_grant(flow, permit(flow).response, response)
        if isinstance(event, ResponseData):
            if not event.data:
                return
            if leg.held_head is not None:
                self._check_held(flow, leg, response)
            if leg.collect is not None and event.data is not leg.collect.approved:
                raise VetoError(refusals.INTERNAL, "what leaves is not what was approved")
            if leg.completes(command, len(event.data)):
                return
        elif isinstance(event, ResponseEndOfMessage):
            yield from self.release_last(flow, leg)
            leg.ended = True
        elif isinstance(event, ResponseTrailers):
            if leg.granted is not CLEAR:
                raise VetoError(refusals.TRAILERS, "trailers")
        else:
            raise VetoError(refusals.INTERNAL, f"unknown event {type(event).__name__}")
        if leg.held_head is not None:
            yield from self._release_head(flow, leg)
        yield command

    def _judge_response_head(self, flow: HTTPFlow, command: SendHttp, event: ResponseHeaders) -> Commands:
        response, leg = event.response, self.response
        if response.status_code < 200:
            if response.status_code != 100 or self.head_left:
                raise VetoError(refusals.UPGRADE, f"status {response.status_code}")
            if self.request.collect is None:
                self._check_request(flow)
            else:
                check_error(flow)
            yield command
            client = self._peers.client_connection()
            if isinstance(client, Http1Server):
                client.response = None  # mitmproxy takes the 100 for the response and would send no other
            return
        granted: Grant | None = CLEAR  # an addon's own answer to a request that never left
        if self.request.started:
            self._check_response(flow, response)
            granted = permit(flow).response
        has_body = may_have_body(flow, response)
        declared = declared_length(response) if has_body else 0
        if event.end_stream and has_body and (isinstance(granted, Transform) or declared):
            raise VetoError(refusals.INTERNAL, "a body was announced and none comes")
        leg.start(granted, declared)
        if isinstance(granted, Transform) and granted.holds_head:
            leg.held_head = command
        else:
            self.head_left = True
            yield command

    @staticmethod
    def _refuse_for(flow: HTTPFlow, event: ResponseProtocolError) -> None:
        """mitmproxy would answer by a page of its own, or close."""
        match event.code:
            case ErrorCode.GENERIC_CLIENT_ERROR | ErrorCode.DESTINATION_UNKNOWN:
                raise VetoError(refusals.BAD_MESSAGE, event.code.name)
            case ErrorCode.REQUEST_VALIDATION_FAILED:
                raise VetoError(refusals.BAD_MESSAGE, event.code.name)
            case ErrorCode.KILL:
                if flow.error is None or flow.error.msg != flows.Error.KILLED_MESSAGE:
                    raise ClientGoneError
                raise VetoError(permit(flow).refusal or refusals.NO_PERMIT, "killed")
            case _:
                raise VetoError(refusals.UPSTREAM, event.code.name)
