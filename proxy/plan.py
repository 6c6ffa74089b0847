"""What is to happen to one message: the words between planner, profiles and addon.

1. A plan is a value. It is made from the head of a message alone, before a byte of its body moves.
2. There is no plan "as it came": each names every change to the head, and what the body must be.
3. A request's plan says what its answer has to be; an answer is never planned without it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, override

from proxy import refusals
from proxy.message import ByteRange, ExpectedDigest
from proxy.refusals import Refusal
from proxy.tenants.model import ServiceEntry


class Mode(StrEnum):
    """How the client reached us."""

    FORWARD = "forward"  # CONNECT, or an absolute-form request
    REVERSE = "reverse"  # the client takes us for the service


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes: the network service and how it was found."""

    service: ServiceEntry
    mode: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Changes to the header fields: `drop`, then `put` (name, value) in place of all of that name."""

    drop: frozenset[str] = frozenset()
    put: tuple[tuple[str, str], ...] = ()

    def also(self, *, drop: Iterable[str] = (), put: Iterable[tuple[str, str]] = ()) -> "Edits":
        return Edits(drop=self.drop.union(drop), put=(*self.put, *put))


NO_EDITS: Final = Edits()


class EmptyBody(Enum):
    """What an upload of no bytes at all becomes."""

    SEAL = "seal"  # an empty object: 104 stored bytes
    KEEP = "keep"  # nothing: there was no object in it


# Plans of requests.


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Nothing goes on; the client is told *refusal*. Also a plan of an answer."""

    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Goes on without a body; the answer passes. `body_may_come`: the framing cannot rule one out."""

    edits: Edits
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The body is sealed. `plain_bytes` None: as long as it turns out to be. The answer passes as it is."""

    edits: Edits
    plain_bytes: int | None
    empty: EmptyBody
    digests: tuple[ExpectedDigest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A read of a whole object: the answer's body must be a sealed object."""

    edits: Edits
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRange:
    """A read of one range. `edits` are those of the whole read; what to ask for needs the object's size.

    `if_range`: the client wants the range only of the version it names, else the whole.
    """

    edits: Edits
    wanted: ByteRange
    if_range: str | None
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyRange:
    """A read of one range of what was there before us, of the version that was looked at: *etag*."""

    edits: Edits
    etag: str
    pinned: bool
    """We added the If-Match: a 412 is about our asking, not about the client's."""
    body_may_come: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSize:
    """The answer's Content-Length is that of the plaintext."""

    edits: Edits
    body_may_come: bool = False


type RequestPlan = Refuse | Forward | Seal | Open | OpenRange | LegacyRange | HeadSize


# Plans of answers.


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The answer passes as it is, but for the head."""

    edits: Edits
    may_be_sealed: bool = True
    """False: a body that begins like a sealed object is refused. It would be taken for plaintext."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWhole:
    """The body is a sealed object of `stored_bytes` (None: not declared)."""

    edits: Edits
    stored_bytes: int | None
    plain_bytes: int | None
    """None: not declared, or no object has that length; then opening it fails."""


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
