"""What may pass the gate, and as what: the words between the addon (decides) and the gate (enforces).

1. The addon can only permit. What it forgot, or raised out of, is refused below it by code without policy.
2. A permit names the very object that makes the body. The gate compares identities at every piece, both ways.
3. A transform that has failed stays failed; one that has finished takes nothing more; it serves one message.
4. Not a byte beyond the promised length leaves a transform, and it does not finish before that length.
5. A body that is collected leaves as the very `bytes` object that was approved after its end, or not at all.

This module knows nothing of mitmproxy: bodies and planner build on it, the gate checks against it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Protocol, cast, final, override

from envelope.errors import MisuseError
from proxy import refusals
from proxy.refusals import Refusal, RefusedError, Shaped

type Piece = bytes | bytearray | memoryview
"""One buffer of a body. A bytearray or memoryview must not be changed once it was handed over."""

_KEY: Final = "sealgate.permit"


@final
class Clear:
    """The message may pass as it is. Never a default: `CLEAR` is the only instance and is set by a rule."""

    __slots__ = ()

    @override
    def __repr__(self) -> str:
        return "CLEAR"


CLEAR: Final = Clear()


class TransformError(Exception):
    """A transform was misused or broke its own promise; the gate cuts the message."""


class Transform(ABC):
    """Makes the body that leaves out of the body that comes: `feed` per piece, then `finish` once.

    Set the same object as `flow.request.stream` (or `flow.response.stream`) and in the permit. Subclasses
    implement `feed` and `finish`; both return buffers (empty ones are dropped) and never wait. They may raise
    `RefusedError` to choose what the client is told, if anything can be told still; whatever else they raise
    is answered by `refusals.INTERNAL`. Either way not a byte more of the message leaves.
    """

    expected_out_bytes: int | None = None
    """Exact size of the whole output, where it is known: then it is also the Content-Length."""

    holds_head: bool = False
    """The message's head waits until the first output, or the end: a refusal raised on the first bytes of an
    object is still a proper answer, and the length may be found out in the body: `expected_out_bytes` and
    Content-Length may be changed together until then. Bytes are not collected meanwhile: they are fed."""

    may_wait: bool = False
    """Whether it may become `pending`; True from the beginning, or never."""

    pending: bool = False
    """True: the gate awaits `settle` before it feeds the next piece, or the end. It reads nothing then."""

    _out_bytes: int = 0
    _finished: bool = False
    _failure: BaseException | None = None
    _owner: object | None = None

    @abstractmethod
    def feed(self, piece: bytes) -> list[Piece]:
        """Take *piece* (not empty); return what it completes, possibly nothing."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """The body has ended properly; return the rest."""

    async def settle(self) -> None:
        """Find out what nothing can be made without; set `pending` to False. May raise as `feed`."""
        raise MisuseError("this transform waits for nothing")

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def failure(self) -> BaseException | None:
        """What ended this transform, or None."""
        return self._failure

    @property
    def out_bytes(self) -> int:
        """Bytes handed out so far."""
        return self._out_bytes

    @final
    def claim(self, owner: object) -> None:
        """Bind to the one message *owner* stands for; MisuseError if it serves another already."""
        if self._owner is not None and self._owner is not owner:
            raise MisuseError("a transform serves one message")
        self._owner = owner

    @final
    def fail(self, reason: BaseException) -> None:
        """The message was aborted: take nothing more. The first reason stays."""
        if self._failure is None:
            self._failure = reason

    @final
    def __call__(self, piece: bytes) -> list[bytes]:
        """mitmproxy's streaming protocol: a piece of the body, or b"" once, at its proper end.

        The list may hold other buffers than bytes; mitmproxy takes them and its annotations do not say so.
        """
        if self._failure is not None:
            raise TransformError("the transform has failed already") from self._failure
        if self._finished:
            raise TransformError("a piece after the end")
        try:
            pieces = self._checked(self.feed(piece) if piece else self.finish())
            if not piece:
                if self.expected_out_bytes is not None and self._out_bytes != self.expected_out_bytes:
                    raise TransformError(f"made {self._out_bytes} of {self.expected_out_bytes} bytes")  # noqa: TRY301
                self._finished = True
        except BaseException as failure:
            self._failure = failure
            raise
        return cast("list[bytes]", pieces)

    def _checked(self, pieces: object) -> list[Piece]:
        # A coroutine, a string or a bare bytearray would be taken apart by mitmproxy into something else.
        if not isinstance(pieces, list):
            raise TransformError(f"a transform returns a list, not {type(pieces).__name__}")
        checked: list[Piece] = []
        for item in pieces:
            if isinstance(item, memoryview):
                if not (item.c_contiguous and item.itemsize == 1 and item.ndim == 1):
                    raise TransformError("a memoryview must be flat bytes")
            elif not isinstance(item, bytes | bytearray):
                raise TransformError(f"a transform returns bytes, not {type(item).__name__}")
            if len(item):
                self._out_bytes += len(item)
                checked.append(item)
        if self.expected_out_bytes is not None and self._out_bytes > self.expected_out_bytes:
            raise TransformError(f"made more than the promised {self.expected_out_bytes} bytes")
        return checked


class Collect:
    """Permits a body to be read into memory, at most *limit_bytes*, and what is approved to leave for it.

    For a request the hook `request` approves, or sets a response; for a response the hook `response` does.
    Content-Length must be set there as well. Subclasses may put the pieces elsewhere (`_take`).
    """

    def __init__(self, limit_bytes: int, *, too_large: Refusal = refusals.TOO_LARGE) -> None:
        self._limit_bytes = limit_bytes
        self._too_large = too_large
        self._pieces: list[bytes] = []
        self._in_bytes = 0
        self._approved: bytes | None = None

    @property
    def in_bytes(self) -> int:
        """Bytes that have come so far."""
        return self._in_bytes

    @property
    def approved(self) -> bytes | None:
        """What may leave; None: nothing."""
        return self._approved

    @final
    def take(self, piece: bytes) -> None:
        """One piece of the body that comes. RefusedError beyond the limit."""
        self._in_bytes += len(piece)
        if self._in_bytes > self._limit_bytes or self._approved is not None:
            raise RefusedError(self._too_large)
        self._take(piece)

    def _take(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def body(self) -> bytes:
        """All that has come."""
        self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    @final
    def approve(self, body: bytes) -> None:
        """Let *body* leave: this object, set as the message's `raw_content`. MisuseError: twice."""
        if self._approved is not None or type(body) is not bytes:
            raise MisuseError("one body of bytes is approved, once")
        self._approved = body

    def discard(self) -> None:
        """The message was aborted: let go of what was collected."""
        self._pieces = []


