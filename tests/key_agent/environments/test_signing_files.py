"""`key-agent env sign`: a file is signed for what it asks, and the administrator is told that."""

import json
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from envelope.base64url import b64u_encode
from key_agent.cli import program
from key_agent.environments.approvals import Action, payload_sha256, payload_text
from key_agent.environments.documents import ApprovalBody
from key_agent.environments.recovery import Succession, recovery_payload
from key_agent.environments.registry_key import fingerprint_of
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
