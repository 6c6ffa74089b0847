"""A range of plaintext, asked of the service as a range of what it stores; and the refusal of one."""

from dataclasses import dataclass
from typing import override

from envelope.multipart import Manifest
from proxy import refusals
from proxy.refusals import Refusal


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
