"""When an HSM is called slow: by what is in it, not by what waits for it; and when it is quick again."""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable

import pytest

from key_agent.sources.pace import START_ALLOWANCE_S, Pace, Stopwatch, starved_s
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import Kek, Verdict
from tests.fakes.clock import ManualClock
from tests.key_agent.conftest import until
from tests.key_agent.sources.conftest import REFERENCE, FakeModule, MakeSource, new_keys, request_for


def heard(pace: Pace) -> list[str | None]:
    said: list[str | None] = []
    pace.listen(said.append)
    return said


def test_one_that_is_late_is_slow_until_two_answers_in_a_row_are_quick() -> None:
    pace = Pace(1.0)
    said = heard(pace)
    pace.answered(30.0)
    assert not is_slow(pace), "only what is late makes it slow: an answer has come"
    pace.late(1.05)
    pace.late(1.05)
    reason = "the HSM did not answer within 1 s"
    assert said == [reason], "said once"
    pace.answered(0.1)
    assert is_slow(pace), "one is not enough"
    pace.answered(0.6)
    pace.answered(0.1)
    pace.failed()
    pace.answered(0.1)
    assert is_slow(pace), "not in a row: one took too long, one failed"
    pace.late(1.05)
    pace.answered(0.1)
    assert is_slow(pace), "nor over one that is late"
    pace.answered(0.5)
    assert not is_slow(pace)
    assert said == [reason, None]
    pace.late(2.0)
    assert said == [reason, None, reason], "its quick answers of then do not count again"


def is_slow(pace: Pace) -> bool:
    return pace.slow is not None


class Starved:
    """What a worker had to wait for a processor, in its life so far."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self, _pid: int) -> float:
        return self.seconds


def stopwatch(
    pace: Pace, clock: ManualClock, starved: Callable[[int], float], *, allowed_s: float = 0.0
) -> Stopwatch:
    return Stopwatch(pace, clock, os.getpid(), allowed_s=allowed_s, counts=True, starved=starved)


async def looked(_pace: Pace) -> None:
    """Return when every look that is due has been made: at most 0.05 s lie between two."""
    await asyncio.sleep(0.3)


async def test_a_request_is_late_before_it_is_answered(clock: ManualClock) -> None:
    pace, starved = Pace(0.02), Starved()
    with stopwatch(pace, clock, starved):
        await looked(pace)
        assert not is_slow(pace), "by its clock no time has passed"
        clock.shift(0.03)
        await until(lambda: is_slow(pace))
    with stopwatch(pace, clock, starved):
        clock.shift(0.01)
    assert is_slow(pace)
    with stopwatch(pace, clock, starved):
        clock.shift(0.01)
    assert not is_slow(pace)


async def test_what_it_may_take_and_what_the_machine_takes_is_not_the_hsms(clock: ManualClock) -> None:
    pace, starved = Pace(0.02), Starved()
    with stopwatch(pace, clock, starved, allowed_s=0.25):
        clock.shift(0.26)
        await looked(pace)
        clock.shift(5.0)
        starved.seconds += 5.0
        await looked(pace)
        assert not is_slow(pace)
        clock.shift(0.02)
        await until(lambda: is_slow(pace))


async def test_a_loop_that_was_held_up_reads_what_has_come_before_it_judges(clock: ManualClock) -> None:
    pace = Pace(0.02)
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with stopwatch(pace, clock, Starved()):
        asyncio.get_running_loop().call_later(0.03, answer.set_result, None)
        clock.shift(60.0)
        time.sleep(0.04)  # noqa: ASYNC251 - both are due when the loop gets its turn again
        await answer
    await looked(pace)
    assert not is_slow(pace)


async def test_what_came_to_nothing_is_no_quick_answer(clock: ManualClock) -> None:
    pace = Pace(0.02)
    pace.late(1.0)
    pace.answered(0.0)
    with pytest.raises(TimeoutError), stopwatch(pace, clock, Starved()):
        raise TimeoutError
    pace.answered(0.0)
    assert is_slow(pace)


def burn(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    while True:
        pass


def test_the_kernel_tells_for_how_long_a_process_got_no_processor() -> None:
    assert starved_s(2**22 + 1) == 0.0, "nobody has this pid"
    cpu = min(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    several = [context.Process(target=burn, args=(cpu,)) for _ in range(2)]
    try:
        for one in several:
            one.start()
        deadline_s = time.monotonic() + 60
        pids = [one.pid for one in several if one.pid is not None]
        while not all(starved_s(pid) > 0.1 for pid in pids):
            assert time.monotonic() < deadline_s, "two on one processor, and none waits?"
            time.sleep(0.02)
    finally:
        for one in several:
            one.kill()
            one.join()
            one.close()


# With a real worker.


@pytest.fixture
async def kek(source: Pkcs11Source) -> Kek:
    return await source.create_kek(REFERENCE)


async def until_quick(source: Pkcs11Source, kek: Kek) -> None:
    """Look at the KEK until the answers of a machine with other work are quick, too."""
    deadline_s = time.monotonic() + 60
    while (await source.diagnose(kek)).verdict is not Verdict.OK or is_slow(source.pace):
        assert time.monotonic() < deadline_s


async def test_a_hang_is_told_before_the_time_out_and_is_over_when_the_hsm_answers(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings(slow_after_s=0.3, request_timeout_s=4.0))
    await until_quick(source, kek)
    events: list[str] = []
    source.pace.listen(lambda slow: events.append("quick" if slow is None else "slow"))
    fake.fail(C_Decrypt="hang")
    found = await source.diagnose(kek)
    events.append(found.verdict)
    assert events == ["slow", "unreachable"], "an outage in the end, and never a revocation"
    fake.recover()
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    assert is_slow(source.pace), "one answer is not enough"
    await until_quick(source, kek)
    assert events == ["slow", "unreachable", "quick"]


async def test_a_start_that_hangs_is_told_too(make_source: MakeSource, fake: FakeModule, kek: Kek) -> None:
    source = make_source(fake.settings(slow_after_s=0.1, start_timeout_s=60 + START_ALLOWANCE_S))
    fake.fail(C_Initialize="hang")
    asking = asyncio.create_task(source.diagnose(kek), name="diagnosis")
    await until(lambda: is_slow(source.pace), timeout_s=60)
    assert not asking.done()
    await source.close()
    assert (await asking).verdict is Verdict.UNREACHABLE


async def test_a_busy_hsm_is_not_slow(make_source: MakeSource, fake: FakeModule, kek: Kek) -> None:
    """Several at once, and 200 ms for each call: the last, and the canary, wait for seconds. None is late."""
    source = make_source(fake.settings(slow_after_s=2.0))
    keys = await source.generate(kek, new_keys(6))
    said = heard(source.pace)
    fake.fail(C_Decrypt="slow")
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for key in keys:
            group.create_task(source.seal_envelopes(kek, [request_for(key)]), name="seal")
        await asyncio.sleep(0)
        watch = group.create_task(source.diagnose(kek), name="watch")
    assert watch.result().verdict is Verdict.OK
    assert time.monotonic() - began_s > 2.5, "one that counted the wait would call it slow"
    assert said == []


async def test_to_make_keys_may_take_its_time(make_source: MakeSource, fake: FakeModule, kek: Kek) -> None:
    source = make_source(fake.settings(slow_after_s=0.1))
    await source.diagnose(kek)
    said = heard(source.pace)
    fake.fail(C_Encrypt="slow")
    await source.generate(kek, new_keys(2))
    assert [one for one in said if one is not None] == []
