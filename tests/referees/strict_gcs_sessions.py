"""Resumable uploads as Google documents them: what is taken of a chunk, and what is answered. No I/O.

https://cloud.google.com/storage/docs/performing-resumable-uploads

1. A chunk that is not the last counts in granules of 256 KiB: what is beyond the last whole one is not kept,
   and the client hears of it by `Range`.
2. Bytes that are held are not taken again, whatever they are now. Bytes beyond a gap are not taken: 503.
3. The content's length, once it was said, stays. The upload ends with its last byte, or with `bytes */N` when
   N bytes are held; then every request is answered with the object.
4. What no client does that has read the documentation is noted, whatever is answered.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tests.referees.strict_gcs_objects import FaultError, Stored

GRANULE_BYTES: Final = 256 * 1024
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Place:
    """What a request says that it brings."""

    start: int = 0
    stop: int | None = None
    """None: as far as the body goes."""
    total: int | None = None
    is_rest: bool = False
    """The body goes on to the content's end."""
    is_status: bool = False

    @classmethod
    def of(cls, content_range: str | None) -> "Place":
        """FaultError(400)."""
        if content_range is None:
            return cls(is_rest=True)
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None:
            raise FaultError(400, "Failed to parse Content-Range header.")
        total = None if match[3] == "*" else int(match[3])
        if match[1] is None:
            return cls(total=total, is_status=True)
        start, is_rest = int(match[1]), match[2] == "*"
        stop = None if is_rest else int(match[2]) + 1
        if stop is not None and (stop <= start or (total is not None and stop > total)):
            raise FaultError(400, "Invalid request. The Content-Range header is inconsistent.")
        return cls(start=start, stop=stop, total=total, is_rest=is_rest)


@dataclass(slots=True)
class Session:
    upload_id: str
    bucket: str
    name: str
    resource: dict[str, Any]
    """What the client said at the begin."""
    query: Mapping[str, str]
    total: int | None
    trouble: list[str]
    held: bytearray = field(default_factory=bytearray)
    result: Stored | None = None
    ended: int | None = None
    """The status that all requests get: cancelled, expired."""

    def begin(self, place: Place, length: int | None) -> "Taking":
        """Of a request with *length* bytes of body (None: chunked). FaultError(400)."""
        if self.total is not None and place.total not in (None, self.total):
            raise FaultError(400, "Invalid request. The total size differs from what was said before.")
        if place.is_status and length:
            self.trouble.append("a question has a body")
            raise FaultError(400, "Invalid request. A status query has no body.")
        if place.stop is not None and length is not None and length != place.stop - place.start:
            self.trouble.append("Content-Length and Content-Range differ")
            raise FaultError(400, f"Invalid request. There were {length} byte(s) in the request body.")
        if place.total is not None:
            self.total = place.total
        if place.total is not None and len(self.held) > place.total:
            raise FaultError(400, "Invalid request. More bytes were received before.")
        if place.start > len(self.held):
            self.trouble.append(f"a gap: {place.start} follows on {len(self.held)}")
        return Taking(self, place, place.start)


@dataclass(slots=True)
class Taking:
    """The body of one request, as it comes."""

    session: Session
    place: Place
    at: int

    @property
    def is_gap(self) -> bool:
        return self.place.start > len(self.session.held) and self.at == self.place.start

    def feed(self, piece: bytes, *, limit_bytes: int) -> None:
        """FaultError(400, 413, 503) for what cannot be taken: more than was said, no room, no place."""
        session, place = self.session, self.place
        if self.at > len(session.held):  # another request took part of it back meanwhile
            raise FaultError(503, "Backend Error")
        known = max(0, min(len(session.held) - self.at, len(piece)))
        if session.held[self.at : self.at + known] != piece[:known]:
            session.trouble.append(f"other bytes at {self.at}")
        self.at += len(piece)
        if place.stop is not None and self.at > place.stop:
            raise FaultError(400, "Invalid request. There were more bytes in the request body.")
        if len(session.held) + len(piece) > limit_bytes:
            raise FaultError(413, "The emulator is full.")
        session.held += piece[known:]

    def keep_granules(self, limit: int | None = None) -> None:
        """What counts of a request that ended early, or of a chunk that is not the last."""
        held = self.session.held
        kept = len(held) if limit is None else min(len(held), limit)
        del held[kept // GRANULE_BYTES * GRANULE_BYTES :]

    def finish(self) -> bool:
        """Whether the content is whole now. FaultError(400)."""
        session, place = self.session, self.place
        if not place.is_status and place.stop is not None and self.at != place.stop:
            raise FaultError(400, f"Invalid request. There were {self.at - place.start} byte(s).")
        if place.is_rest:
            if session.total is None:
                session.total = self.at
            if session.total != self.at:
                self.keep_granules()
                raise FaultError(400, "Invalid request. The body ends before the content.")
        if session.total is not None and session.total == len(session.held):
            return True
        if not place.is_status and place.stop is not None and (place.stop - place.start) % GRANULE_BYTES:
            session.trouble.append(f"a chunk of {place.stop - place.start} bytes is not the last")
        self.keep_granules()
        return False
