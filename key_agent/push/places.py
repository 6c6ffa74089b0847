"""How many deliveries are under way at once, and how the slow ones among them hold up nobody.

1. A delivery needs a place; there are two kinds. Who is known not to answer begins among the slow ones.
2. A quick place is for a second: after that the delivery moves over to the slow ones, and the next begins.
   Only where those are all taken too it stays, so that the number of deliveries, and with it the memory that
   their envelopes take, is bounded in any case.
3. Each kind is given out in the order of asking.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

PATIENCE_S: Final = 1.0


class Places:
    """*quick* and *slow* places. Time is the event loop's: a place is about what happens now."""

    def __init__(self, *, quick: int, slow: int, patience_s: float = PATIENCE_S) -> None:
        self._quick = _Kind(quick)
        self._slow = _Kind(slow)
        self._patience_s = patience_s

    @asynccontextmanager
    async def taken(self, *, is_slow: bool) -> AsyncIterator[None]:
        """Have a place while the block runs."""
        place = _Place(self._slow if is_slow else self._quick)
        await place.kind.take()
        try:
            if not is_slow:
                self._watch(place)
            yield
        finally:
            if place.timer is not None:
                place.timer.cancel()
            place.kind.give_back()

    def _watch(self, place: "_Place") -> None:
        place.timer = asyncio.get_running_loop().call_later(self._patience_s, self._move, place)

    def _move(self, place: "_Place") -> None:
        if self._slow.take_free():
            place.kind = self._slow
            self._quick.give_back()
        else:
            self._watch(place)


class _Place:
    __slots__ = ("kind", "timer")

    def __init__(self, kind: "_Kind") -> None:
        self.kind = kind
        self.timer: asyncio.TimerHandle | None = None


class _Kind:
    """A semaphore that can also be asked without waiting."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take_free(self) -> bool:
        if self._free == 0:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        if self.take_free():
            return
        given = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        try:
            await given
        except asyncio.CancelledError:
            if not given.cancelled():  # it was given in the same moment
                self.give_back()
            raise

    def give_back(self) -> None:
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_result(None)
                return
        self._free += 1
