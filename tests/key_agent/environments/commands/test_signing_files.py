"""`key-agent env sign`: a file is signed for what it asks, and the administrator is told that."""

import json
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from envelope.base64url import b64u_encode
from key_agent.cli import program
from key_agent.environments.commands import approval_cli
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, payload_sha256, payload_text
from key_agent.environments.shared.documents import ApprovalBody
from key_agent.environments.shared.recovery import Succession, recovery_payload
from key_agent.environments.shared.registry_key import fingerprint_of
from runtime import cli

KEY = b64u_encode(bytes(range(32)))
DIGEST = "ab" * 32
RECOVERY = recovery_payload(
    agent="agent-b",
    environment="b",
    registry_key=KEY,
    term=3,
    epoch=41,
    digest=DIGEST,
    by=Succession(old_kek=None, lost=True, new_kek="kek-9", kek_fingerprint="cd" * 32),
)


def _file(directory: Path, action: str, payload: object) -> Path:
    text = payload_text(payload) if isinstance(payload, dict) else str(payload)
    asked = ApprovalBody(
        action=action,
        subject="b",
        payload=text,
        payload_sha256=payload_sha256(text),
        requested_by="agent-b",
        requested_at_ms=1,
        expires_at_ms=2,
        signatures={},
    )
    file = directory / "file.json"
    # What is beside `asked` is nobody's word.
    shown = {"action": "environment-promote", "kept": 9, "lost": [], "registry_fingerprint": "00" * 32}
    file.write_text(
        json.dumps(
            {"tenant": "acme", "approval": "a-" + "0" * 16, "asked": msgspec.to_builtins(asked), **shown}
        )
    )
    return file


def _sign(directory: Path, file: Path) -> int:
    key = directory / "ann.pem"
    key.touch(mode=0o600)
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return cli.main(program, ["env", "sign", str(file), "--admin", "ann", "--key", str(key)])


def test_who_signs_reads_what_was_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path, Action.ENVIRONMENT_RECOVER, RECOVERY)
    assert _sign(tmp_path, file) == 0
    page = capsys.readouterr().out
    for said in (
        "environment-recover: b by agent agent-b, term 4",
        fingerprint_of(KEY),
        "registry of term 3 at epoch 41, abababababababab...",
        f"KEK kek-9, fingerprint {'cd' * 32}; keys from no KEK of before",
        "GIVEN UP FOR EVER",
        "signed by ann",
    ):
        assert said in page
    assert list(json.loads(file.read_text())["asked"]["signatures"]) == ["ann"]


@pytest.mark.parametrize(
    ("action", "payload"),
    [
        (Action.KEYS_RETIRE, {"accept_loss": True, "keys": ["k"]}),
        (Action.INCIDENT_CANCEL, {}),
        (Action.ENVIRONMENT_PROMOTE, {}),
        (Action.ENVIRONMENT_PROMOTE, {**RECOVERY, "registry_key": "AA"}),
        (Action.ENVIRONMENT_PROMOTE, {**RECOVERY, "environment": "b\x1b[2J"}),
        (Action.ENVIRONMENT_RECOVER, "no JSON"),
        (Action.ENVIRONMENT_RECOVER, "[]"),
    ],
)
def test_nothing_else_is_signed(
    action: Action, payload: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, action, payload)
    assert _sign(tmp_path, file) == 3
    assert "next: " in capsys.readouterr().err
    assert json.loads(file.read_text())["asked"]["signatures"] == {}


def _statement(**changes: object) -> bytes:
    text = payload_text({"keys": ["k"]})
    asked = ApprovalBody(
        action=Action.KEYS_RETIRE,
        subject="acme",
        payload=text,
        payload_sha256=payload_sha256(text),
        requested_by="agent-a",
        requested_at_ms=1,
        expires_at_ms=2,
        signatures={},
    )
    return approvals.statement("acme", "a-0123456789abcdef", msgspec.structs.replace(asked, **changes))


def _sign_statement(directory: Path, content: bytes) -> int:
    key, file = directory / "ann.pem", directory / "statement"
    key.touch(mode=0o600)
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    file.write_bytes(content)
    return cli.main(program, ["approval", "sign-file", str(file), "--key", str(key)])


def test_who_signs_a_statement_reads_what_it_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sign_statement(tmp_path, _statement()) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 1, "the signature alone, for `approval submit`"
    assert "a-0123456789abcdef: keys-retire of acme" in err
    assert payload_sha256(payload_text({"keys": ["k"]})) in err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"any file",
        b"sealgate approval v1\n",
        b"sealgate approval v1\n{}",
        _statement()[:-1],
        _statement() + b" ",
        _statement().replace(b'"tenant"', b'"tenants"'),
        _statement().replace(b"sealgate approval v1\n", b""),
        _statement().replace(b"keys-retire", b"keys-retire\\u001b[2J"),
        _statement().replace(b"acme", b"\xff"),
    ],
    ids=["empty", "other", "no-body", "no-members", "cut", "longer", "member", "domain", "escape", "no-utf8"],
)
def test_no_other_bytes_are_signed(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sign_statement(tmp_path, content) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "next: " in err


@pytest.mark.parametrize(
    "changes",
    [
        {"action": Action.KEY_RESCUE},
        {"subject": "other"},
        {"payload": payload_text({"keys": ["another"]})},
        {"payload": "no ascii: \xe9"},
    ],
    ids=["action", "subject", "payload", "not-ascii"],
)
def test_what_the_agent_shows_has_to_be_what_is_signed(
    changes: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = payload_text({"keys": ["k"]})
    shown = {
        "approval": "a-0123456789abcdef",
        "state": "open",
        "action": Action.KEYS_RETIRE,
        "subject": "acme",
        "payload": text,
        "requested_by": "agent-a",
        "expires_at_ms": 2,
        "used_at_ms": None,
        "signatures": {},
        "missing": 2,
        "statement": _statement().decode(),
    }
    answers: list[dict[str, object]] = [shown, shown, shown | changes]
    called: list[str] = []

    def perform(_context: object, command: str, **_arguments: object) -> dict[str, object]:
        called.append(command)
        return answers.pop()

    monkeypatch.setattr(approval_cli, "perform", perform)
    key = tmp_path / "ann.pem"
    key.touch(mode=0o600)
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    command = ["approval", "sign", "a-0123456789abcdef", "--admin", "ann", "--key", str(key), "--yes"]
    assert cli.main(program, command) == 3
    assert "not of what is shown" in capsys.readouterr().err
    assert called == ["approval_show"], "no signature has left"
    assert cli.main(program, command) == 0
    assert called[-1] == "approval_sign"
