"""What a credential is made of, and how this proxy keeps what it must be able to read again.

1. A bearer token is `sgt.<id>.<secret>`: the id finds the entry, 256 random bits prove who has it. Stored
   is SHA-256 of the whole token: what was drawn at random cannot be guessed from its digest, however fast
   the hash; slow hashes are for what people choose.
2. A SigV4 secret is the key of an HMAC, so verifying needs the secret itself. It is stored sealed by a
   *file key* of this proxy, AES-256-GCM, bound to credential and tenant, so that a copy of the database
   alone does not tell it, and rows cannot be exchanged.
3. A file key is 32 random bytes in `<state_dir>/file-keys/<name>.key`, mode 0600. Every sealed secret names
   the key it is sealed by; the newest seals. Rotation seals all anew and then removes the old files.
4. Access key ids and secrets have the forms that AWS asks for (API reference of AWS KMS,
   XksProxyAuthenticationCredentialType).
"""

import base64
import contextlib
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from envelope.derive import lp
from envelope.errors import FormatError, SealgateError
from proxy.tenants.certificates import CredentialError, write_new_file
from runtime.files import sync_directory

BEARER_PREFIX: Final = "sgt"
FILE_KEY_DIRECTORY: Final = "file-keys"
_ID_BYTES: Final = 15  # 24 characters of base32
_SECRET_BYTES: Final = 32
_KEY_NAME_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_BEARER: Final = re.compile(rf"{BEARER_PREFIX}\.([a-z2-7]{{24}})\.[A-Za-z0-9_-]{{43}}")
_ACCESS_KEY_ID: Final = re.compile(r"[A-Z2-7]{20,30}")
_RAW_SECRET: Final = re.compile(r"[A-Za-z0-9/+=]{43,64}")
_NO_ID: Final = ""

_log: Final = structlog.get_logger("credentials")


class BearerToken(NamedTuple):
    id: str
    token: str
    verifier: bytes


class AccessKey(NamedTuple):
    id: str
    secret: str


def new_bearer() -> BearerToken:
    """A fresh token, and what is stored of it (rule 1)."""
    name = base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()
    return read_bearer(f"{BEARER_PREFIX}.{name}.{secrets.token_urlsafe(_SECRET_BYTES)}")


def read_bearer(token: str) -> BearerToken:
    """A token that a proxy has made, to be let in at another one as well. FormatError, without quoting it."""
    found = _BEARER.fullmatch(token)
    if found is None:
        raise FormatError(f"no token of the form {BEARER_PREFIX}.<24 characters>.<43 characters>")
    return BearerToken(found[1], token, sha256(token.encode()).digest())


def parse_bearer(token: str) -> str:
    """The id that *token* names; one that no credential has if it is no token of ours."""
    parts = token.split(".", 3)
    return parts[1] if len(parts) == 3 and parts[0] == BEARER_PREFIX else _NO_ID


def new_access_key() -> AccessKey:
    """A fresh SigV4 credential: 20 characters and 256 random bits in 43 (rule 4)."""
    return AccessKey("SG" + base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode()[:18], random_secret())


def random_secret() -> str:
    return base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip("=")


def check_access_key(access_key_id: str, secret: str) -> None:
    """FormatError unless both have AWS's form; the text does not quote the secret."""
    if not _ACCESS_KEY_ID.fullmatch(access_key_id):
        raise FormatError("an access key id has 20 to 30 characters of A-Z and 2-7")
    if not _RAW_SECRET.fullmatch(secret):
        raise FormatError("a raw secret access key has 43 to 64 characters of A-Z, a-z, 0-9, /, + and =")


class FileKeyError(SealgateError):
    """A file key that is missing or cannot be used; the text names the file."""


