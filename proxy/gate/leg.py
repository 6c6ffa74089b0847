"""One direction of a flow: what was granted for it, what has left, and whether that is the same.

1. The permit and the stream object are compared by identity with what they were at the head, at every piece.
2. No more and no fewer bytes leave than the head declared. The piece that completes a declared length waits
   until the transform has finished and the hook after it has agreed.
3. A body that is collected leaves as the approved object, by identity.
4. A head that is held may change until it leaves; then it is checked again, and its length counts.
"""

from typing import cast

from mitmproxy import flow as flows
from mitmproxy.http import HTTPFlow, Message
from mitmproxy.proxy.layers.http import SendHttp

from proxy import refusals
from proxy.gate.failures import VetoError
from proxy.gate.framing import declared_length, is_framed
from proxy.gate.permit import CLEAR, Collect, Grant, Transform, permit
from proxy.refusals import RefusedError


def check_error(flow: HTTPFlow) -> None:
    """VetoError if an addon has killed *flow*, or mitmproxy found its message invalid."""
    if flow.error is not None:
        if flow.error.msg == flows.Error.KILLED_MESSAGE:
            raise VetoError(permit(flow).refusal or refusals.NO_PERMIT, "killed")
        raise VetoError(refusals.BAD_MESSAGE, "invalid message")


class Leg:
    """Every check of it raises VetoError."""

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
            raise VetoError(refusals.INTERNAL, "the body outgrows its declared length")
        self.last = piece
        return True

    def check_end(self) -> None:
        if isinstance(self.granted, Transform):
            if not self.granted.finished:
                raise VetoError(refusals.INTERNAL, "the message ends before its transform has finished")
            if self.sent_bytes != self.granted.out_bytes:
                raise VetoError(refusals.INTERNAL, "what left is not what the transform made")
        if self.declared_bytes is not None and self.sent_bytes != self.declared_bytes:
            raise VetoError(refusals.INTERNAL, "the body ends before its declared length")

    def check_grant(self, flow: HTTPFlow, granted: Grant | None, message: Message) -> None:
        """*granted*, by the permit as it is now, covers *message* as it is now."""
        check_error(flow)
        if granted is None:
            raise VetoError(permit(flow).refusal or refusals.NO_PERMIT, "no permit")
        if self.started and granted is not self.granted:
            raise VetoError(refusals.INTERNAL, "the permit was exchanged in mid-body")
        if self.collect is not None:
            self._check_collected(flow, granted, message)
        # Asking a class with abstract methods is slow; a leg that has started has asked.
        elif self.transform is granted if self.started else isinstance(granted, Transform):
            stream: object = message.stream
            if stream is not granted:
                raise VetoError(refusals.INTERNAL, "the stream is not the permitted transform")
            if cast("Transform", granted).failure is not None:
                raise VetoError(refusals.INTERNAL, "the transform has failed already")
        elif granted is not CLEAR:
            raise VetoError(refusals.INTERNAL, "the permit is neither CLEAR nor a transform")
        elif message.stream is not True and message.stream is not False:
            raise VetoError(refusals.INTERNAL, "permitted as it is, yet something would transform it")

    def _check_collected(self, flow: HTTPFlow, granted: Grant, message: Message) -> None:
        if granted is not self.collect:
            raise VetoError(refusals.INTERNAL, "the permit was exchanged while the body was collected")
        if not self.is_collected or self.collect.approved is None:
            raise VetoError(permit(flow).refusal or refusals.NO_PERMIT, "what was collected")
        if message.stream is not False or message.raw_content is not self.collect.approved:
            raise VetoError(refusals.INTERNAL, "what is to leave is not what was approved")

    def is_framed(self, granted: Grant | None, message: Message) -> bool:
        """As `framing.is_framed` says; asked again only if there is something new to look at."""
        fields, known = message.headers.fields, self.framing
        if self.collect is not None:
            expected: int | None = len(self.collect.approved or b"")
        else:
            expected = getattr(granted, "expected_out_bytes", None)  # CLEAR promises none
        is_same = known is not None and known[0] is fields and known[1] is granted and known[2] == expected
        if known is None or not is_same or type(fields) is not tuple:  # a list could be changed in place
            known = self.framing = (fields, granted, expected, is_framed(message, granted, expected))
        return known[3]

    def is_held_head_changed(self, message: Message) -> bool:
        """Whether the head of *message* waits here, and may differ from what was checked last."""
        if self.held_head is None or self.transform is None:
            return False
        known, fields, expected = self.framing, message.headers.fields, self.transform.expected_out_bytes
        # Mostly: nothing has changed.
        return not (
            known is not None and known[0] is fields and known[2] == expected and type(fields) is tuple
        )

    def redeclare(self, message: Message) -> None:
        """The held head has been checked again: go by the length it declares now."""
        if not self.sent_bytes:
            self.declared_bytes = declared_length(message)
        elif self.declared_bytes != declared_length(message):
            raise VetoError(refusals.INTERNAL, "the length changed after the first output")

    def fail(self) -> None:
        """The message was aborted: its transform takes nothing more, what was collected is let go of."""
        if isinstance(self.granted, Transform) and not self.granted.finished:
            self.granted.fail(RefusedError(refusals.INTERNAL))
        if self.collect is not None:
            self.collect.discard()
