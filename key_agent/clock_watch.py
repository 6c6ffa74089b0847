"""Notices that this machine's wall clock was set, and has all proxies pushed to at once.

1. While the clock was wrong, proxies refused what this agent sent (`time`), or it sent what ends too early.
   Whether it is right now nobody can tell here: one more push to each shows it, and its failures are tried
   again as any others, from one second on.
2. Nothing that restricts depends on it: withdrawals, the KEK watch and the registry's lease go by clocks that
   cannot be set. A proxy whose own clock was set says so by another `instance` (presence.py).
"""

from collections.abc import Callable
from typing import Final, NoReturn

import structlog

from key_agent.journal import Journal
from runtime.clock import Clock, wall_ahead_s

SET_S: Final = 5.0
"""Proxies let 30 s pass: less than this makes nobody refuse anything."""

log = structlog.get_logger(__name__)


class ClockWatch:
    def __init__(
        self, *, clock: Clock, journal: Journal, look_s: float, push_at_once: Callable[[], None]
    ) -> None:
        """*look_s*: between two looks. *push_at_once* must not wait and must not raise."""
        self._clock = clock
        self._journal = journal
        self._look_s = look_s
        self._push_at_once = push_at_once
        self._ahead_s = wall_ahead_s(clock)

    async def run(self) -> NoReturn:
        while True:
            await self._clock.sleep(self._look_s)
            self.look()

    def look(self) -> None:
        """Small steps count together, until they are worth a word."""
        ahead_s = wall_ahead_s(self._clock)
        set_s = ahead_s - self._ahead_s
        if abs(set_s) < SET_S:
            return
        self._ahead_s = ahead_s
        log.warning("the wall clock was set", ahead_s=round(set_s, 1))
        self._journal.note("clock-set", ahead_ms=round(set_s * 1000))
        self._push_at_once()
