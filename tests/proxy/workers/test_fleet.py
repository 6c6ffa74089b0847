"""When a worker is started again. All else real processes show (tests/integration/test_workers.py)."""

from proxy.workers.fleet import LONGEST_PAUSE_S, pause_s


def test_the_first_replacement_is_immediate_and_pauses_are_bounded() -> None:
    assert [pause_s(failures) for failures in range(5)] == [0, 0, 1, 2, 4]
    assert pause_s(1000) == LONGEST_PAUSE_S
