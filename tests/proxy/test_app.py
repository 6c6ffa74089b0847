"""What the composition root checks before it opens anything, and how it explains what ends it."""

import pytest

from envelope.errors import IntegrityError, MisuseError
from proxy import app, gate
from proxy.app import SelfCheckError, check_formats
from runtime.audit import AuditUnavailableError
from runtime.cli import CommandError, ExitCode


def test_the_formats_give_the_known_answers() -> None:
    check_formats()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_KAT_PLAIN", b"hellp"),
        ("_KAT_OBJECT", bytes.fromhex("00") + app._KAT_OBJECT[1:]),
        ("_KAT_MATERIAL", bytes(range(1, 33))),
    ],
)
def test_another_answer_is_found(monkeypatch: pytest.MonkeyPatch, name: str, value: bytes) -> None:
    monkeypatch.setattr(app, name, value)
    with pytest.raises(SelfCheckError):
        check_formats()


def test_a_key_that_opens_everything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_opened", lambda _sealed, _key: b"hello")
    with pytest.raises(SelfCheckError, match="foreign"):
        check_formats()


def test_what_ends_the_process_has_cause_and_next_step() -> None:
    own = CommandError("cause", "step")
    assert app._explained(ExceptionGroup("x", [ExceptionGroup("y", [own])])) is own
    full = app._explained(AuditUnavailableError("is full", "free it"))
    assert (full.cause, full.next_step, full.exit_code) == (
        "audit log is full",
        "free it",
        ExitCode.UNAVAILABLE,
    )
    unknown = app._explained(gate.UnknownEngineError(["mitmproxy 99"]))
    assert "mitmproxy 99" in unknown.cause
    assert "requirements-proxy.lock" in unknown.next_step
    for error in (MisuseError("x"), IntegrityError("y")):
        assert "doctor" in app._explained(error).next_step
