"""How long a client connection may go on as it is: stands in for mitmproxy's watchdog.

mitmproxy has one time for all, and whatever arrives starts it anew: a byte every nine minutes keeps half a
request head, or half a handshake, for ever. Here (seconds in `proxy.limits`):

1. A handshake and a head have their time from their beginning; what arrives adds nothing to it.
2. A connection without a request has `keep_alive_s`, whatever frames or empty lines it sends meanwhile.
3. A request or a tunnel that is under way goes on for as long as something moves, on either side. A hook has
   no end here: those that wait have their own.
4. At the end of rule 3 a client who waits for nothing but a service's answer is told (504); everything else
   is cut, not ended. The handler sees to it.
5. One timer per connection, that looks at most LOOKS times within the shortest time: nothing is scheduled per
   request. An end can therefore come late, by the part of a look, and that of rule 2 by `keep_alive_s`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from math import inf
from typing import Final

from proxy.limits import ClientLimits

LOOKS: Final = 2


class Phase(StrEnum):
    """What a connection waits for."""

    HANDSHAKE = "handshake"
    HEAD = "head"
    QUIET = "quiet"
    BUSY = "busy"
    TUNNEL = "tunnel"


class Deadlines:
    """Of one connection; its events are told by the handler. `start` once, then `stop`."""

    def __init__(
        self,
        limits: ClientLimits,
        *,
        is_busy: Callable[[], bool],
        expired: Callable[[Phase], bool],
        now_s: Callable[[], float],
    ) -> None:
        """*expired* returns whether the connection goes on all the same; else the timer is over.

        *now_s*: a clock that is never set.
        """
        self._limits = limits
        self._is_busy = is_busy
        self._expired = expired
        self._now_s = now_s
        self._timer: asyncio.TimerHandle | None = None
        self._hooks = 0
        self._moved_s = self._opening_s = self._quiet_s = now_s()
        self._is_open = False
        self._is_tunnel = False
        self._was_busy = False
        self._head_s: float | None = None

    # ---- mitmproxy's side

    def register_activity(self) -> None:
        """Something has happened on one of the connections."""
        self._moved_s = self._now_s()

    async def watch(self) -> None:
        """What mitmproxy makes a task of."""
        self.start()

    @contextlib.contextmanager
    def disarm(self) -> Iterator[None]:
        """A hook is under way."""
        self._hooks += 1
        try:
            yield
        finally:
            self._hooks -= 1
            self.register_activity()

    # ---- what the handler tells

    def opens(self) -> None:
        """A handshake is expected, or a first request, from now on."""
        self._opening_s = self._now_s()
        self._is_open = False

    def opened(self) -> None:
        """The handshake has succeeded."""
        self._is_open = True
        self._quiet_s = self._now_s()

    def tunnelled(self) -> None:
        """What follows is passed through unread."""
        self._is_tunnel = True

    def head_begins(self) -> None:
        """A part of a request head is here."""
        if self._head_s is None:
            self._head_s = self._now_s()

    def requested(self) -> None:
        """A whole request head is here."""
        self._head_s = None
        self._is_open = self._was_busy = True

    # ---- the timer

    def start(self) -> None:
        if self._timer is None:
            self._look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def phase(self) -> tuple[Phase, float]:
        """What is waited for, and when that ends."""
        limits = self._limits
        if self._hooks:
            return Phase.BUSY, inf
        if self._is_tunnel:
            return Phase.TUNNEL, self._moved_s + limits.idle_s
        if self._is_busy():
            self._was_busy = True
            return Phase.BUSY, self._moved_s + limits.idle_s
        if self._head_s is not None:
            return Phase.HEAD, self._head_s + limits.head_s
        if not self._is_open:
            return Phase.HANDSHAKE, self._opening_s + limits.handshake_s
        if self._was_busy:  # since the last look
            self._was_busy = False
            self._quiet_s = self._now_s()
        return Phase.QUIET, self._quiet_s + limits.keep_alive_s

    def _look(self) -> None:
        phase, end_s = self.phase()
        now_s, limits = self._now_s(), self._limits
        if end_s <= now_s:
            if not self._expired(phase):
                return
            self._moved_s, end_s = now_s, inf
        shortest_s = min(limits.handshake_s, limits.head_s, limits.keep_alive_s, limits.idle_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(end_s - now_s, shortest_s / LOOKS), self._look)
