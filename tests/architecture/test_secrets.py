"""No private key, certificate, password or token is committed."""

import re
import subprocess
from collections.abc import Iterable
from typing import Final

import pytest

from tests.architecture.tree import ROOT

# Spelled so that this file does not find itself.
PATTERNS: Final = {
    "a private key": re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE" rb" KEY-----\s+[A-Za-z0-9+/=]{16}"),
    "a certificate": re.compile(rb"-----BEGIN (?:TRUSTED )?CERTI" rb"FICATE-----\s+[A-Za-z0-9+/=]{16}"),
    "a private JWK": re.compile(rb'"kty"\s*:\s*"(?:EC|RSA|OKP)"[^{}]*"d"\s*:\s*"[A-Za-z0-9_-]{20}'),
    "an AWS key id": re.compile(rb"\b(?:AKIA|ASIA)(?!IOSFODNN7EXAMPLE)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
}
SUFFIXES: Final = (
    ".key",
    ".pem",
    ".crt",
    ".cer",
    ".der",
    ".p12",
    ".pfx",
    ".jks",
    ".keystore",
    ".pin",
    ".env",
)


def findings(files: Iterable[tuple[str, bytes]]) -> list[str]:
    found = []
    for path, content in files:
        if path.lower().endswith(SUFFIXES):
            found.append(f"{path}: its name is a key's or certificate's")
        found += [f"{path}: {what}" for what, pattern in PATTERNS.items() if pattern.search(content)]
    return found


def committed() -> list[str]:
    """Tracked files, and those that the next `git add .` would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        # An exported tree has no .git: everything in it counts, but what tools make.
        skipped = {".venv", ".venv-native", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        return [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and skipped.isdisjoint(path.relative_to(ROOT).parts)
        ]
    return [name.decode() for name in done.stdout.split(b"\0") if name]


def test_nothing_secret_is_committed() -> None:
    paths = [path for path in committed() if (ROOT / path).is_file()]
    assert len(paths) > 50
    assert findings((path, (ROOT / path).read_bytes()) for path in paths) == []


def test_secrets_are_found() -> None:
    from certs import pki

    root = pki.make_root("acme")
    key, certificate = pki.key_pem(root.key), pki.certificate_pem(root.certificate)
    assert findings([("docs/x.md", b"text\n" + key)]) == ["docs/x.md: a private key"]
    assert findings([("tests/x.py", b'X = """' + certificate + b'"""')]) == ["tests/x.py: a certificate"]
    assert findings([("a/tls.key", b"")]) != []
    jwk = b'{"kty": "EC", "crv": "P-256", "x": "a", "d": "' + b"A" * 43 + b'"}'
    assert findings([("x.json", jwk)]) == ["x.json: a private JWK"]


@pytest.mark.parametrize("text", [b"-----BEGIN CERTIFICATE----- is how it begins", b"the private key", b""])
def test_words_are_not_secrets(text: bytes) -> None:
    assert findings([("docs/x.md", text)]) == []
