"""A clock that only a test moves. Implements `runtime.clock.Clock`.

Two ways to move it:

* `shift(delta_s)`: at once, from synchronous code. Sleepers that are due are woken but run later.
* `await advance(delta_s)`: stops at every sleeper's deadline on the way and lets what it woke run until it
  sleeps again or waits for something else, so five minutes of a loop pass in a millisecond.

Real I/O is not under the clock: await its result, or `wait_for_sleepers(n)`, before advancing further.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Coroutine

# 2027-01-15; inside the validity of every certificate of tests/pki.py.
WALL_S = 1_800_000_000.0
BOOT_S = 1_000.0
# Steps of the loop that a woken task gets before the clock moves on. A chain of awaits needs one each.
SETTLE_STEPS = 50


class ManualClock:
    def __init__(self, *, boot_s: float = BOOT_S, wall_s: float = WALL_S) -> None:
        self._boot_s = boot_s
        self._wall_s = wall_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def boot_s(self) -> float:
        return self._boot_s

    def wall_s(self) -> float:
        return self._wall_s

    def sleep(self, delay_s: float) -> Coroutine[None, None, None]:
        """Until *delay_s* after this call: not after the moment in which a task begins to wait for it."""
        return self._sleep_until(self._boot_s + delay_s) if delay_s > 0 else asyncio.sleep(0)

    async def _sleep_until(self, deadline_s: float) -> None:
        if deadline_s <= self._boot_s:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (deadline_s, next(self._order), future))
        await future

    @property
    def sleepers(self) -> int:
        """How many tasks sleep on this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def shift(self, delta_s: float) -> None:
        """Move both clocks by *delta_s* >= 0 seconds at once."""
        if delta_s < 0:
            raise ValueError("time does not go back; see set_wall for the wall clock")
        self._boot_s += delta_s
        self._wall_s += delta_s
        self._wake()

    def set_wall(self, wall_s: float) -> None:
        """Set the wall clock alone, also backwards, as an administrator may."""
        self._wall_s = wall_s

    async def advance(self, delta_s: float) -> None:
        """Move both clocks by *delta_s* seconds, stopping at each sleeper's deadline on the way."""
        end_s = self._boot_s + delta_s
        await self.settle()
        while (next_s := self._next_deadline_s()) is not None and next_s <= end_s:
            self._jump_to(next_s)
            await self.settle()
        self._jump_to(end_s)
        await self.settle()

    async def settle(self) -> None:
        """Let every task that can run do so."""
        for _ in range(SETTLE_STEPS):
            await asyncio.sleep(0)

    async def wait_for_sleepers(self, count: int = 1, *, timeout_s: float = 60) -> None:
        """Return when *count* tasks or more sleep on this clock; TimeoutError after *timeout_s* seconds."""
        deadline_s = time.monotonic() + timeout_s
        while self.sleepers < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.sleepers} sleepers, {count} awaited")
            await asyncio.sleep(0.001)

    def _next_deadline_s(self) -> float | None:
        while self._sleepers and self._sleepers[0][2].done():  # cancelled
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] if self._sleepers else None

    def _jump_to(self, boot_s: float) -> None:
        delta_s = max(0.0, boot_s - self._boot_s)
        self._wall_s += delta_s
        self._boot_s = max(self._boot_s, boot_s)  # exactly: sums of small steps would miss a deadline
        self._wake()

    def _wake(self) -> None:
        while (next_s := self._next_deadline_s()) is not None and next_s <= self._boot_s:
            heapq.heappop(self._sleepers)[2].set_result(None)
