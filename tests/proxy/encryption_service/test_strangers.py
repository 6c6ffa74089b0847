from proxy.encryption_service.strangers import BURST, PER_S, Strangers
from tests.fakes.clock import ManualClock


def test_so_many_are_recorded_and_the_next_one_stands_for_the_rest(clock: ManualClock) -> None:
    strangers = Strangers(clock)
    counts = [strangers.counted() for _ in range(int(BURST) + 50)]
    assert counts == [1] * int(BURST) + [0] * 50
    clock.shift(1 / PER_S)
    assert [strangers.counted(), strangers.counted()] == [51, 0]
    clock.shift(3600)
    assert sum(bool(strangers.counted()) for _ in range(1000)) == BURST