class SecretSealer:
    """Seals and opens what is stored (rules 2 and 3)."""

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / FILE_KEY_DIRECTORY
        self._keys: dict[bytes, AESGCM] = {}
        for (
            name
        ) in self.names():  # what a rotation removes stays in force until the rows it replaced are gone
            self._cipher(name)
        self._pretended = AESGCM(secrets.token_bytes(_SECRET_BYTES))
        self._pretended_nonce = secrets.token_bytes(_NONCE_BYTES)
        self._pretended_text = self._pretended.encrypt(self._pretended_nonce, random_secret().encode(), b"")

    def seal(self, secret: str, credential_id: str, tenant: str, *, key: bytes | None = None) -> bytes:
        """As `seal_bound`, bound to a credential and its tenant."""
        return self.seal_bound(secret.encode(), _binding(credential_id, tenant), key=key)

    def seal_bound(self, secret: bytes, binding: bytes, *, key: bytes | None = None) -> bytes:
        """name of the file key ‖ nonce ‖ ciphertext ‖ tag. FileKeyError.

        Seals by the file key *key* (default: the newest; the first is made now).
        """
        name = key or self.newest() or self.new_key()
        cipher = self._cipher(name)
        if cipher is None:
            raise FileKeyError(f"{self._file(name)} cannot be used: see the log")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return name + nonce + cipher.encrypt(nonce, secret, binding)

    def open(self, sealed: bytes, credential_id: str, tenant: str) -> bytes | None:
        """The secret; None if it was not sealed for this credential by a file key that is here."""
        secret = self.open_bound(sealed, _binding(credential_id, tenant))
        if secret is None:
            _log.warning("a stored secret does not open", credential=credential_id, tenant=tenant)
        return secret

    def open_bound(self, sealed: bytes, binding: bytes) -> bytes | None:
        """The secret; None if it was not sealed with this binding by a file key that is here."""
        name, nonce = sealed[:_KEY_NAME_BYTES], sealed[_KEY_NAME_BYTES : _KEY_NAME_BYTES + _NONCE_BYTES]
        cipher = self._cipher(name)
        text = sealed[_KEY_NAME_BYTES + _NONCE_BYTES :]
        if cipher is None or len(text) < _TAG_BYTES:
            return None
        try:
            return cipher.decrypt(nonce, text, binding)
        except InvalidTag:
            return None

    def prepare(self, sealed: bytes) -> None:
        """Read the file key of *sealed* now: a rotation removes it, perhaps before this is opened."""
        self._cipher(sealed[:_KEY_NAME_BYTES])

    def pretend_to_open(self) -> None:
        """As much work as `open`, for nobody (access.py rule 1)."""
        self._pretended.decrypt(self._pretended_nonce, self._pretended_text, b"")

    def names(self) -> list[bytes]:
        """Of the file keys that are there, oldest first."""
        try:
            files = [file for file in self._directory.iterdir() if file.suffix == ".key"]
        except FileNotFoundError:
            return []
        found = []
        for file in files:
            with contextlib.suppress(ValueError):
                found.append((file.stat().st_mtime_ns, bytes.fromhex(file.stem)))
        return [name for _time, name in sorted(found)]

    def newest(self) -> bytes | None:
        names = self.names()
        return names[-1] if names else None

    def new_key(self) -> bytes:
        """Make a file key; from now on it is the newest. FileKeyError."""
        name = secrets.token_bytes(_KEY_NAME_BYTES)
        key = bytearray(secrets.token_bytes(_SECRET_BYTES))
        try:
            write_new_file(self._file(name), key, mode=0o600)
        except CredentialError as error:
            raise FileKeyError(str(error)) from None
        finally:
            key[:] = bytes(len(key))
        return name

    def remove(self, names: Iterable[bytes]) -> None:
        """Forget these file keys: nothing is sealed by them any more."""
        for name in names:
            self._keys.pop(name, None)
            self._file(name).unlink(missing_ok=True)
        sync_directory(self._directory)

    def _file(self, name: bytes) -> Path:
        return self._directory / f"{name.hex()}.key"

    def _cipher(self, name: bytes) -> AESGCM | None:
        cipher = self._keys.get(name) or self._read(name)
        if cipher is not None:
            self._keys[name] = cipher
        return cipher

    def _read(self, name: bytes) -> AESGCM | None:
        path = self._file(name)
        try:
            if path.stat().st_mode & 0o077:
                _log.error("others may read this file key", file=str(path))
                return None
            data = bytearray(path.read_bytes())
        except OSError as error:
            _log.error("file key not read", file=str(path), reason=error.strerror)
            return None
        try:
            return AESGCM(data) if len(data) == _SECRET_BYTES else None
        finally:
            data[:] = bytes(len(data))


def _binding(credential_id: str, tenant: str) -> bytes:
    return lp(b"sealgate/v1 credential") + lp(credential_id.encode()) + lp(tenant.encode())


def file_key_of(sealed: bytes) -> bytes:
    """The name of the file key that *sealed* was sealed by."""
    return sealed[:_KEY_NAME_BYTES]
