"""How much of its time a thread wanted to run."""

import time
from pathlib import Path

import pytest

from proxy.encryption_service.pressure import Pressure


def test_it_is_what_the_thread_ran_and_waited_for_a_core(tmp_path: Path) -> None:
    source = tmp_path / "schedstat"
    pressure = Pressure(source)
    looks = []
    for now_s, text in [(10.0, "5000 0 1"), (11.0, "300005000 200000000 9"), (12.0, "300005000 200000000 9")]:
        source.write_text(text)
        looks.append(pressure.look(now_s))
    assert looks == [0.0, pytest.approx(0.5), 0.0]
    source.write_text("9300005000 200000000 9")
    assert pressure.look(13.0) == 1.0  # never more than there is
    source.write_text("300005000 0 9")
    assert pressure.look(14.0) == 0.0  # nor less than nothing


@pytest.mark.parametrize("text", ["", "1 2", "a b c", None])
def test_of_a_kernel_that_does_not_tell_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    source = tmp_path / "schedstat"
    if text is not None:
        source.write_text(text)
    assert Pressure(source).look(1.0) == 0.0


def test_this_thread_working_without_pause_is_at_its_end() -> None:
    pressure = Pressure.of_this_thread()
    pressure.look(time.monotonic())
    end_s = time.monotonic() + 0.2
    while time.monotonic() < end_s:
        pass
    assert pressure.look(time.monotonic()) > 0.9  # alone on a core, or waiting for one
