"""Time is an argument.

1. Deadlines live on the boot clock, which counts on while a machine is suspended: a key must not outlive its
   end.
2. The wall clock is for what crosses machines (`iat`, `exp`, certificates, audit), never a deadline's only
   measure.
3. Sleeping counts on the boot clock too. asyncio's timers stand still while the machine is suspended, so the
   boot clock is looked at every now and then.
"""

import asyncio
import time
from typing import Final, Protocol

LONGEST_NAP_S: Final = 1.0


class Clock(Protocol):
    def boot_s(self) -> float:
        """Seconds on CLOCK_BOOTTIME."""

    def wall_s(self) -> float:
        """Seconds since the Unix epoch."""

    async def sleep(self, delay_s: float) -> None:
        """Return when *delay_s* seconds have passed."""


class SystemClock:
    def boot_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_s(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        end_s = self.boot_s() + delay_s
        await asyncio.sleep(min(delay_s, LONGEST_NAP_S))
        while (left_s := end_s - self.boot_s()) > 0:  # noqa: ASYNC110 - no event tells of a suspension
            await asyncio.sleep(min(left_s, LONGEST_NAP_S))
