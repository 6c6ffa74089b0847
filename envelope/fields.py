"""Sealed field values: text tokens in place of text values (docs/format.md 4).

    sg1.<key id>.<Cobblestone message>      random and committing; the default
    sg1d.<key id>.<SIV tag ‖ ciphertext>    AES-256-SIV: shows equality, so only where a field is searched

1. Tenant, service, key id and path are authenticated. The path is the rule's pattern (`$.customer.name`),
   never an array index; fields that must be comparable share one path.
2. Every token names its key. No other key is ever tried, and there are no anonymous tokens.
3. What begins like a token and does not open is an error, never a plaintext.
4. One spelling per token: see envelope/base64url.py.
"""

from collections.abc import Buffer, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from envelope.base64url import b64u_decode, b64u_encode, encoded_length
from envelope.cobblestone import (
    CHUNK_SIZE,
    HEAD_SIZE,
    TAG_SIZE,
    MessageOpener,
    MessageSealer,
    invalid,
    truncated,
)
from envelope.derive import DETERMINISTIC_KEY_SIZE, lp, scope
from envelope.errors import FormatError, MisuseError
from envelope.keys import KEY_ID_SIZE, KeyId, NetworkService

_LABEL: Final = b"sealgate/v1 field"
_SIV_SIZE: Final = 16


class FieldKind(StrEnum):
    """How a value is sealed; the value is the token's prefix without the dot."""

    RANDOM = "sg1"
    DETERMINISTIC = "sg1d"


@dataclass(frozen=True, slots=True)
class FieldHeader:
    """What a token says of itself: which key opens it (K_field or K_det, by kind)."""

    kind: FieldKind
    key_id: KeyId

    @classmethod
    def parse(cls, token: str) -> Self:
        """FormatError if *token* is not well formed; nothing is authenticated."""
        kind, key_id, _ = _split(token)
        return cls(kind, key_id)


def payload_bytes(token: str) -> int:
    """Bytes behind the last dot of *token*. FormatError if it is not well formed."""
    return len(_split(token)[2])


type FindFieldKey = Callable[[FieldHeader], Buffer]
"""K_field (32 bytes) or K_det (64) by the header's kind; raises KeyUnavailableError if there is none."""


def has_prefix(text: str) -> bool:
    """Whether *text* begins like a token. If so, a failure to open is an error, never plaintext."""
    return text.startswith(tuple(f"{kind}." for kind in FieldKind))


def sealed_field_length(plain_bytes: int, kind: FieldKind = FieldKind.RANDOM) -> int:
    """Characters of the token for *plain_bytes* of UTF-8, to be checked against the service's limit."""
    if plain_bytes < 0:
        raise MisuseError("a value has no negative length")
    if kind is FieldKind.RANDOM:
        size = HEAD_SIZE + plain_bytes + TAG_SIZE * (plain_bytes // CHUNK_SIZE + 1)
    else:
        size = _SIV_SIZE + plain_bytes
    return len(kind) + 1 + encoded_length(KEY_ID_SIZE) + 1 + encoded_length(size)


def seal_field(field_key: Buffer, owner: NetworkService, key_id: KeyId, *, path: str, value: bytes) -> str:
    """The `sg1.` token of *value* under K_field. MisuseError for a key or path that does not fit."""
    _check(key_id, path)
    sealer = MessageSealer(field_key, _context(owner, key_id, path))
    message = sealer.update(value)
    message += sealer.finalize()
    return _join(FieldKind.RANDOM, key_id, message)


def seal_deterministic(
    deterministic_key: Buffer, owner: NetworkService, key_id: KeyId, *, path: str, value: bytes
) -> str:
    """The `sg1d.` token of *value* under K_det: equal values of one path give equal tokens.

    MisuseError for a key or path that does not fit.
    """
    _check(key_id, path)
    sealed = _siv(deterministic_key).encrypt(value, _associated(owner, path))
    return _join(FieldKind.DETERMINISTIC, key_id, sealed)


def open_field(token: str, owner: NetworkService, find_key: FindFieldKey, *, path: str) -> bytes:
    """The value in *token*, of either kind.

    *find_key* is asked once and may raise KeyUnavailableError. FormatError if it is no token; IntegrityError
    or TruncatedError if it was not sealed, whole, for this owner and path.
    """
    kind, key_id, payload = _split(token)
    _check(key_id, path)
    key = find_key(FieldHeader(kind, key_id))
    match kind:
        case FieldKind.RANDOM:
            opener = MessageOpener((key,), _context(owner, key_id, path))
            value = opener.update(payload)
            value += opener.finalize()
            return bytes(value)
        case FieldKind.DETERMINISTIC:
            if len(payload) < _SIV_SIZE:
                raise truncated()
            try:
                return _siv(key).decrypt(payload, _associated(owner, path))
            except InvalidTag:
                # Without the cause, as in envelope/cobblestone.py.
                raise invalid() from None


def _split(token: str) -> tuple[FieldKind, KeyId, bytes]:
    match token.split("."):
        case [FieldKind.RANDOM.value | FieldKind.DETERMINISTIC.value as kind, key_id, payload]:
            parsed = KeyId(b64u_decode(key_id))
            if parsed.is_anonymous:
                raise FormatError("a sealed field names its key")
            return FieldKind(kind), parsed, b64u_decode(payload)
        case _:
            raise FormatError("not a sealed field")


def _join(kind: FieldKind, key_id: KeyId, payload: Buffer) -> str:
    return f"{kind}.{b64u_encode(key_id.raw)}.{b64u_encode(bytes(payload))}"


def _check(key_id: KeyId, path: str) -> None:
    if key_id.is_anonymous:
        raise MisuseError("a sealed field names its key")
    if not path:
        raise MisuseError("a sealed field is bound to its path")


def _context(owner: NetworkService, key_id: KeyId, path: str) -> bytes:
    return lp(_LABEL) + lp(key_id.raw) + scope(owner) + lp(path.encode())


def _associated(owner: NetworkService, path: str) -> list[bytes]:
    return [_LABEL, owner.tenant.encode(), owner.service.encode(), path.encode()]


def _siv(key: Buffer) -> AESSIV:
    view = memoryview(key)
    if view.nbytes != DETERMINISTIC_KEY_SIZE:
        raise MisuseError(f"a deterministic key has {DETERMINISTIC_KEY_SIZE} bytes, not {view.nbytes}")
    if not any(view):
        raise MisuseError("the deterministic key is all zero: it was wiped")
    return AESSIV(view)
