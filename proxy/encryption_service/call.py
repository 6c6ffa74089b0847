"""The border between HTTP and the dialects: a call as received, an answer to send. No socket on either side.

1. Nothing of a call is normalised: path and query as they stood in the request line, header names in lower
   case, their order and duplicates kept, the body's bytes untouched. Signatures are computed over exactly
   this.
2. A header that may stand once only is asked for by `Call.header`, which refuses duplicates.
3. A header of an answer is one line: CR, LF and NUL are a bug of ours and raise.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from envelope.errors import FormatError, MisuseError

JSON: Final = "application/json"
_FORBIDDEN_IN_HEADERS: Final = frozenset("\r\n\0")


class DuplicateHeaderError(FormatError):
    """A header that decides something stands twice: whoever reads the other one sees another call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end of the connection."""

    address: str
    """IP address in its shortest form, without port."""
    certificate_der: bytes | None = field(default=None, repr=False)
    """The client certificate of mTLS, verified against the listener's roots; None if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as received (rule 1). `body` is empty while `body_stream` carries it."""

    method: str
    path: str
    """Without query, still percent-encoded; begins with `/`."""
    query: str = ""
    """What follows the first `?`, raw."""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=b"", repr=False)
    peer: Peer
    scheme: str = "https"
    body_stream: AsyncIterator[bytes] | None = field(default=None, repr=False, compare=False)

    def header(self, name: str) -> str | None:
        """The value of *name* (lower case), None if absent. DuplicateHeaderError if it occurs twice."""
        found: str | None = None
        for key, value in self.headers:
            if key == name:
                if found is not None:
                    raise DuplicateHeaderError(f"the header {name} stands twice")
                found = value
        return found

    def values(self, name: str) -> list[str]:
        """Every value of *name* (lower case), in order."""
        return [value for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back, whole. `content_type` becomes the Content-Type header unless it is empty."""

    status: int
    body: bytes = field(default=b"", repr=False)
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_headers(self.headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingAnswer:
    """An answer whose body comes in pieces. If *chunks* raises, the connection is aborted."""

    status: int
    chunks: AsyncIterator[bytes] = field(repr=False, compare=False)
    content_type: str = "application/octet-stream"
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_headers(self.headers)


def check_headers(headers: tuple[tuple[str, str], ...]) -> None:
    """MisuseError if a header would end its line (rule 3)."""
    for name, value in headers:
        if not name or _FORBIDDEN_IN_HEADERS & {*name, *value}:
            raise MisuseError(f"the header {name!r} of an answer is not one line")
