"""Uploads that are multipart/related (RFC 2387): an object's metadata, then its content. Parsed as it goes.

1. Two parts, no more: JSON, then the content, which goes through a sealer. What leaves is built anew, with a
   boundary of ours, once all of it has come and its digests have been compared.
2. Two readers must not see two messages: besides what multipart_body.py refuses, delimiters that go
   on, folded heads, content that is coded once more.
"""

import re
from enum import Enum
from typing import Final, override

from envelope.objects import Sealer
from proxy import refusals
from proxy.messages.multipart_body import BOUNDARY, HEAD_LINE, PLAIN_CODINGS, DelimitedBody
from proxy.profiles.gcs.digests import Tally
from proxy.refusals import RefusedError

MAX_HEAD_BYTES: Final = 8 * 1024
MAX_METADATA_BYTES: Final = 256 * 1024
_TYPE: Final = re.compile(r"[ \t]*multipart/related[ \t]*((?:;[^;]*)+)", re.IGNORECASE)
_PARAMETER: Final = re.compile(r';[ \t]*([A-Za-z-]+)[ \t]*=[ \t]*(?:"([^"\\]*)"|([^\s;"\\]+))[ \t]*')
_KNOWN: Final = frozenset(
    {"content-id", "content-length", "content-transfer-encoding", "content-type", "mime-version"}
)


def boundary_of(content_type: str) -> bytes:
    """RefusedError(BAD_MESSAGE) if this is not multipart/related, or has no boundary that may be used."""
    match = _TYPE.fullmatch(content_type)
    at, found = 0, dict[str, str]()
    text = "" if match is None else match[1].rstrip(" \t;")
    while at < len(text):
        parameter = _PARAMETER.match(text, at)
        if parameter is None or parameter[1].lower() in found:
            raise RefusedError(refusals.BAD_MESSAGE)
        found[parameter[1].lower()] = parameter[2] if parameter[2] is not None else parameter[3]
        at = parameter.end()
    boundary = found.get("boundary", "")
    if not BOUNDARY.fullmatch(boundary):
        raise RefusedError(refusals.BAD_MESSAGE)
    return boundary.encode("ascii")


class _State(Enum):
    BEGIN = "begin"  # before the first delimiter
    DELIMITER = "delimiter"  # behind `--boundary`
    HEAD = "head"
    METADATA = "metadata"
    CONTENT = "content"
    END = "end"


class Related:
    """What such a body holds, but for its content; filled as it passes."""

    def __init__(self) -> None:
        self.metadata = b""
        self.content_type: str | None = None
        self.tally = Tally()


class RelatedBody(DelimitedBody):
    """A `plan.Reshaper`: takes the body, gives the sealed content. RefusedError; then it is dead."""

    out_bytes: int | None = None

    def __init__(self, boundary: bytes, found: Related, sealer: Sealer) -> None:
        super().__init__(boundary)
        self._found: Final = found
        self._sealer: Final = sealer
        self._state = _State.BEGIN
        self._parts = 0
        self._looked = 0
        self._steps: Final = {
            _State.BEGIN: self._begin,
            _State.DELIMITER: self._behind_delimiter,
            _State.HEAD: self._head,
            _State.METADATA: self._metadata,
            _State.CONTENT: self._content,
            _State.END: self._check_end,
        }

    def finish(self) -> bytes:
        if self._dead or self._state is not _State.END:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._dead = True
        return self._sealer.finalize()

    @override
    def _step(self) -> bytes | None:
        return self._steps[self._state]()

    def _begin(self) -> bytes | None:
        if self._take_first_delimiter() is None:
            return None
        self._state = _State.DELIMITER
        return b""

    def _behind_delimiter(self) -> bytes | None:
        if len(self._pending) < 2:
            return None
        ending = b"--" if self._parts == 2 else b"\r\n"
        if self._take(2) != ending:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._parts += 1
        self._state = _State.END if ending == b"--" else _State.HEAD
        return b""

    def _head(self) -> bytes | None:
        if len(self._pending) < 2:
            return None
        if self._pending.startswith(b"\r\n"):  # no field at all: Go's client does not say a type it has not
            fields = dict[str, str]()
            self._take(2)
        else:
            head = self._take_head(limit_bytes=MAX_HEAD_BYTES)
            if head is None:
                return None
            fields = _fields(head)
        kind = fields.get("content-type", "").partition(";")[0].strip().lower()
        if self._parts == 1:
            if kind != "application/json":
                raise RefusedError(refusals.BAD_MESSAGE)
            self._state = _State.METADATA
        else:
            if kind.startswith(("multipart/", "message/")):
                raise RefusedError(refusals.BAD_MESSAGE)
            self._found.content_type = fields.get("content-type")
            self._state = _State.CONTENT
        return b""

    def _metadata(self) -> bytes | None:
        # Not from its beginning each time: it may come byte by byte.
        at = self._pending.find(self._delimiter, max(0, self._looked - len(self._delimiter)))
        self._looked = len(self._pending)
        if (at if at >= 0 else self._looked - len(self._delimiter)) - 2 > MAX_METADATA_BYTES:
            raise RefusedError(refusals.TOO_LARGE)
        if at < 0:
            return None
        self._found.metadata = self._take_until(at)
        return self._over_delimiter()

    def _content(self) -> bytes | None:
        if (found := self._take_content()) is None:
            return None
        piece, is_last = found
        out = bytes(self._seal(piece))
        if is_last:
            self._over_delimiter()
        return out

    def _over_delimiter(self) -> bytes:
        self._take_delimiter()
        self._state = _State.DELIMITER
        return b""

    def _seal(self, piece: bytes) -> bytearray:
        return self._sealer.update(self._found.tally.feed(piece))


def _fields(head: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        match = HEAD_LINE.fullmatch(line)
        name = "" if match is None else match[1].decode("ascii").lower()
        if match is None or name in found or name not in _KNOWN:
            raise RefusedError(refusals.BAD_MESSAGE)
        found[name] = match[2].decode("utf-8", "surrogateescape").rstrip(" \t")
    if found.get("content-transfer-encoding", "binary").lower() not in PLAIN_CODINGS:
        raise RefusedError(refusals.BAD_MESSAGE)
    return found
