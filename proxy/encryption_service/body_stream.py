"""The body of one call that streams: pieces on their way from a connection to its dialect.

It never holds more than was read ahead: who fills it stops while `is_full`, and is told when there is room.
A body that is cut short has no end: whoever reads on gets BodyCutError.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final, override

from envelope.errors import SealgateError
from proxy.encryption_service.dialects.dialect import Trouble

READ_AHEAD_BYTES: Final = 64 << 10
"""Received and not yet wanted; the socket's buffer holds the rest."""


class BodyCutError(SealgateError):
    """The rest of a streamed body will not come: the client is gone, too slow, or sends no HTTP."""

    def __init__(self, cause: str, trouble: Trouble) -> None:
        super().__init__(cause)
        self.trouble = trouble


class BodyStream(AsyncIterator[bytes]):
    """The body of one call as an iterator that never holds more than was read ahead."""

    def __init__(self, wants_more: Callable[[], None]) -> None:
        """*wants_more* is called whenever there is room again."""
        self._wants_more = wants_more
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._complete = False
        self._failure: BodyCutError | None = None
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self._held >= READ_AHEAD_BYTES

    def put(self, pieces: Iterable[bytes], *, complete: bool) -> None:
        for piece in pieces:
            self._pieces.append(piece)
            self._held += len(piece)
        self._complete = complete
        self._changed.set()

    def fail(self, cause: str, trouble: Trouble = Trouble.MALFORMED_HTTP) -> None:
        """Whoever reads on gets BodyCutError, unless all has come."""
        if not self._complete and self._failure is None:
            self._failure = BodyCutError(cause, trouble)
            self._changed.set()

    @override
    async def __anext__(self) -> bytes:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._pieces:
                piece = self._pieces.popleft()
                self._held -= len(piece)
                if not self.is_full:
                    self._wants_more()
                return piece
            if self._complete:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
