"""HTTP/1.1 messages of the encryption service, without I/O: bytes in, heads and bodies out (RFC 9112).

1. Stricter than the RFC wherever two readers of one message could disagree about where it ends: lines end by
   CRLF only, no folded lines, no blank before a colon, one Content-Length of digits or one
   `Transfer-Encoding: chunked`, never both, no transfer coding in HTTP/1.0, one Host. What is refused here
   ends the connection.
2. Targets are in origin form, as received: nothing is decoded or normalised. Methods are not judged here:
   LIST is as good as POST (which is why this is not llhttp: that knows its own methods only).
3. Everything is bounded before it is kept: the head, the number of its fields, a chunk's line, trailers, and
   how many chunks a body may be cut into.
4. Nothing is rescanned and bodies are joined once: work grows with the bytes, whatever pieces they come in.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Final

from envelope.errors import SealgateError

MAX_HEAD_BYTES: Final = 64 << 10
MAX_FIELDS: Final = 100
MAX_CHUNK_LINE_BYTES: Final = 256
MAX_TRAILER_BYTES: Final = 8 << 10
FREE_CHUNKS: Final = 1000
MIN_CHUNK_BYTES: Final = 64
"""On average, beyond the FREE_CHUNKS: bytes in pieces of one cost fifty times what they cost at once."""

_REQUEST_LINE: Final = re.compile(r"([A-Z]{1,20}) (/[!-\"$-~]*) HTTP/(\d)\.(\d)")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_DECIDING: Final = frozenset({"content-length", "transfer-encoding", "host", "connection", "expect"})
_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_WORD: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_EXTENSION: Final = rb";" + _WORD + rb"(?:=(?:" + _WORD + rb'|"[!#-\[\]-~ ]*"))?'
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:" + _EXTENSION + rb")*")
# What may stand in a head besides CR LF, which are counted: everything but the other control characters.
_ALLOWED: Final = bytes([9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0x100)])
_HEAD_END: Final = b"\r\n\r\n"

# Looking a name up is cheaper than judging it anew; what is not here is judged.
_KNOWN_NAMES: Final = {
    spelled: name.lower()
    for name in (
        "Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Length", "Content-Type",
        "Expect", "Host", "Origin", "Transfer-Encoding", "User-Agent", "X-Amz-Content-Sha256", "X-Amz-Date",
        "X-Vault-Namespace", "X-Vault-Request", "X-Vault-Token",
    )
    for spelled in (name, name.lower())
}  # fmt: skip


class MalformedError(SealgateError):
    """Not a request that can be answered as asked. The connection ends; `status` says with which answer."""

    def __init__(self, cause: str, *, status: HTTPStatus = HTTPStatus.BAD_REQUEST, path: str = "") -> None:
        super().__init__(cause)
        self.status = status
        self.path = path
        """As far as it was understood, to find whose words to refuse in."""


@dataclass(slots=True)
class Head:
    """A request's head: names in lower case, values without the blanks around them, order and repeats kept.

    To be left as it is; frozen, it would cost a microsecond more.
    """

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    content_length: int | None
    """None: chunked, of a length nobody knows. 0 where neither was said."""
    keep_alive: bool
    expects_continue: bool
    http_1_0: bool


class _At(Enum):
    HEAD = auto()
    FIXED = auto()
    CHUNK_SIZE = auto()
    CHUNK_DATA = auto()
    CHUNK_END = auto()
    TRAILERS = auto()


class RequestReader:
    """One connection's requests, one after the other: `feed`, then `read_head`, then its body, and again.

    Every method may raise MalformedError; a reader that did stays failed.
    """

    __slots__ = (
        "_at",
        "_blank",
        "_chunks",
        "_data",
        "_failure",
        "_last_head",
        "_last_raw",
        "_left",
        "_path",
        "_pieces",
        "_pos",
        "_scanned",
        "_size",
    )

    def __init__(self) -> None:
        self._data = b""
        self._pos = 0
        self._scanned = 0
        self._at = _At.HEAD
        self._left = 0  # of the body, or of the chunk
        self._size = 0  # of the body so far
        self._chunks = 0
        self._pieces: list[bytes] = []
        self._path = ""
        self._failure: MalformedError | None = None
        self._blank = False
        self._last_raw = b""
        self._last_head: Head | None = None

    @property
    def buffered_bytes(self) -> int:
        """Fed and not yet read."""
        return len(self._data) - self._pos

    @property
    def in_body(self) -> bool:
        """Whether a head was read whose body is not complete."""
        return self._at is not _At.HEAD

    def feed(self, data: bytes) -> None:
        """Take what the connection has received."""
        if self._pos == len(self._data):
            self._data = data
            self._scanned = 0
        else:
            self._scanned = max(0, self._scanned - self._pos)
            self._data = self._data[self._pos :] + data
        self._pos = 0

    def read_head(self) -> Head | None:
        """The next request's head, None while it is not here as a whole.

        MalformedError: 400; 431 for a head too large; 505 for another HTTP than 1.0 and 1.1.
        """
        self._check()
        data, start = self._data, self._pos
        if not self._blank and data.startswith(b"\r\n", start):
            self._blank = True  # RFC 9112 2.2: one empty line before a request is let pass
            start = self._pos = start + 2
        end = data.find(_HEAD_END, max(start, self._scanned))
        if end < 0:
            self._scanned = max(start, len(data) - 3)
            if len(data) - start > MAX_HEAD_BYTES:
                raise self._failed("the head is too large", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return None
        if end - start > MAX_HEAD_BYTES:
            raise self._failed("the head is too large", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        raw = data[start:end]
        if raw == self._last_raw and self._last_head is not None:
            head = self._last_head  # the same bytes mean the same: most clients repeat their heads
        else:
            head = self._parsed(raw)
            self._last_raw, self._last_head = raw, head
        self._pos = self._scanned = end + 4
        self._blank = False
        self._size = self._chunks = 0
        if head.content_length is None:
            self._at = _At.CHUNK_SIZE
        elif head.content_length:
            self._at = _At.FIXED
            self._left = head.content_length
        return head

    def read_body(self) -> bytes | None:
        """The whole body of the head just read, None while some of it is missing.

        How large it may become is the caller's to judge, by the head and by `body_bytes`.
        """
        if self._at is _At.HEAD:
            return b""
        if self._at is _At.FIXED and not self._pieces and self.buffered_bytes >= self._left:
            return self._take(self._left)  # the usual case
        while (piece := self.read_piece()) is not None:
            self._pieces.append(piece)
        if self.in_body:
            return None
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    @property
    def body_bytes(self) -> int:
        """How much of the current body has been read."""
        return self._size

    def read_piece(self) -> bytes | None:
        """The next piece of the body, not empty. None: it is complete (not `in_body`) or more has to come."""
        self._check()
        while True:
            match self._at:
                case _At.HEAD:
                    return None
                case _At.FIXED | _At.CHUNK_DATA:
                    available = min(self._left, self.buffered_bytes)
                    return self._take(available) if available else None
                case _At.CHUNK_SIZE:
                    if not self._read_chunk_size():
                        return None
                case _At.CHUNK_END:
                    if not self._read_chunk_end():
                        return None
                case _At.TRAILERS:
                    if not self._read_trailers():
                        return None

    # ---- within

    def _take(self, count: int) -> bytes:
        piece = self._data[self._pos : self._pos + count]
        self._pos += count
        self._size += count
        self._left -= count
        if not self._left:
            self._at = _At.HEAD if self._at is _At.FIXED else _At.CHUNK_END
        return piece

    def _read_chunk_size(self) -> bool:
        end = self._data.find(b"\r\n", self._pos, self._pos + MAX_CHUNK_LINE_BYTES + 2)
        if end < 0:
            if self.buffered_bytes > MAX_CHUNK_LINE_BYTES or self._data.find(b"\n", self._pos) >= 0:
                raise self._failed("a chunk's size is not understood")
            return False
        match = _CHUNK_LINE.fullmatch(self._data, self._pos, end)
        if match is None:
            raise self._failed("a chunk's size is not understood")
        self._pos = end + 2
        self._left = int(match[1], 16)
        self._chunks += 1
        if self._chunks > FREE_CHUNKS + self._size // MIN_CHUNK_BYTES:
            raise self._failed("the body is cut into too many chunks")
        self._at = _At.CHUNK_DATA if self._left else _At.TRAILERS
        return True

    def _read_chunk_end(self) -> bool:
        if self.buffered_bytes < 2:
            return False
        if not self._data.startswith(b"\r\n", self._pos):
            raise self._failed("a chunk is longer than it said")
        self._pos += 2
        self._at = _At.CHUNK_SIZE
        return True

    def _read_trailers(self) -> bool:
        """Trailers mean nothing to any dialect: judged and dropped."""
        if self._data.startswith(b"\r\n", self._pos):
            self._pos += 2
            self._at = _At.HEAD
            return True
        end = self._data.find(_HEAD_END, self._pos, self._pos + MAX_TRAILER_BYTES)
        if end < 0:
            if self.buffered_bytes >= MAX_TRAILER_BYTES:
                raise self._failed("the trailers are too large")
            return False
        trailers = self._fields(self._lines(self._data[self._pos : end]))
        if not _DECIDING.isdisjoint(name for name, _ in trailers):
            raise self._failed("a trailer says what only a head may say")
        self._pos = end + 4
        self._at = _At.HEAD
        return True

    def _parsed(self, raw: bytes) -> Head:
        lines = self._lines(raw)
        match = _REQUEST_LINE.fullmatch(lines[0])
        if match is None:
            raise self._failed("the request line is not understood")
        method, target, major, minor = match.groups()
        path, _, query = target.partition("?")
        self._path = path
        if major != "1" or minor not in "01":
            raise self._failed(
                "HTTP/1.1 and HTTP/1.0 are spoken here", status=HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            )
        http_1_0 = minor == "0"
        headers = self._fields(lines[1:])
        length = coding = host = expect = None
        connection = ""
        for name, value in headers:
            if name not in _DECIDING:
                continue
            match name:
                case "content-length":
                    if length is not None or _DIGITS.fullmatch(value) is None:
                        raise self._failed("Content-Length is not one number")
                    length = int(value)
                case "transfer-encoding":
                    if coding is not None or http_1_0 or value.lower() != "chunked":
                        raise self._failed("no other transfer coding than chunked is understood, once")
                    coding = value
                case "host":
                    if host is not None:
                        raise self._failed("Host occurs twice")
                    host = value
                case "connection":
                    connection += f",{value.lower()}"
                case _:
                    expect = value.lower() if expect is None else "twice"
        if coding is not None and length is not None:
            raise self._failed("a body has a length or is chunked, not both")
        if host is None and not http_1_0:
            raise self._failed("Host is missing")
        if expect not in (None, "100-continue"):
            raise self._failed(
                "nothing but 100-continue can be expected", status=HTTPStatus.EXPECTATION_FAILED
            )
        return Head(
            method,
            path,
            query,
            headers,
            None if coding is not None else length or 0,
            # No keep-alive with HTTP/1.0: nobody needs it, and old proxies pass it on without understanding.
            not http_1_0 and (not connection or "close" not in _members(connection)),
            expect is not None and not http_1_0,
            http_1_0,
        )

    def _lines(self, raw: bytes) -> list[str]:
        if raw.translate(None, _ALLOWED) or not raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r"):
            raise self._failed("the head holds characters that no head may hold")
        return raw.decode("latin-1").split("\r\n")

    def _fields(self, lines: list[str]) -> tuple[tuple[str, str], ...]:
        if len(lines) > MAX_FIELDS:
            raise self._failed("too many header fields", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        fields = []
        for line in lines:
            name, colon, value = line.partition(":")
            known = _KNOWN_NAMES.get(name)
            if known is None:
                if not colon or _TOKEN.fullmatch(name) is None:
                    raise self._failed("a header field is not understood")
                known = name.lower()
            elif not colon:
                raise self._failed("a header field is not understood")
            fields.append((known, value.strip(" \t")))
        return tuple(fields)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _failed(self, cause: str, *, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> MalformedError:
        self._failure = MalformedError(cause, status=status, path=self._path)
        self._path = ""
        return self._failure


def _members(value: str) -> set[str]:
    return {member.strip(" \t") for member in value.split(",")}


_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_FIELD_VALUE: Final = re.compile(r"[\t -~\x80-\xff]*")


def answer_head(
    status: int,
    content_type: str,
    content_length: int | None,
    headers: tuple[tuple[str, str], ...] = (),
    *,
    close: bool = False,
    date: str = "",
) -> bytes:
    """The head of an answer; *content_length* None: chunked. ValueError for a field that would break out."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}"]
    if date:
        lines.append(f"Date: {date}")
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    if content_length is None:
        lines.append("Transfer-Encoding: chunked")
    elif status != HTTPStatus.NO_CONTENT:  # which must not have one
        lines.append(f"Content-Length: {content_length}")
    if close:
        lines.append("Connection: close")
    for name, value in headers:
        if _TOKEN.fullmatch(name) is None or _FIELD_VALUE.fullmatch(value) is None:
            raise ValueError(f"header field {name!r} cannot be sent")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
