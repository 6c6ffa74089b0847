"""Where an administrator's signature comes from: a key file, with or without a passphrase, or from elsewhere.

1. A private key is read by the process that the administrator starts, and by no agent.
2. A key that never leaves a smart card signs the statement's bytes elsewhere; the signature is brought here.
"""

import sys
from pathlib import Path
from typing import Final

from envelope.base64url import b64u_encode
from envelope.errors import SealgateError
from key_agent.environments.shared import approvals
from key_agent.explaining import explain_agent
from runtime.cli import CommandError
from runtime.settings import read_secret_file

HELP_ON_PASSPHRASES: Final = "The key's passphrase, in a file (mode 0600)."
STATEMENT_HELP: Final = "Write the statement there, for `openssl` or a smart card to sign."
SIGNATURE_HELP: Final = "The signature: base64url as `sign-file` prints it, or raw as openssl does."


def sign_with_file(statement: bytes, key: Path, passphrase_file: Path | None) -> str:
    """The signature as `approvals.sign_statement` writes it. CommandError: no such key."""
    pem = read_secret_file(key)
    passphrase = None if passphrase_file is None else read_secret_file(passphrase_file)
    try:
        private = approvals.read_private_key(
            pem, None if passphrase is None else bytes(passphrase).rstrip(b"\n")
        )
        return approvals.sign_statement(private, statement)
    except SealgateError as error:
        raise explain_agent(error) from error
    finally:
        for secret in (pem, passphrase or bytearray()):
            secret[:] = bytes(len(secret))


def read_signature(file: Path) -> str:
    """A signature that was made elsewhere, as the rows hold it; `-` reads standard input."""
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "give a file that you may read") from None
    try:
        return content.decode("ascii").strip()
    except UnicodeDecodeError:
        return b64u_encode(content)


def write_statement(file: Path, statement: bytes) -> None:
    """Exactly the bytes that are signed."""
    try:
        file.write_bytes(statement)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "name a file that you may write") from None
