"""Uploads that are multipart/related (RFC 2387): an object's metadata, then its content. Parsed as it goes.

1. Two parts, no more: JSON, then the content, which goes through a sealer. What leaves is built anew, with a
   boundary of ours, once all of it has come and its digests have been compared.
2. Two readers must not see two messages: what parsers are known to take differently is refused, as in
   proxy/multipart_form.py: delimiters elsewhere than behind a line end, or that go on, folded heads, text
   before the first delimiter or behind the last, content that is coded once more.
"""

import re
from enum import Enum
from typing import Final

from envelope.objects import Sealer
from proxy import refusals
from proxy.profiles.gcs.digests import Tally
from proxy.refusals import RefusedError

MAX_HEAD_BYTES: Final = 8 * 1024
MAX_METADATA_BYTES: Final = 256 * 1024
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_TYPE: Final = re.compile(r"[ \t]*multipart/related[ \t]*((?:;[^;]*)+)", re.IGNORECASE)
_PARAMETER: Final = re.compile(r';[ \t]*([A-Za-z-]+)[ \t]*=[ \t]*(?:"([^"\\]*)"|([^\s;"\\]+))[ \t]*')
_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*+([^\r\n\x00]*)")
_KNOWN: Final = frozenset(
    {"content-id", "content-length", "content-transfer-encoding", "content-type", "mime-version"}
)
_PLAIN_CODINGS: Final = frozenset({"binary", "8bit", "7bit"})


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
    if not _BOUNDARY.fullmatch(boundary):
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


class RelatedBody:
    """A `plan.Reshaper`: takes the body, gives the sealed content. RefusedError; then it is dead."""

    out_bytes: int | None = None

    def __init__(self, boundary: bytes, found: Related, sealer: Sealer) -> None:
        self._delimiter: Final = b"--" + boundary
        self._found: Final = found
        self._sealer: Final = sealer
        self._state = _State.BEGIN
        self._parts = 0
        self._pending = bytearray()
        self._looked = 0
        self._dead = False
        self._steps: Final = {
            _State.BEGIN: self._begin,
            _State.DELIMITER: self._behind_delimiter,
            _State.HEAD: self._head,
            _State.METADATA: self._metadata,
            _State.CONTENT: self._content,
            _State.END: self._end,
        }

    def feed(self, piece: bytes) -> bytes:
        if self._dead:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._dead = True
        self._pending += piece
        out = bytearray()
        while (more := self._steps[self._state]()) is not None:
            out += more
        self._dead = False
        return bytes(out)

    def finish(self) -> bytes:
        if self._dead or self._state is not _State.END:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._dead = True
        return self._sealer.finalize()

    # One step each: sealed bytes, possibly none; None if more must come first.

    def _begin(self) -> bytes | None:
        wanted = b"\r\n" + self._delimiter if self._pending.startswith(b"\r") else self._delimiter
        if not wanted.startswith(self._pending[: len(wanted)]):
            raise RefusedError(refusals.BAD_MESSAGE)
        if len(self._pending) < len(wanted):
            return None
        self._take(len(wanted))
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
            end = self._pending.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
            if end < 0:
                if len(self._pending) > MAX_HEAD_BYTES:
                    raise RefusedError(refusals.TOO_LARGE)
                return None
            fields = _fields(self._take(end))
            self._take(4)
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
        self._check_line_end(at)
        self._found.metadata = self._take(at - 2)
        return self._over_delimiter()

    def _content(self) -> bytes | None:
        at = self._pending.find(self._delimiter)
        if at < 0:
            # It may have begun: its CRLF and all but its last byte.
            free = len(self._pending) - len(self._delimiter) - 1
            return bytes(self._seal(self._take(free))) if free > 0 else None
        self._check_line_end(at)
        out = bytes(self._seal(self._take(at - 2)))
        self._over_delimiter()
        return out

    def _end(self) -> None:
        # Behind the last delimiter, one line end at most.
        if not b"\r\n".startswith(self._pending):
            raise RefusedError(refusals.BAD_MESSAGE)

    def _check_line_end(self, at: int) -> None:
        if self._pending[max(0, at - 2) : at] != b"\r\n":
            raise RefusedError(refusals.BAD_MESSAGE)

    def _over_delimiter(self) -> bytes:
        self._take(2 + len(self._delimiter))
        self._state = _State.DELIMITER
        return b""

    def _seal(self, piece: bytes) -> bytearray:
        return self._sealer.update(self._found.tally.feed(piece))

    def _take(self, count: int) -> bytes:
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        return taken


def _fields(head: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        match = _LINE.fullmatch(line)
        name = "" if match is None else match[1].decode("ascii").lower()
        if match is None or name in found or name not in _KNOWN:
            raise RefusedError(refusals.BAD_MESSAGE)
        found[name] = match[2].decode("utf-8", "surrogateescape").rstrip(" \t")
    if found.get("content-transfer-encoding", "binary").lower() not in _PLAIN_CODINGS:
        raise RefusedError(refusals.BAD_MESSAGE)
    return found
