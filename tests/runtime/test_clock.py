import asyncio
import time
from typing import override

import pytest

from runtime.clock import Clock, SystemClock, wall_ahead_s
from tests.fakes.clock import BOOT_S, WALL_S, ManualClock


async def test_the_system_clock_reads_what_it_says() -> None:
    clock = SystemClock()
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.boot_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert abs(clock.wall_s() - time.time()) < 60
    await clock.sleep(0.01)
    assert clock.boot_s() >= before + 0.01


class Suspended(SystemClock):
    """A machine that was suspended for *gone_s* seconds: only its boot clock has seen them."""

    gone_s = 0.0

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self.gone_s


async def test_sleep_does_not_sleep_on_after_a_suspension() -> None:
    """asyncio's timers stand still meanwhile: a refresh due in 300 s would come 300 s after waking up."""
    clock = Suspended()
    sleeping = asyncio.create_task(clock.sleep(300))
    await asyncio.sleep(0.01)
    clock.gone_s = 400
    await asyncio.wait_for(sleeping, 30)


@pytest.mark.parametrize("make", [SystemClock, ManualClock])
async def test_both_are_clocks(make: type[SystemClock] | type[ManualClock]) -> None:
    clock: Clock = make()
    await clock.sleep(0)
    assert clock.boot_s() >= 0


async def test_advance_stops_at_each_deadline() -> None:
    clock = ManualClock()
    seen: list[float] = []

    async def tick(interval_s: float) -> None:
        while True:
            await clock.sleep(interval_s)
            seen.append(clock.boot_s() - BOOT_S)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(tick(interval_s)) for interval_s in (2, 5)]
        await clock.advance(10)
        assert seen == [2, 4, 5, 6, 8, 10, 10]
        assert (clock.boot_s(), clock.wall_s()) == (BOOT_S + 10, WALL_S + 10)
        assert clock.sleepers == 2
        await clock.advance(0.5)
        assert len(seen) == 7
        for task in tasks:
            task.cancel()
    assert clock.sleepers == 0
    await clock.advance(100)  # the cancelled sleepers are forgotten
    assert len(seen) == 7


async def test_shift_moves_at_once_and_wakes_later() -> None:
    clock = ManualClock()
    woken = asyncio.Event()

    async def sleeper() -> None:
        await clock.sleep(5)
        woken.set()

    task = asyncio.create_task(sleeper())
    await clock.wait_for_sleepers(1)
    clock.shift(4)
    await clock.settle()
    assert not woken.is_set()
    clock.shift(1)
    assert not woken.is_set()
    await task
    with pytest.raises(ValueError, match="does not go back"):
        clock.shift(-1)


async def test_the_wall_clock_alone_can_be_set() -> None:
    clock = ManualClock()
    clock.set_wall(1)
    assert (clock.boot_s(), clock.wall_s()) == (BOOT_S, 1)
    await clock.advance(2)
    assert (clock.boot_s(), clock.wall_s()) == (BOOT_S + 2, 3)


async def test_waiting_for_sleepers_ends() -> None:
    clock = ManualClock()
    with pytest.raises(TimeoutError, match="0 sleepers"):
        await clock.wait_for_sleepers(1, timeout_s=0.01)


class HeldUp(ManualClock):
    """Between its two clocks the reader is held up, once each time."""

    for_s = 0.0

    @override
    def wall_s(self) -> float:
        found = super().wall_s()
        if self.for_s:
            lost, self.for_s = self.for_s, 0.0
            self.shift(lost)
        return found


def test_how_far_the_wall_clock_is_ahead_changes_when_it_is_set_alone() -> None:
    clock = HeldUp()
    at_first_s = wall_ahead_s(clock)
    assert at_first_s == WALL_S - BOOT_S
    clock.shift(1000)
    assert wall_ahead_s(clock) == at_first_s
    clock.for_s = 5.0
    assert wall_ahead_s(clock) == at_first_s, "not by who is held up between two readings"
    clock.set_wall(clock.wall_s() - 30)
    assert wall_ahead_s(clock) == at_first_s - 30
