"""Multipart bodies (RFC 2046, 5.1) read as they come, without I/O: where parts begin and end.

1. Two readers must not see two bodies. What parsers are known to take differently is refused: delimiters
   elsewhere than behind a line end, text before the first delimiter or behind the last.
2. Heads are bounded; contents are not, and are never held. What may be the beginning of a delimiter waits.
3. After an error it is dead.

What the parts are is for who reads them: proxy/messages/multipart_form.py, proxy/profiles/gcs/related.py.
"""

import re
from abc import ABC, abstractmethod
from typing import Final

from proxy import refusals
from proxy.refusals import RefusedError

BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
"""RFC 2046, 5.1.1: 70 characters at most, the last is no space."""
HEAD_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*+([^\r\n\x00]*)")
PLAIN_CODINGS: Final = frozenset({"binary", "8bit", "7bit"})
"""Content-Transfer-Encodings that code nothing."""


class DelimitedBody(ABC):
    """A subclass does one step at a time; all of these take their bytes off `_pending`."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter: Final = b"--" + boundary
        self._pending = bytearray()
        self._read_bytes = 0
        """Of the body: what lies before `_pending`."""
        self._dead = False

    def feed(self, piece: bytes) -> bytes:
        """What *piece* completes, possibly nothing. RefusedError; then it is dead."""
        if self._dead:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._dead = True
        self._pending += piece
        out = bytearray()
        while (more := self._step()) is not None:
            out += more
        self._dead = False
        return bytes(out)

    @abstractmethod
    def _step(self) -> bytes | None:
        """What leaves by one step, possibly nothing; None if more must come first."""

    def _take_first_delimiter(self) -> bytes | None:
        wanted = b"\r\n" + self._delimiter if self._pending.startswith(b"\r") else self._delimiter
        if not wanted.startswith(self._pending[: len(wanted)]):
            raise RefusedError(refusals.BAD_MESSAGE)
        return self._take(len(wanted)) if len(self._pending) >= len(wanted) else None

    def _take_head(self, *, limit_bytes: int) -> bytes | None:
        """A part's head without the empty line behind it, which is taken, too."""
        end = self._pending.find(b"\r\n\r\n", 0, limit_bytes + 4)
        if end < 0:
            if len(self._pending) > limit_bytes:
                raise RefusedError(refusals.TOO_LARGE)
            return None
        head = self._take(end)
        self._take(4)
        return head

    def _take_content(self) -> tuple[bytes, bool] | None:
        """A piece of a part's content, and whether it was the last: then a delimiter is next."""
        at = self._pending.find(self._delimiter)
        if at < 0:
            # It may have begun: its CRLF and all but its last byte.
            free = len(self._pending) - len(self._delimiter) - 1
            return (self._take(free), False) if free > 0 else None
        return self._take_until(at), True

    def _take_until(self, at: int) -> bytes:
        """A content that ends before the delimiter at *at*."""
        if self._pending[max(0, at - 2) : at] != b"\r\n":
            # Behind a bare line feed, in a line's middle, at once behind the head: readers differ.
            raise RefusedError(refusals.BAD_MESSAGE)
        return self._take(at - 2)

    def _take_delimiter(self) -> bytes:
        """Behind a content, with its line end."""
        return self._take(2 + len(self._delimiter))

    def _check_end(self) -> None:
        """Behind the last delimiter: one line end at most."""
        if not b"\r\n".startswith(self._pending):
            raise RefusedError(refusals.BAD_MESSAGE)

    def _take(self, count: int) -> bytes:
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        self._read_bytes += count
        return taken
