"""Time is an argument.

1. Deadlines live on the boot clock, which counts on while a machine is suspended: a key must not outlive its
   end.
2. The wall clock is for what crosses machines (`iat`, `exp`, certificates, audit), never a deadline's only
   measure.
"""

import asyncio
import time
from typing import Protocol


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
        await asyncio.sleep(delay_s)
