"""Administrators sign by a key under a passphrase, or by one that never leaves a smart card."""

import json
import subprocess
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from envelope.base64url import b64u_encode
from key_agent.cli import program
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, payload_sha256, payload_text
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody
from runtime import cli

APPROVAL = "a-0123456789abcdef"


def _file(directory: Path) -> tuple[Path, bytes]:
    """A file that asks for a promotion, and the bytes that are signed for it."""
    text = payload_text(
        {
            "agent": "agent-b",
            "environment": "b",
            "registry_key": b64u_encode(bytes(range(32))),
            "term": 4,
            "builds_on": {"term": 3, "epoch": 41, "digest": "ab" * 32},
        }
    )
    asked = ApprovalBody(
        action=Action.ENVIRONMENT_PROMOTE,
        subject="b",
        payload=text,
        payload_sha256=payload_sha256(text),
        requested_by="agent-b",
        requested_at_ms=1,
        expires_at_ms=2,
        signatures={},
    )
    file = directory / "promote.json"
    file.write_text(json.dumps({"tenant": "acme", "approval": APPROVAL, "asked": msgspec.to_builtins(asked)}))
    return file, approvals.statement("acme", APPROVAL, asked)


def _signatures(file: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(file.read_text())["asked"]["signatures"]
    return found


def _secret(file: Path, content: bytes) -> Path:
    file.touch(mode=0o600)
    file.write_bytes(content)
    return file


def _admin(public_pem: bytes) -> AdminBody:
    return AdminBody(
        name="ann",
        public_key=approvals.read_public_key(public_pem.decode()),
        state=AdminState.ACTIVE,
        added_at_ms=1,
        added_by="hq",
    )


def _sign(file: Path, *options: str | Path) -> int:
    return cli.main(program, ["env", "sign", str(file), "--admin", "ann", *map(str, options)])


def test_a_key_under_a_passphrase_signs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, statement = _file(tmp_path)
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame"))
    key = _secret(tmp_path / "ann.pem", pem)
    for wrong in ((), ("--passphrase-file", _secret(tmp_path / "wrong", b"another\n"))):
        assert _sign(file, "--key", key, *wrong) != 0
        assert "next: " in capsys.readouterr().err
        assert _signatures(file) == {}
    assert _sign(file, "--key", key, "--passphrase-file", _secret(tmp_path / "right", b"open sesame\n")) == 0
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    approvals.check_signature(_admin(public), statement, _signatures(file)["ann"])


def test_a_signature_from_elsewhere_is_brought_into_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """openssl stands for the smart card: it sees the statement, and nothing of ours sees its key."""
    file, statement = _file(tmp_path)
    written, card, signature = tmp_path / "statement", tmp_path / "card.pem", tmp_path / "signature"
    assert _sign(file, "--statement", written) == 0
    said = capsys.readouterr().out
    assert "environment-promote: b by agent agent-b, term 4" in said
    assert f"key-agent env sign {file} --admin ann --signature" in said
    assert written.read_bytes() == statement
    assert _signatures(file) == {}, "nothing is signed by writing it"
    for command in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", card],
        ["dgst", "-sha256", "-sign", card, "-out", signature, written],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, timeout=60)
    public = subprocess.run(
        ["openssl", "pkey", "-in", card, "-pubout"],
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    assert _sign(file, "--signature", signature) == 0
    assert "signed by ann" in capsys.readouterr().out
    approvals.check_signature(_admin(public), statement, _signatures(file)["ann"])


@pytest.mark.parametrize(
    "options",
    [(), ("--key", "k", "--signature", "s"), ("--statement", "s", "--passphrase-file", "p")],
    ids=["none", "two", "passphrase-of-nothing"],
)
def test_one_way_of_signing_is_chosen(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = _file(tmp_path)
    assert _sign(file, *options) == 2
    assert "one of --key, --statement and --signature" in capsys.readouterr().err
    assert _signatures(file) == {}


def test_a_signature_that_is_not_there_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = _file(tmp_path)
    assert _sign(file, "--signature", tmp_path / "gone") == 1
    assert "gone" in capsys.readouterr().err
    assert _sign(file, "--statement", tmp_path / "no" / "folder") == 1
    assert "folder" in capsys.readouterr().err
    assert _signatures(file) == {}
