"""The limits are checked where they are read, and what the process may open bounds them."""

import pytest

from proxy.limits import ClientLimits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connections", 0),
        ("connections", 1_000_001),
        ("connections_per_peer", 0),
        ("handshake_s", 0.0),
        ("head_s", 0.05),
        ("keep_alive_s", 86_401.0),
        ("idle_s", -1.0),
        ("idle_s", float("nan")),
    ],
)
def test_what_would_let_nobody_in_or_never_end_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"limits\.{name} must be between"):
        ClientLimits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("open_files", "places"), [(65_536, 16_384), (20_000, 14_808), (1_024, 576), (256, 1), (0, 1)]
)
def test_files_are_left_for_everything_else(open_files: int, places: int) -> None:
    assert ClientLimits().places(open_files) == places


def test_fewer_were_asked_for() -> None:
    assert ClientLimits(connections=10).places(65_536) == 10
