"""Heads of HTTP/1 messages that every reader reads alike, by their bytes, before mitmproxy parses them.

mitmproxy, like many, takes what is nearly right: lines that end in LF, control characters round a value,
several spaces in a request line. Who stands before or behind us may read the same bytes as something else,
which is how requests are smuggled. The rules (RFC 9110, 5.5; RFC 9112, 2.2 to 5.1, where they are stricter
than they have to be):

1. A request head is lines that end in CRLF: method, target, version with one space between, then fields.
   Names are tokens, right before their colon. Values have no control characters but HTAB. Nothing is folded.
2. At most MAX_FIELDS fields, and MAX_EMPTY_LINES empty lines before it (old clients send one after a body).
3. HTTP/1.1 has one Host; what an absolute target names is the same host. CONNECT names it by its target.
4. A response is of HTTP/1, its status has three digits, and it has as many fields as a request may have. Its
   folded lines are unfolded, as a proxy must (RFC 9112, 5.2); other control characters refuse it. Lines may
   end in LF there: old servers send it, and nobody stands between them and us.
5. What comes by HTTP/2 is parsed by then; its values have no control characters either, and there are no more
   fields than on HTTP/1.
"""

import re
from typing import Final

from mitmproxy.http import Headers, Request, Response

MAX_FIELDS: Final = 1000
MAX_EMPTY_LINES: Final = 8

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST: Final = re.compile(
    _TOKEN
    + rb" [!-~\x80-\xff]+ HTTP/[0-9]\.[0-9]\r\n"
    + rb"(?:%b:[\t -~\x80-\xff]*+\r\n){0,%d}+\r\n" % (_TOKEN, MAX_FIELDS)
)
_STATUS: Final = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}(?: [\t -~\x80-\xff]*+)?\r?\n")
_FOLD: Final = re.compile(rb"\r?\n(?=[\t ])")
"""Without the blanks before it: looked for from each of a quarter of a million, they would take an hour."""
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BLANK_LINE: Final = re.compile(rb"\n\r?\n")
_DEFAULT_PORTS: Final = {b"http": b":80", b"https": b":443"}


class HeadSearch:
    """Where a head ends in a buffer that grows; each byte is looked at once."""

    __slots__ = ("_from",)

    def __init__(self) -> None:
        self._from = 0

    def end_of(self, buffer: bytearray) -> int | None:
        """How long the head is at the beginning of *buffer*, its empty line included. None: not here yet."""
        match = _BLANK_LINE.search(buffer, self._from)
        if match is None:
            self._from = max(0, len(buffer) - 2)
            return None
        self._from = 0
        return match.end()


def is_request_head(buffer: bytearray, end: int) -> bool:
    """Rules 1 and 2, of the first *end* bytes."""
    return _REQUEST.fullmatch(buffer, 0, end) is not None


def is_response_head(buffer: bytearray, end: int) -> bool:
    """Rule 4, of the first *end* bytes, as far as bytes tell."""
    return _STATUS.match(buffer, 0, end) is not None and buffer.count(b"\n", 0, end) <= MAX_FIELDS + 2


def names_one_host(request: Request) -> bool:
    """Rule 3."""
    data = request.data
    if data.method == b"CONNECT":
        return True
    hosts = [value for name, value in data.headers.fields if name.lower() == b"host"]
    if len(hosts) != 1:
        return not hosts and data.http_version == b"HTTP/1.0"
    if not data.authority:
        return True
    port = _DEFAULT_PORTS.get(data.scheme, b":")
    return data.authority.lower().removesuffix(port) == hosts[0].lower().removesuffix(port)


def has_controls(headers: Headers) -> bool:
    """Whether a value has control characters besides HTAB."""
    return any(_CONTROL.search(value) for _, value in headers.fields)


def is_sound(headers: Headers) -> bool:
    """Rule 5."""
    return len(headers.fields) <= MAX_FIELDS and not has_controls(headers)


def unfold(response: Response) -> bool:
    """Rule 4, in place. False: it cannot be passed on."""
    headers = response.headers
    if not has_controls(headers):
        return True
    headers.fields = tuple((name, _unfolded(value)) for name, value in headers.fields)
    return not has_controls(headers)


def _unfolded(value: bytes) -> bytes:
    """*value* on one line: a fold, and the blanks around it, are one space."""
    first, *others = _FOLD.split(value)
    if not others:
        return value
    *inner, last = others
    return b" ".join([first.rstrip(b"\t "), *(part.strip(b"\t ") for part in inner), last.lstrip(b"\t ")])
