"""What HAProxy is answered: the worst of two, in its own words."""

import re

import pytest

from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.answers import Report, answer, is_up, smoothed, weights

ACTIVE = EnvironmentState.ACTIVE
SERVES = Report(serves=True, state="active", latency_s=0.001)
_ALLOWED = re.compile(r"(?:up ready [0-9]{1,3}%|drain|maint|down #[A-Za-z0-9-]+)\n")


@pytest.mark.parametrize(
    ("state", "report", "expected"),
    [
        (ACTIVE, SERVES, "up ready 100%"),
        (ACTIVE, None, "down #silent"),
        (ACTIVE, Report(serves=False, state="healing", latency_s=1), "down #healing"),
        (ACTIVE, Report(serves=False, state="untold", latency_s=1), "down #untold"),
        (ACTIVE, Report(serves=True, state="draining", latency_s=1), "drain"),
        (EnvironmentState.DRAINING, SERVES, "drain"),
        (EnvironmentState.HEALING, SERVES, "down #healing"),
        (EnvironmentState.HEALING, None, "down #healing"),
        (EnvironmentState.HEALED, SERVES, "down #healed"),
        (EnvironmentState.REJOINING, SERVES, "down #rejoining"),
        (EnvironmentState.PROVISIONING, SERVES, "maint"),
        (EnvironmentState.JOINING, SERVES, "maint"),
        (EnvironmentState.RETIRED, SERVES, "maint"),
        (None, SERVES, "down #unknown"),
        (ACTIVE, Report(serves=False, state="x\nup ready 100%\n", latency_s=1), "down #xupready100"),
        (ACTIVE, Report(serves=False, state="", latency_s=1), "down #refuses"),
    ],
)
def test_the_worst_of_both(state: EnvironmentState | None, report: Report | None, expected: str) -> None:
    line = answer(state, report, is_fresh=True)
    assert line == expected + "\n"
    assert _ALLOWED.fullmatch(line)


def test_the_last_one_whose_hsm_is_silent_goes_on() -> None:
    """Nobody else is up, and it has keys. What the rows drain or withdraw is no last one."""
    silent = Report(serves=True, state="draining", latency_s=1)
    assert answer(ACTIVE, silent, is_fresh=True) == "drain\n"
    assert answer(ACTIVE, silent, is_fresh=True, is_last=True) == "up ready 100%\n"
    assert answer(EnvironmentState.DRAINING, silent, is_fresh=True, is_last=True) == "drain\n"
    assert answer(EnvironmentState.HEALING, silent, is_fresh=True, is_last=True) == "down #healing\n"
    assert answer(ACTIVE, silent, is_fresh=False, is_last=True) == "down #unknown\n"
    gone = Report(serves=False, state="draining", latency_s=1)
    assert answer(ACTIVE, gone, is_fresh=True, is_last=True) == "down #draining\n"
    assert answer(ACTIVE, None, is_fresh=True, is_last=True) == "down #silent\n"
    assert not is_up("drain\n")
    assert is_up(answer(ACTIVE, SERVES, is_fresh=True))


@pytest.mark.parametrize("state", [None, *EnvironmentState])
def test_what_is_old_counts_for_nothing(state: EnvironmentState | None) -> None:
    assert answer(state, SERVES, is_fresh=False) == "down #unknown\n"


def test_weights_follow_latency_and_are_never_nothing() -> None:
    assert weights({"a": 0.010, "b": 0.060, "c": 0.010}) == {"a": 100, "b": 17, "c": 100}
    assert weights({"a": 0.001, "b": 10.0})["b"] == 5
    assert weights({"a": 0.0}) == {"a": 100}
    assert weights({}) == {}
    assert answer(ACTIVE, SERVES, is_fresh=True, weight=0) == "up ready 5%\n"
    assert answer(ACTIVE, SERVES, is_fresh=True, weight=500) == "up ready 100%\n"


def test_latencies_are_smoothed() -> None:
    assert smoothed(None, 0.5) == 0.5
    assert 0.1 < smoothed(0.1, 1.0) < 0.5
