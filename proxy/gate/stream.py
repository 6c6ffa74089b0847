"""The guarded state machine of one HTTP flow: nothing leaves it that the addon has not permitted.

mitmproxy's `HttpStream` decides what to send; `GuardedStream` sees each command before it leaves, has it
judged (`judge`), and lets it pass or ends the flow. The rules:

1. A flow begins refused. What a hook has decided is judged right after it, before anything else happens.
2. A refused upload is answered at once and not read.
3. Before the head of the response has left, a refusal is a proper answer; after that there is only the cut
   (`peers`).
4. An aborted body has no end: the upstream socket is reset, or its stream.
5. A CONNECT is refused by `permit.refusal`, by a non-2xx `flow.response`, or by a hook of it that fails.
6. A response set by an addon in `requestheaders` answers at once, without reading a body that is to come.
7. A body that is collected never reaches mitmproxy's buffers: it ends up in its `Collect`, within the limit.
8. While a transform is pending its `settle` is awaited before anything more is fed to it.
"""

import logging
from collections.abc import Generator
from typing import Any, Final, override

from mitmproxy import flow as flows
from mitmproxy.http import Response
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http import DropStream, SendHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    RequestData,
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

from proxy import refusals
from proxy.gate import answers
from proxy.gate.failures import ClientGoneError, VetoError, described, origin_of, the
from proxy.gate.judge import Judge
from proxy.gate.keeper import SettleHook
from proxy.gate.leg import Leg
from proxy.gate.peers import Peers
from proxy.gate.permit import permit
from proxy.refusals import Refusal, RefusedError

type Commands = Generator[commands.Command, Any, None]

log = logging.getLogger(__name__)
_engine_log: Final = logging.getLogger("mitmproxy.proxy.server")
"""Where `commands.Log` end up."""


