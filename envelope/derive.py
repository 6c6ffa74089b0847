"""Every key that comes from key material: one function and one label per derived key (docs/format.md 6.1).

1. HKDF-SHA512, salt `sealgate/v1`, info = lp(label) ‖ lp(tenant) ‖ lp(service) ‖ lp(key id) [‖ lp(path or
   context)].
2. `lp` makes the joined info injective: no two scopes share an info, whatever the names are.
3. Key material has 32 bytes and is not all zero: zero is what wiping leaves, and a wiped key must never seal.
"""

import hashlib
from collections.abc import Buffer
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from envelope.errors import MisuseError
from envelope.keys import KEY_MATERIAL_SIZE, KeyId, NetworkService

_SALT: Final = b"sealgate/v1"
_LP_LIMIT: Final = 0xFFFF

OBJECT_KEY_SIZE: Final = 32
FIELD_KEY_SIZE: Final = 32
DETERMINISTIC_KEY_SIZE: Final = 64
INDEX_KEY_SIZE: Final = 32
FPE_KEY_SIZE: Final = 32
SERVICE_KEY_SIZE: Final = 32
KEY_CHECK_VALUE_SIZE: Final = 16


def lp(data: bytes) -> bytes:
    """*data* behind its length as 16 bits, big endian. MisuseError for more than 65 535 bytes."""
    if len(data) > _LP_LIMIT:
        raise MisuseError(f"{len(data)} bytes do not fit a 16-bit length")
    return len(data).to_bytes(2) + data


def scope(owner: NetworkService) -> bytes:
    """lp(tenant) ‖ lp(service): what separates one network service from every other."""
    return lp(owner.tenant.encode()) + lp(owner.service.encode())


def object_key(material: Buffer, owner: NetworkService, key_id: KeyId) -> bytes:
    """K_obj, 32 bytes: seals object bodies. MisuseError if *material* is not 32 bytes or was wiped."""
    return _derive(material, b"sealgate/v1 object cobblestone-256", OBJECT_KEY_SIZE, owner, key_id)


def field_key(material: Buffer, owner: NetworkService, key_id: KeyId) -> bytes:
    """K_field, 32 bytes: seals `sg1.` values. MisuseError as `object_key`."""
    return _derive(material, b"sealgate/v1 field cobblestone-256", FIELD_KEY_SIZE, owner, key_id)


def deterministic_key(material: Buffer, owner: NetworkService, key_id: KeyId) -> bytes:
    """K_det, 64 bytes: AES-256-SIV of `sg1d.` values. MisuseError as `object_key`."""
    return _derive(material, b"sealgate/v1 field-det aes-256-siv", DETERMINISTIC_KEY_SIZE, owner, key_id)


def index_key(material: Buffer, owner: NetworkService, key_id: KeyId, path: str) -> bytes:
    """K_index of one field path, 32 bytes: HMAC-SHA-256 of a blind index. MisuseError as `object_key`."""
    return _derive(
        material, b"sealgate/v1 index hmac-sha256", INDEX_KEY_SIZE, owner, key_id, last=_checked(path)
    )


def fpe_key(material: Buffer, owner: NetworkService, key_id: KeyId, path: str) -> bytes:
    """K_fpe of one field path, 32 bytes: FF1. MisuseError as `object_key`."""
    return _derive(material, b"sealgate/v1 fpe ff1", FPE_KEY_SIZE, owner, key_id, last=_checked(path))


def service_key(
    material: Buffer, owner: NetworkService, key_id: KeyId, dialect: str, context: bytes = b""
) -> bytes:
    """K_service of one dialect of the encryption service, 32 bytes: XAES-256-GCM (docs/format.md 6.1).

    Label `sealgate/v1 service <dialect>`. *context*: what a caller separates its ciphertexts by, at most
    65 535 bytes; empty is none. MisuseError as `object_key`, or for too long a context.
    """
    label = b"sealgate/v1 service " + dialect.encode()
    return _derive(material, label, SERVICE_KEY_SIZE, owner, key_id, last=context)


def key_check_value(material: Buffer, owner: NetworkService, key_id: KeyId) -> bytes:
    """kcv, 16 bytes and not secret: tells exchanged or damaged key material before data is written.

    MisuseError as `object_key`. Compare with `hmac.compare_digest`.
    """
    return _derive(material, b"sealgate/v1 kcv", KEY_CHECK_VALUE_SIZE, owner, key_id)


def signing_key_check_value(public_key_der: bytes, owner: NetworkService, key_id: KeyId) -> bytes:
    """kcv of a signing key, 16 bytes, from its SubjectPublicKeyInfo in DER."""
    checked = lp(b"sealgate/v1 kcv-sign") + scope(owner) + lp(key_id.raw) + lp(public_key_der)
    return hashlib.sha256(checked).digest()[:KEY_CHECK_VALUE_SIZE]


def ekm_binding(owner: NetworkService, key_id: KeyId, *, kek_id: str, environment_id: str) -> bytes:
    """What a wrapped key material is bound to (6.1): the AAD of AES-GCM, or by its SHA-256 with AES-KW."""
    return (
        lp(b"sealgate/v1 ekm")
        + scope(owner)
        + lp(key_id.raw)
        + lp(kek_id.encode())
        + lp(environment_id.encode())
    )


def _checked(path: str) -> bytes:
    if not path:
        raise MisuseError("the key of a field path needs the path")
    return path.encode()


def _derive(
    material: Buffer, label: bytes, size: int, owner: NetworkService, key_id: KeyId, *, last: bytes = b""
) -> bytes:
    view = memoryview(material)
    if view.nbytes != KEY_MATERIAL_SIZE:
        raise MisuseError(f"key material has {KEY_MATERIAL_SIZE} bytes, not {view.nbytes}")
    if not any(view):
        raise MisuseError("key material is all zero: it was wiped")
    info = lp(label) + scope(owner) + lp(key_id.raw)
    if last:
        info += lp(last)
    return HKDF(SHA512(), size, _SALT, info).derive(view)
