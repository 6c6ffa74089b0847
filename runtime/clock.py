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
_READINGS: Final = 5


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


def wall_ahead_s(clock: Clock) -> float:
    """By how much the wall clock is ahead of the boot clock: a number that changes when somebody sets it, and
    when the machine was paused and it was set right after that.

    Of several readings the closest counts: a process may be held up between the two clocks.
    """

    def reading() -> tuple[float, float]:
        before_s, wall_s, after_s = clock.boot_s(), clock.wall_s(), clock.boot_s()
        return after_s - before_s, wall_s - before_s

    return min(reading() for _ in range(_READINGS))[1]
