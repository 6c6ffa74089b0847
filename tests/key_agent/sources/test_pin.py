"""One attempt per PIN, remembered across a restart."""

import os
from pathlib import Path

import pytest

from key_agent.errors import KeySourceError, LoginRefusedError
from key_agent.sources.pin import PIN_SIZE_LIMIT, PinGate
from key_agent.sources.verdict import Verdict

MODULE = Path("/usr/lib/vendor.so")


@pytest.fixture
def pin_file(tmp_path: Path) -> Path:
    file = tmp_path / "pin"
    file.touch(mode=0o600)
    file.write_text("4711\n")
    return file


def gate(pin_file: Path, *, label: str = "token") -> PinGate:
    return PinGate(pin_file, pin_file.with_name("refused.json"), module_path=MODULE, token_label=label)


@pytest.mark.parametrize(
    ("content", "pin"),
    [
        (b"4711", "4711"),
        (b"4711\n", "4711"),
        (b"4711\r\n", "4711"),
        (b"4711\n\n", "4711\n"),
        (b" 47 11 ", " 47 11 "),
        ("user:pässwörd ✓\n".encode(), "user:pässwörd ✓"),
    ],
)
def test_a_pin_is_any_text_without_its_last_line_break(pin_file: Path, content: bytes, pin: str) -> None:
    pin_file.write_bytes(content)
    assert gate(pin_file).read().text == pin


def test_a_pin_has_no_repr(pin_file: Path) -> None:
    assert "4711" not in repr(gate(pin_file).read())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_pin_file_that_others_may_touch_is_refused(pin_file: Path, mode: int) -> None:
    pin_file.chmod(mode)
    with pytest.raises(KeySourceError, match="chmod 600"):
        gate(pin_file).read()


def test_an_unusable_pin_file_is_named(pin_file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeySourceError, match="No such file"):
        gate(tmp_path / "absent").read()
    with pytest.raises(KeySourceError, match="regular file"):
        gate(tmp_path).read()
    pin_file.write_bytes(b"\n")
    with pytest.raises(KeySourceError, match="empty"):
        gate(pin_file).read()
    pin_file.write_bytes(b"\xff\xfe")
    with pytest.raises(KeySourceError, match="UTF-8"):
        gate(pin_file).read()
    pin_file.write_bytes(b"1" * (PIN_SIZE_LIMIT + 1))
    with pytest.raises(KeySourceError, match="longer than"):
        gate(pin_file).read()


def test_a_refused_pin_is_not_given_out_again_until_its_file_changes(pin_file: Path) -> None:
    first = gate(pin_file)
    first.refuse(first.read().note, Verdict.AUTH_LOCKED)
    restarted = gate(pin_file)
    for closed in (first, restarted, restarted):
        with pytest.raises(LoginRefusedError) as caught:
            closed.read()
        assert caught.value.verdict is Verdict.AUTH_LOCKED
    pin_file.write_text("4712\n")
    os.utime(pin_file, ns=(1, 1))  # a coarse file clock must not decide this test
    assert restarted.read().text == first.read().text == "4712"


def test_the_same_pin_written_anew_counts_as_changed(pin_file: Path) -> None:
    """The operator mended the token and says so by touching the file."""
    first = gate(pin_file)
    first.refuse(first.read().note, Verdict.AUTH_PIN)
    os.utime(pin_file, ns=(1, 1))
    assert gate(pin_file).read().text == "4711"


def test_a_refusal_by_another_token_says_nothing(pin_file: Path) -> None:
    first = gate(pin_file)
    first.refuse(first.read().note, Verdict.AUTH_PIN)
    assert gate(pin_file, label="another").read().text == "4711"


def test_the_note_holds_no_pin_and_is_ours_alone(pin_file: Path) -> None:
    first = gate(pin_file)
    first.refuse(first.read().note, Verdict.AUTH_PIN)
    note = pin_file.with_name("refused.json")
    assert b"4711" not in note.read_bytes()
    assert note.stat().st_mode & 0o077 == 0


def test_a_note_that_cannot_be_written_closes_the_gate_all_the_same(tmp_path: Path, pin_file: Path) -> None:
    here = PinGate(pin_file, tmp_path / "absent" / "note", module_path=MODULE, token_label="token")
    here.refuse(here.read().note, Verdict.AUTH_PIN)
    with pytest.raises(LoginRefusedError):
        here.read()


def test_a_damaged_note_keeps_the_gate_closed(pin_file: Path) -> None:
    pin_file.with_name("refused.json").write_text("{")
    with pytest.raises(KeySourceError, match=r"refused\.json"):
        gate(pin_file).read()
