"""The key by which an agent signs shared rows, deltas and heartbeats: Ed25519, in a file of its own.

1. It is made once, in `state_dir`, with mode 0600, and never leaves it; the others pin its public half when
   the environment joins.
2. The spare agent of an environment (docs/key-agent.md) needs the same file: an environment has one.
3. What administrators compare is the fingerprint: SHA-256 of the 32 public bytes, in hex.
"""

import os
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from envelope.base64url import b64u_decode, b64u_encode
from envelope.errors import FormatError
from runtime.files import write_new_file
from runtime.settings import SettingsError, read_secret_file

NAME: Final = "registry.key"


def read_or_make_registry_key(state_dir: Path, *, name: str = NAME) -> Ed25519PrivateKey:
    """The key in *state_dir*, made if there is none yet. SettingsError if the file is no good; OSError."""
    path = state_dir / name
    if not os.path.lexists(path):
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_new_file(path, pem)
        return key
    return read_registry_key_file(path)


def read_registry_key_file(path: Path) -> Ed25519PrivateKey:
    """SettingsError if the file is no good; OSError."""
    secret = read_secret_file(path)
    try:
        found = load_pem_private_key(bytes(secret), password=None)
    except (ValueError, TypeError) as error:
        raise SettingsError(
            str(path), "", allowed=f"not a PEM private key ({type(error).__name__})"
        ) from None
    finally:
        secret[:] = bytes(len(secret))
    if not isinstance(found, Ed25519PrivateKey):
        raise SettingsError(str(path), "", allowed="not an Ed25519 key")
    return found


def public_text(key: Ed25519PrivateKey) -> str:
    """base64url of the public key, as rows have it."""
    return b64u_encode(key.public_key().public_bytes_raw())


def fingerprint_of(public: str) -> str:
    """For people. FormatError if *public* is no registry key."""
    raw = b64u_decode(public)
    if len(raw) != 32:
        raise FormatError("a registry key has 32 bytes")
    return sha256(raw).hexdigest()


def same_fingerprint(given: str, public: str) -> bool:
    """Whether people mean that key: colons, spaces and capitals do not matter, all of it must be there."""
    return "".join(given.split()).replace(":", "").lower() == fingerprint_of(public)