type Grant = Clear | Transform | Collect

type Shape = Callable[[Refusal], Shaped | None]
"""A refusal in the client's dialect. None: as it is. It may fail."""


class Permit:
    """What may happen to one flow. None refuses: the state in which every flow begins."""

    __slots__ = ("_revoked", "refusal", "request", "response", "shape")

    def __init__(self) -> None:
        self._revoked = False
        self.request: Grant | None = None
        """Decided in `requestheaders`: the request's body (and its trailers, for CLEAR alone)."""
        self.response: Grant | None = None
        """Decided in `responseheaders`, never earlier: it is reset before that hook."""
        self.refusal: Refusal | None = None
        """What the client is told while it is not permitted; None: `refusals.NO_PERMIT`."""
        self.shape: Shape | None = None

    @property
    def revoked(self) -> bool:
        return self._revoked

    def revoke(self, refusal: Refusal) -> None:
        """Take everything back for good: a hook of this flow has failed."""
        self._revoked = True
        self.request = self.response = None
        self.refusal = self.refusal or refusal


class HasMetadata(Protocol):
    """The part of mitmproxy's flow a permit hangs on."""

    metadata: dict[str, Any]


def permit(flow: HasMetadata) -> Permit:
    """The permit of *flow*: the one it has, or a new one that refuses."""
    existing = flow.metadata.get(_KEY)
    if type(existing) is Permit:  # asked some twenty times for each request
        return existing
    fresh = flow.metadata[_KEY] = Permit()
    return fresh
