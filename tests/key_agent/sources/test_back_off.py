"""A key server that wants to be asked less: for how long it is left alone, and that it is."""

from typing import Any

import pytest

from key_agent.errors import KeySourceError
from key_agent.sources.back_off import MAX_S, BackOff
from key_agent.sources.key_server import KeyServerSource
from key_agent.sources.source import Verdict
from tests.environments.site import until
from tests.fakes.clock import ManualClock
from tests.key_agent.sources.conftest import REFERENCE, MakeSource, new_keys
from tests.key_servers import BaoServer


def test_the_servers_own_word_is_believed_up_to_a_bound(clock: ManualClock) -> None:
    back_off = BackOff(clock)
    assert back_off.left_s() == 0
    back_off.throttled(7)
    assert back_off.left_s() == 7
    clock.shift(6.5)
    assert back_off.left_s() == 0.5
    clock.shift(1)
    assert back_off.left_s() == 0
    back_off.throttled(3600)
    assert back_off.left_s() == MAX_S


def test_without_a_word_it_is_left_alone_twice_as_long_each_time(clock: ManualClock) -> None:
    back_off = BackOff(clock)
    waits = []
    for _ in range(7):
        back_off.throttled(0)
        waits.append(back_off.left_s())
        clock.shift(back_off.left_s())
    assert waits == [1, 2, 4, 8, 16, MAX_S, MAX_S]
    for _ in range(2000):  # no float overflows
        back_off.throttled(0)
    assert back_off.left_s() == MAX_S
    back_off.answered()
    clock.shift(MAX_S)
    back_off.throttled(0)
    assert back_off.left_s() == 1


async def test_a_server_that_throttles_is_not_asked_and_keeps_its_worker(
    make_source: MakeSource, openbao_server: BaoServer
) -> None:
    openbao_server.clear()
    source: Any = make_source(openbao_server.settings())
    assert isinstance(source, KeyServerSource)
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    pid = source.worker_pid
    openbao_server.throttle(rate=1, interval_s=20)
    try:
        verdicts = []

        async def throttled() -> bool:
            verdicts.append((await source.diagnose(kek)).verdict)
            return verdicts[-1] is Verdict.THROTTLED

        await until(throttled, timeout_s=30)
        assert set(verdicts) <= {Verdict.OK, Verdict.THROTTLED}
        # It says for how long. Nothing is asked meanwhile: a server that is gone would be found out.
        openbao_server.freeze()
        found = await source.diagnose(kek)
        assert (found.verdict, found.detail[:34]) == (Verdict.THROTTLED, "the key server is not asked again ")
        with pytest.raises(KeySourceError) as caught:
            await source.generate(kek, new_keys(1))
        assert caught.value.verdict is Verdict.THROTTLED
        assert not caught.value.verdict.withdraws
        assert source.worker_pid == pid
    finally:
        openbao_server.thaw()
        openbao_server.throttle(rate=None)
    verdicts = []

    async def works() -> bool:
        verdicts.append((await source.diagnose(kek)).verdict)
        return verdicts[-1] is Verdict.OK

    await until(works, timeout_s=60)
    assert set(verdicts) <= {Verdict.OK, Verdict.THROTTLED}
    assert await source.generate(kek, new_keys(1))
    assert key.kek_id == REFERENCE.kek_id
