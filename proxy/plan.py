"""What is to happen to one message: the words between planner, profiles and addon.

1. A plan is a value. It is made from the head of a message alone, before a byte of its body moves.
2. There is no plan "as it came": each names every change to the head, and what the body must be.
3. A request's plan says what its answer has to be; an answer is never planned without it.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final, Protocol, override

from envelope.multipart import Manifest
from envelope.objects import Header, Sealer
from proxy import refusals
from proxy.asking import ServiceAnswer, Signer
from proxy.keys.cache import DataKey
from proxy.message import AnswerHead, BodyFrame, ByteRange, ExpectedDigest, Fields, RequestHead
from proxy.profile_options import ProfileOptions, StoredPolicy
from proxy.refusals import Refusal
from proxy.tenants.model import Directory, LegacyPolicy, ServiceEntry
from proxy.uploads import UploadStore

EMPTY_DIRECTORY: Final = Directory.of(0, (), ())


class Mode(StrEnum):
    """How the client reached us."""

    FORWARD = "forward"  # CONNECT, or an absolute-form request
    REVERSE = "reverse"  # the client takes us for the service


_AS_THE_SERVICE: Final = {legacy: StoredPolicy(legacy.value) for legacy in LegacyPolicy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes: the network service and how it was found."""

    service: ServiceEntry
    mode: Mode
    options: ProfileOptions = field(default_factory=ProfileOptions)
    stored: StoredPolicy | None = None
    """What the options say of this path; None: nothing, the service's own policy holds."""
    pages: bool = False
    """What is not sealed is a page of the service's: it passes, and was never content of ours."""

    @property
    def policy(self) -> StoredPolicy:
        """What to do with a stored body that is not sealed."""
        if self.pages:
            return StoredPolicy.MIGRATE
        return self.stored or _AS_THE_SERVICE[self.service.legacy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Changes to the header fields: `drop`, then `put` (name, value) in place of all of that name.

    Of a name that is put twice the later value counts. `lists`: names that take several values.
    """

    drop: frozenset[str] = frozenset()
    put: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def also(self, *, drop: Iterable[str] = (), put: Iterable[tuple[str, str]] = ()) -> "Edits":
        return Edits(drop=self.drop.union(drop), put=(*self.put, *put), lists=self.lists)


NO_EDITS: Final = Edits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as a profile is asked about it."""

    head: RequestHead
    frame: BodyFrame
    edits: Edits
    """Those that every request to a managed service needs; a plan's edits are these and the profile's own."""
    route: Route
    now_s: float = 0.0
    """Wall clock, for signatures."""
    directory: Directory = EMPTY_DIRECTORY
    """The picture of the directory: credentials by which clients are authenticated."""

    @property
    def service(self) -> ServiceEntry:
        return self.route.service

    @property
    def options(self) -> ProfileOptions:
        """Of the profile's own `options` type."""
        return self.route.options


class EmptyBody(Enum):
    """What an upload of no bytes at all becomes."""

    SEAL = "seal"  # an empty object: 104 stored bytes
    KEEP = "keep"  # nothing: there was no object in it


# What plans are made of.


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

    def __call__(self, part: "PartOf | None" = None) -> Sealer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOf:
    """Which part of which upload a message is (envelope/multipart.py)."""

    upload_ref: bytes
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What an upload became, once its end has gone up."""

    plain_bytes: int
    stored_bytes: int
    commitment: bytes
    key_id: bytes
    digests: dict[str, bytes]
    """Of the plaintext, of the algorithms that `Seal.record_digests` names."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stored object, or a range of it, being read as plaintext. What `pieces` raises ends the read."""

    plain_bytes: int
    """Of what is read; proven, not claimed."""
    object_bytes: int
    """Of the whole object."""
    etag: str | None
    fields: Fields
    """Of the service's answer."""
    pieces: AsyncIterator[bytes]


class StoredKind(Enum):
    """What a stored object is, by its first bytes."""

    OTHER = "other"  # none of ours
    SIMPLE = "simple"
    COMPOSITE = "composite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What could be told of a stored object without reading it."""

    kind: StoredKind
    stored_bytes: int
    plain_bytes: int
    etag: str | None
    manifest: Manifest | None
    """Of a composite."""


class Sealing(Protocol):
    """Plaintext on its way to become one message: iterate it once, then ask what it became."""

    @property
    def stored_bytes(self) -> int:
        """Known before, from the plaintext's length."""

    @property
    def sealed(self) -> "Sealed":
        """RefusedError(INTERNAL) before the end."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Spooled(Protocol):
    """An upload that was sealed and is held here, as often as the handler wants to send it."""

    @property
    def stored_bytes(self) -> int: ...

    @property
    def sealed(self) -> "Sealed | None":
        """None: it was reshaped."""

    def read(self, start: int, stop: int) -> bytes:
        """Of the ciphertext; small pieces only: it may lie on a disk."""

    def pieces(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The ciphertext, or a part of it."""


class Conversation(ABC):
    """What a profile's handler may do while its client waits (proxy/conversation.py)."""

    request: Request
    body: bytes
    """What the client has sent, if it was to be collected."""
    spooled: Spooled | None
    """Of `Converse.spool`."""

    @property
    @abstractmethod
    def uploads(self) -> UploadStore:
        """What is remembered of uploads in parts. RefusedError(UPLOADS_UNAVAILABLE) where there is none."""

    @abstractmethod
    def ask(
        self,
        method: str,
        target: str | None = None,
        *,
        fields: Iterable[tuple[str, str]] = (),
        keep: Iterable[str] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        body_bytes: int | None = None,
    ) -> AbstractAsyncContextManager[ServiceAnswer]:
        """Ask the service as the client (`Asking.ask`). RefusedError(UPSTREAM) where it cannot be asked."""

    @abstractmethod
    async def relay(
        self, answer: ServiceAnswer, *, limit_bytes: int = 1024 * 1024, to_upload: bool = False
    ) -> "Reply":
        """The service's answer as the client may see it: to what was asked in place of its own request.

        *to_upload*: a redirect that would have the client send its content again elsewhere is refused.
        RefusedError(SERVICE_ANSWER) if it is longer.
        """

    @abstractmethod
    async def sealing_key(self, *, size_bytes: int | None = None, target: str | None = None) -> DataKey:
        """The active key, its use recorded. RefusedError, AuditUnavailableError."""

    @abstractmethod
    def opening_key(self, header: Header) -> DataKey:
        """The key that *header* names, its use recorded. KeyUnavailableError, AuditUnavailableError."""

    @abstractmethod
    async def sealing(
        self,
        pieces: AsyncIterator[bytes],
        plain_bytes: int,
        *,
        part: "PartOf | None" = None,
        record_digests: tuple[str, ...] = (),
        target: str | None = None,
    ) -> Sealing:
        """One message of *plain_bytes* that come as *pieces*. *target*: of the object, for the audit log."""

    @abstractmethod
    async def ending(self, manifest: Manifest) -> bytes:
        """Manifest message and trailer of a composite: what is stored behind its parts."""

    @abstractmethod
    def opened(
        self,
        target: str | None = None,
        *,
        wanted: ByteRange | None = None,
        fields: Iterable[tuple[str, str]] = (),
    ) -> AbstractAsyncContextManager[Opened]:
        """The object at *target* (None: the client's), or a range of it, opened.

        *fields* go with the read of the content: conditions, say. RefusedError: RangeRefusal, what a GET of
        it would be refused with, UPSTREAM_CHANGED, SERVICE_ANSWER if nothing comes that could be opened.
        """

    @abstractmethod
    async def inspect(self, target: str | None = None) -> Inspected | None:
        """What lies at *target* (None: the client's); None: the service does not say. Its key is asked for.

        RefusedError as a GET of it would be refused.
        """

    @abstractmethod
    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        """Plaintext length of the object at *target*, which may be a composite: then its manifest is read,
        once per version. None: that cannot be told."""

    @abstractmethod
    def note(self, action: str, *, target: str | None = None, size_bytes: int | None = None) -> None:
        """An event of this request in the audit log. AuditUnavailableError: it must not happen."""


type AfterSealing = Callable[[Conversation, AnswerHead, Sealed], Awaitable[Edits]]
"""Called when the service has answered 2xx to a sealed upload, before the client learns of it. Returns edits
of the answer; what it raises refuses the answer (the client must take the upload for failed)."""

type Handler = Callable[[Conversation], Awaitable[Decision]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer made here. Content-Length is added; Date is not."""

    status: int
    fields: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


# Plans of requests.


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
    spool: "Seal | Reshape | None" = None


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


# Plans of answers.


class BodyMapper(Protocol):
    """Rewrites the body of an answer as it streams. RefusedError where it cannot."""

    @property
    def pending(self) -> bool:
        """True: `settle` must be awaited before the next call. Never long: the answer stands still."""

    def feed(self, piece: bytes) -> bytes: ...

    def finish(self) -> bytes: ...

    async def settle(self) -> None:
        """Find out what the mapper waits for, the sizes of composites say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapBody:
    """The body goes through a mapper. Its length is not known before: chunked, or to the end."""

    make: "Callable[[Conversation], BodyMapper]"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapWhole:
    """The body is collected, at most *limit_bytes*, and *function* makes another answer of it."""

    limit_bytes: int
    function: "Callable[[Conversation, AnswerHead, bytes], Awaitable[Reply]]"
    """The reply's status and body replace the answer's, its fields those of the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The answer passes as it is, but for the head."""

    edits: Edits
    may_be_sealed: bool = True
    """False: a body that begins like a sealed object is refused. It would be taken for plaintext."""
    body: MapBody | MapWhole | None = None
    """What becomes of the body, if there is one; `may_be_sealed` is then the mapper's affair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWhole:
    """The body is a sealed object of `stored_bytes` (None: not declared)."""

    edits: Edits
    stored_bytes: int | None
    plain_bytes: int | None
    """None: not declared, or no object has that length; then opening it fails."""
    must_be_sealed: bool = False
    """Whatever the policy says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """The body is the sealed range that was asked for."""

    edits: Edits


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSize:
    """No body; its Content-Length is the stored one. `probe`: only the object's first bytes tell whose."""

    edits: Edits
    stored_bytes: int
    plain_bytes: int | None
    probe: bool = False
    """`plain_bytes` holds for a simple object only: look whether it is one, a composite, or none of ours."""


type AnswerPlan = Refuse | Pass | OpenWhole | OpenPart | MapSize


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRange:
    """What was asked of the service in place of the client's range, and what the client gets."""

    stored: tuple[int, int]
    """Half-open range of stored bytes, whole records."""
    stored_bytes: int
    plain: tuple[int, int]
    plain_bytes: int
    pinned: bool
    """We added the If-Match: a 412 is about our asking, not about the client's."""
    etag: str | None
    composite: Manifest | None = None
    """Of an object in parts."""
    intervals: tuple[tuple[int, int], ...] = ()
    """Of a composite: what is wanted of `stored`; ends of parts and empty ones lie between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRefusal(Refusal):
    """416, with the object's size (RFC 9110 15.5.17)."""

    plain_bytes: int

    @classmethod
    def of(cls, plain_bytes: int) -> "RangeRefusal":
        base = refusals.RANGE_NOT_SATISFIABLE
        return cls(
            code=base.code,
            status=base.status,
            cause=base.cause,
            next_step=base.next_step,
            plain_bytes=plain_bytes,
        )

    @override
    def headers(self) -> list[tuple[str, str]]:
        return [*Refusal.headers(self), ("Content-Range", f"bytes */{self.plain_bytes}")]
