"""What is to happen to one request: the words between planner, profiles and addon.

1. A plan is a value. It is made from the head of a message alone, before a byte of its body moves.
2. There is no plan "as it came": each names every change to the head, and what the body must be.
3. A request's plan says what its answer has to be; an answer is never planned without it (answer_plan.py).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from envelope.objects import Sealer
from proxy.asking import Signer
from proxy.messages.message import AnswerHead, ByteRange, ExpectedDigest
from proxy.plans.conversing import Conversation, PartOf, Reply, Sealed
from proxy.plans.request import Edits
from proxy.refusals import Refusal

# What plans are made of.


class EmptyBody(Enum):
    """What an upload of no bytes at all becomes."""

    SEAL = "seal"  # an empty object: 104 stored bytes
    KEEP = "keep"  # nothing: there was no object in it


class Decoder(Protocol):
    """Undoes a coding of an upload's body before it is sealed (aws-chunked, say), and verifies as it goes.

    RefusedError for what is not well formed, or does not verify; then nothing valid is stored.
    """

    def feed(self, piece: bytes) -> bytes:
        """The plaintext that *piece* completes, possibly none."""

    def finish(self) -> bytes:
        """The body has ended: the rest. Whatever was still to verify must have, or this raises."""


class Reshaper(Protocol):
    """Makes a body that is not simply one object: a form with sealed files in it, several messages."""

    out_bytes: int | None
    """Length of the whole output. It may become known as late as the first output: the head waits for it."""

    def feed(self, piece: bytes) -> bytes: ...

    def finish(self) -> bytes: ...


class NewSealer(Protocol):
    """Makes sealers under the key of this request, as often as there are messages to seal."""

    def __call__(self, part: PartOf | None = None) -> Sealer: ...


type AfterSealing = Callable[[Conversation, AnswerHead, Sealed], Awaitable[Edits]]
"""Called when the service has answered 2xx to a sealed upload, before the client learns of it. Returns edits
of the answer; what it raises refuses the answer (the client must take the upload for failed)."""


type Handler = Callable[[Conversation], Awaitable[Decision]]


# Plans.


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Nothing goes on; the client is told *refusal*. Also a plan of an answer."""

    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Nothing goes on; the client is answered *reply*. A body that comes is not read."""

    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """What all plans have that send a request on."""

    edits: Edits
    target: str | None = None
    """Path and query to ask for in place of the client's."""
    sign: Signer | None = None
    memo: object = None
    """The profile's own, for its `plan_answer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Going):
    """Goes on without a body; the answer passes. `body_may_come`: the framing cannot rule one out."""

    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBody(Going):
    """Goes on with its body as it is. For bodies that are no content, by a rule of the profile: at most
    *limit_bytes*, collected before anything is sent."""

    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(Going):
    """The body is sealed. `plain_bytes` None: as long as it turns out to be. The answer passes as it is."""

    plain_bytes: int | None
    empty: EmptyBody
    digests: tuple[ExpectedDigest, ...] = ()
    decoder: Callable[[], Decoder] | None = None
    """Stands before the sealer; `plain_bytes` and `digests` are of what it yields."""
    part: PartOf | None = None
    record_digests: tuple[str, ...] = ()
    """hashlib's names: digests of the plaintext to be computed for `after`."""
    after: AfterSealing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshape(Going):
    """The body goes through what *make* makes. Its declared length, if it is to have one, is `out_bytes` of
    the reshaper; without one the body is sent in chunks."""

    make: Callable[[NewSealer], Reshaper]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converse(Going):
    """The body is collected, then *handler* decides; it may ask the service on the way.

    At most *limit_bytes*; more is refused. For bodiless requests too. Or *spool*: the body is sealed by that
    plan, and its ciphertext kept for the handler to send (`Conversation.spooled`).
    """

    handler: Handler
    limit_bytes: int = 64 * 1024
    spool: Seal | Reshape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Going):
    """A read of a whole object: the answer's body must be a sealed object."""

    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRange(Going):
    """A read of one range. `edits` are those of the whole read; what to ask for needs the object's size.

    `if_range`: the client wants the range only of the version it names, else the whole.
    """

    wanted: ByteRange
    if_range: str | None
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Unopened(Going):
    """A read of what is stored, as it is stored: on routes whose policy is `passthrough`."""

    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyRange(Going):
    """A read of one range of what was there before us, of the version that was looked at: *etag*.

    None: nothing lay there, and the service judges itself what a range of that is.
    """

    etag: str | None
    pinned: bool
    """We added the If-Match: a 412 is about our asking, not about the client's."""
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSize(Going):
    """The answer's Content-Length is that of the plaintext."""

    body_may_come: bool = False


type RequestPlan = (
    Refuse
    | Answer
    | Forward
    | PassBody
    | Seal
    | Reshape
    | Converse
    | Open
    | OpenRange
    | LegacyRange
    | HeadSize
    | Unopened
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proceed:
    """A handler's decision: the request goes on by *plan* with *body*, if it is not empty.

    `plan.edits` are applied to the client's fields; Content-Length is set to fit. The answer is planned as
    ever.
    """

    plan: Forward | Open | OpenRange | HeadSize
    body: bytes = b""


type Decision = Refuse | Answer | Proceed
