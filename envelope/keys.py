"""Names and states of keys.

1. A key id is 16 random bytes and never derived from the key. Sixteen zero bytes mean "anonymous".
2. Tenant and service ids are immutable, `[a-z0-9][a-z0-9-]{0,62}`; together the unit of key separation.
3. A state decides what a key may do (docs/format.md 6.2); transitions are a table (NIST SP 800-57 part 1, 7).
4. A version counts the keys of one network service and use, from 1: people and JWKS name keys by it, nothing
   is derived from it.
5. Key material has no repr and no `==`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self, override

from envelope.errors import FormatError

KEY_ID_SIZE: Final = 16
KEY_MATERIAL_SIZE: Final = 32
MAX_KEY_VERSION: Final = 2**31 - 1
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True, order=True)
class KeyId:
    """The name of one key material: 16 bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_ID_SIZE:
            raise FormatError(f"a key id has {KEY_ID_SIZE} bytes, not {len(self.raw)}")

    @classmethod
    def random(cls) -> Self:
        return cls(os.urandom(KEY_ID_SIZE))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From 32 hex digits. FormatError for anything else."""
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise FormatError(f"not a key id: {text!r} (32 hex digits are)") from error

    @property
    def is_anonymous(self) -> bool:
        return self.raw == bytes(KEY_ID_SIZE)

    @override
    def __str__(self) -> str:
        return self.raw.hex()


ANONYMOUS: Final = KeyId(bytes(KEY_ID_SIZE))


def check_name(kind: str, name: str) -> str:
    """*name* if it is a valid tenant or service id; FormatError otherwise."""
    if not _NAME.fullmatch(name):
        raise FormatError(f"{kind} id {name!r} is not valid: [a-z0-9][a-z0-9-]{{0,62}}")
    return name


@dataclass(frozen=True, slots=True, order=True)
class NetworkService:
    """One tenant at one cloud service: the unit of key separation."""

    tenant: str
    service: str

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("service", self.service)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `tenant/service`. FormatError for anything else."""
        tenant, slash, service = text.partition("/")
        if not slash:
            raise FormatError(f"not a network service: {text!r} (tenant/service is)")
        return cls(tenant, service)

    @override
    def __str__(self) -> str:
        return f"{self.tenant}/{self.service}"


class KeyState(StrEnum):
    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    DEACTIVATED = "deactivated"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"

    @property
    def may_seal(self) -> bool:
        return self is KeyState.ACTIVE

    @property
    def may_open(self) -> bool:
        """Without a policy that says otherwise: suspended and compromised keys open nothing."""
        return self in (KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.DEACTIVATED)


TRANSITIONS: Final[Mapping[KeyState, frozenset[KeyState]]] = {
    KeyState.PRE_ACTIVE: frozenset({KeyState.ACTIVE, KeyState.COMPROMISED, KeyState.DESTROYED}),
    KeyState.ACTIVE: frozenset({KeyState.SUSPENDED, KeyState.DEACTIVATED, KeyState.COMPROMISED}),
    KeyState.SUSPENDED: frozenset({KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.COMPROMISED}),
    KeyState.DEACTIVATED: frozenset({KeyState.SUSPENDED, KeyState.COMPROMISED, KeyState.DESTROYED}),
    KeyState.COMPROMISED: frozenset({KeyState.DESTROYED}),
    KeyState.DESTROYED: frozenset(),
}


class KeyUse(StrEnum):
    DATA = "data"
    SIGN = "sign"


class SigningAlgorithm(StrEnum):
    """What a `sign` key signs by (RFC 7518 3.1, RFC 8037 3.1)."""

    ES256 = "ES256"
    """P-256."""
    PS256 = "PS256"
    """RSA-3072, PSS."""
    RS256 = "RS256"
    """RSA-3072, PKCS#1 v1.5: for verifiers that know nothing newer."""
    EDDSA = "EdDSA"
    """Ed25519."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyMaterial:
    """One key of one network service, in the clear: lives in memory only, and only for its validity.

    `secret` is 32 bytes for `data`, a PKCS#8 DER key for `sign`, empty for a destroyed key (a tombstone).
    """

    owner: NetworkService
    key_id: KeyId
    state: KeyState
    use: KeyUse = KeyUse.DATA
    algorithm: str | None = None  # `sign` only: the JWS algorithm
    version: int = 1  # 1 to 2^31 - 1
    secret: bytearray = field(repr=False)
    verified_kcv: bytes | None = None
    """The key check value, where whoever made this has just compared it: it is not worked out again."""

    def wipe(self) -> None:
        """Overwrite the secret in place. Best effort: copies made by others are theirs to wipe."""
        self.secret[:] = bytes(len(self.secret))
