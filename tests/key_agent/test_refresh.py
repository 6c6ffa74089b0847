"""When something is due: pure, so nothing waits here."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from key_agent.refresh import Schedule, next_delay, wait_until
from tests.fakes.clock import ManualClock


def test_the_interval_is_shortened_by_a_tenth_at_most() -> None:
    assert next_delay(interval_s=300, failures=0, jitter=0) == 300
    assert next_delay(interval_s=300, failures=0, jitter=1) == 270


def test_after_failures_1_2_4_up_to_the_interval() -> None:
    delays = [next_delay(interval_s=300, failures=failures, jitter=0.5) for failures in range(1, 12)]
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


@given(failures=st.integers(0, 10**9), jitter=st.floats(0, 1), interval_s=st.integers(1, 86400))
def test_no_number_of_failures_overflows(failures: int, jitter: float, interval_s: int) -> None:
    assert 0 < next_delay(interval_s=interval_s, failures=failures, jitter=jitter) <= interval_s


def test_new_ones_are_due_at_once_and_gone_ones_are_forgotten() -> None:
    schedule = Schedule()
    schedule.keep(["a", "b"], 10)
    assert schedule.take_due(10) == ["a", "b"]
    schedule.keep(["b", "c"], 11)
    assert schedule.take_due(11) == ["c"], "b is in flight"
    schedule.done("a", lambda _: 0, succeeded=True)
    assert schedule.next_due_s() is None


def test_one_in_flight_is_not_due_until_it_is_done() -> None:
    schedule = Schedule()
    schedule.keep(["a"], 0)
    assert schedule.take_due(0) == ["a"]
    assert schedule.take_due(1000) == []
    schedule.done("a", lambda failures: 300 + failures, succeeded=True)
    assert schedule.next_due_s() == 300
    assert schedule.take_due(299) == []
    assert schedule.take_due(300) == ["a"]
    schedule.done("a", lambda failures: 600 + failures, succeeded=False)
    assert schedule.next_due_s() == 601
    assert schedule.failures("a") == 1


def test_at_once_while_in_flight_means_once_more() -> None:
    """What is on its way may carry what was true before."""
    schedule = Schedule()
    schedule.keep(["a", "b"], 0)
    assert schedule.take_due(0) == ["a", "b"]
    schedule.at_once(1, ["a"])
    assert schedule.take_due(1) == []
    schedule.done("a", lambda _: 300, succeeded=True)
    schedule.done("b", lambda _: 300, succeeded=True)
    assert schedule.take_due(1) == ["a"]
    schedule.done("a", lambda _: 300, succeeded=True)
    assert schedule.next_due_s() == 300


def test_at_once_ends_a_back_off() -> None:
    schedule = Schedule()
    schedule.keep(["a"], 0)
    schedule.take_due(0)
    schedule.done("a", lambda _: 256, succeeded=False)
    schedule.at_once(5)
    assert schedule.take_due(5) == ["a"]
    assert schedule.failures("a") == 0


@pytest.mark.parametrize("at_s", [None, 1500.0])
async def test_waiting_ends_by_the_event(clock: ManualClock, at_s: float | None) -> None:
    wake = asyncio.Event()
    waiting = asyncio.create_task(wait_until(clock, wake, at_s))
    await clock.advance(100)
    assert not waiting.done()
    wake.set()
    await waiting
    assert not wake.is_set()
    assert clock.sleepers == 0


async def test_waiting_ends_by_the_clock(clock: ManualClock) -> None:
    waiting = asyncio.create_task(wait_until(clock, asyncio.Event(), clock.boot_s() + 100))
    await clock.advance(99)
    assert not waiting.done()
    await clock.advance(1)
    await waiting