class GuardedStream(http.HttpStream):
    """Stands in for `mitmproxy.proxy.layers.http.HttpStream`."""

    def __init__(self, context: Context, stream_id: int) -> None:
        super().__init__(context, stream_id)
        self._peers = Peers(context, self, stream_id)
        self._judge = Judge(context, self._peers, owner=self)
        self._over = False  # nothing is let out any more
        self._head: RequestHeaders | ResponseHeaders | None = None  # of the message whose hook comes next
        self._response_received = False
        self._error_hooked = False
        self._is_given_up = False

    @property
    def is_under_way(self) -> bool:
        return self.child_layer is None and hasattr(self, "flow") and self.flow.live

    @property
    def waits_for_service(self) -> bool:
        return self._judge.request.ended and self.flow.response is None and not self._is_given_up

    def give_up(self) -> None:
        self._is_given_up = True

    # ---- what comes in

    @override
    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, events.Wakeup):
            yield from self._peers.end_linger()
        elif not self._over:
            if isinstance(event, (RequestHeaders, ResponseHeaders)):
                self._head = event
            elif isinstance(event, ResponseEndOfMessage):
                self._response_received = True
            if isinstance(event, RequestHeaders) and (keeper := self._peers.keeper()):
                keeper.adopt(self)
            if isinstance(event, (RequestTrailers, ResponseTrailers)):
                yield from self._guard(self._take_trailers(event))
            elif self._judge.is_busy and (leg := self._judge.busy_leg(event)) is not None:
                yield from self._guard(self._take_body(leg, event))
            else:
                yield from self._guard(super()._handle_event(event))

    def _take_body(self, leg: Leg, event: events.Event) -> Commands:
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
                raise VetoError(refusals.INTERNAL, "a transform is pending still")
        yield from super()._handle_event(event)

    def _take_trailers(self, event: RequestTrailers | ResponseTrailers) -> Commands:
        if self._judge.takes_trailers(event):
            yield from super()._handle_event(event)

    @override
    def make_server_connection(self) -> Generator[commands.Command, Any, bool]:
        self._judge.before_connect(self.flow)
        if not (yield from super().make_server_connection()):
            return False
        self._judge.after_connect(self.flow)
        return True

    @override
    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Commands:
        if isinstance(event, ResponseProtocolError):
            if self._peers.is_client_gone():
                raise ClientGoneError  # the connect was cancelled because of that
            if self.server_state != self.state_done:
                # Messages of HTTP errors quote what the peer sent; those of connects are mitmproxy's own.
                detail = event.message if event.code is ErrorCode.CONNECT_FAILED else event.code.name
                raise VetoError(refusals.IDLE if self._is_given_up else refusals.UPSTREAM, detail)
            # Answered early, and now the origin has gone: the rest of the upload has nowhere to go.
            if not self._judge.response.ended:
                yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
            yield from self._retire()
            if not self._peers.is_request_complete():
                yield from self._peers.end_upload()
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
                        yield from self._judge.judge(self.flow, command)
                    continue
                if isinstance(command, commands.Log) and not _engine_log.isEnabledFor(command.level):
                    continue  # two for each flow, which all layers would hand up
                if command.blocking:
                    if isinstance(command, HttpResponseHeadersHook):
                        # Decided for the response that is here, not in advance.
                        permit(self.flow).response = permit(self.flow).refusal = None
                    if not self._is_answered_now(command):
                        with self._peers.held(server=self._judge.request.started):
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
                        if isinstance(command, HttpResponseHook) and self._judge.response.last is not None:
                            yield from self._judge.release_last(self.flow, self._judge.response)
                else:
                    yield command
            except StopIteration:
                return
            except RefusedError as refused:
                stock.close()
                cause = getattr(refused, "cause", "by the transform")
                log.info("refused %s: %s (%s)", described(self.flow.request), refused.refusal.code, cause)
                yield from self._stop(refused.refusal)
                return
            except ClientGoneError:
                stock.close()
                yield from self._stop(None)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the flow must not go on
                stock.close()
                # Never the text: mitmproxy's assertions quote the body.
                log.error("aborted %s: %s", described(self.flow.request), origin_of(error))  # noqa: TRY400
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
            client = self._peers.client_connection()
            if getattr(client, "is_sending", True):  # of `http1`
                return False
        keeper = self._peers.keeper()
        return keeper is not None and keeper.begin(command)

    def _answers_after(self, hook: commands.StartHook) -> bool:
        """Judge what *hook* has decided; True if a local answer is due now, before the body."""
        if isinstance(hook, HttpErrorHook):
            self._error_hooked = True
            return False
        decided = permit(self.flow)
        if decided.revoked:
            raise VetoError(decided.refusal or refusals.INTERNAL, f"the hook {hook.name} failed")
        if isinstance(hook, HttpRequestHeadersHook):
            return self._judge.after_requestheaders(self.flow, the(self._head, RequestHeaders))
        if isinstance(hook, HttpResponseHeadersHook):
            if self._judge.request.started:  # else it is an addon's own answer
                self._judge.after_responseheaders(self.flow, the(self._head, ResponseHeaders))
        elif isinstance(hook, HttpRequestHook):
            self._judge.after_request()
        elif isinstance(hook, HttpResponseHook):
            self._judge.after_response()
        elif isinstance(hook, HttpConnectHook) and decided.refusal is not None:
            raise VetoError(decided.refusal, "CONNECT")
        return False

    # ---- how a flow ends badly

    def abandon(self, refusal: Refusal) -> None:
        if (
            self._over
            or self._judge.response.ended
            or self.child_layer is not None
            or not hasattr(self, "flow")
        ):
            return
        self._over = True
        self._judge.fail()
        self._report(refusal)

    def _stop(self, refusal: Refusal | None) -> Commands:
        """End the flow on both sides; None: the client has gone."""
        self._over = True
        self.client_state = self.server_state = self.state_errored
        self._judge.fail()
        flow = self.flow
        if flow.error is None:
            flow.error = flows.Error(refusal.code if refusal else "client disconnected")
        told = self._report(refusal) if refusal else None
        if self._judge.request.started and not (self._judge.request.ended and self._response_received):
            cancel = RequestProtocolError(self.stream_id, "aborted by the gate", ErrorCode.CANCEL)
            yield from self._peers.cut_upstream(cancel)
        if told is None or self._peers.is_client_gone():
            pass
        elif self._judge.head_left:
            yield from self._peers.cut_client()
        else:
            flow.response = answers.response_for(told, permit(flow).shape)
            yield from self._answer(flow.response, is_last=told in answers.LAST)
        yield from self._retire()
        if not self._error_hooked:
            self._error_hooked = True
            yield HttpErrorHook(flow)

    def _retire(self) -> Commands:
        """Nothing of this flow is wanted any more; pieces that still come are dropped where they are read."""
        self._over = True
        self._judge.fail()
        self.flow.live = False
        yield DropStream(self.stream_id)

    def _report(self, refusal: Refusal) -> Refusal:
        """Returns what the client is told: another refusal where this one cannot be recorded."""
        if keeper := self._peers.keeper():
            try:
                keeper.report(self.flow, refusal, bytes_sent=self._judge.head_left)
            except Exception as error:  # noqa: BLE001 - it is refused already, and stays so
                log.error("refusal not recorded: %s", origin_of(error))  # noqa: TRY400
                return refusals.AUDIT_UNAVAILABLE
        return refusal

    def _answer_at_once(self) -> Commands:
        """The addon's own response, given in `requestheaders` while a body is to come."""
        self._over = True
        self.client_state = self.server_state = self.state_errored
        yield from self._answer(the(self.flow.response, Response))
        yield from self._retire()

    def _answer(self, response: Response, *, is_last: bool = False) -> Commands:
        is_complete = self._peers.is_request_complete()
        self._judge.head_left = True
        yield from self._peers.answer(response, self.flow.request, closes=is_last or not is_complete)
        self._judge.response.ended = True
        if not is_complete:
            yield from self._peers.end_upload()
