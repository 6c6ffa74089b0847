"""A second reader of the formats, written from docs/format.md alone: whole messages in memory, no code of
ours.

Judges the vectors and whatever the fast code writes. ValueError for anything it refuses.
"""

import base64
import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV


def lp(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def scope(owner: tuple[str, str]) -> bytes:
    tenant, service = owner
    return lp(tenant.encode()) + lp(service.encode())


def hkdf(material: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 with SHA-512 and the salt of docs/format.md 6.1."""
    key = hmac.new(b"sealgate/v1", material, hashlib.sha512).digest()
    return expand(key, info, size)


def expand(key: bytes, info: bytes, size: int) -> bytes:
    out, block = b"", b""
    for number in range(1, -(-size // 64) + 1):
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha512).digest()
        out += block
    return out[:size]


def derived(material: bytes, label: str, owner: tuple[str, str], kid: bytes, size: int) -> bytes:
    info = lp(label.encode()) + scope(owner) + lp(kid)
    return hkdf(material, info, size)


def open_message(key: bytes, context: bytes, message: bytes) -> bytes:
    """Docs/format.md 2.2."""
    if len(message) < 24 + 32 + 16:
        raise ValueError("too short")
    salt, commitment, rest = message[:24], message[24:56], message[56:]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00" + salt + context
    okm = expand(key, info, 76)
    if okm[44:] != commitment:
        raise ValueError("commitment")
    plain = b""
    for number, at in enumerate(range(0, len(rest) // 16400 * 16400 + 1, 16400)):
        record = rest[at : at + 16400]
        nonce = (int.from_bytes(okm[32:44], "big") ^ number).to_bytes(12, "big")
        try:
            plain += AESGCM(okm[:32]).decrypt(nonce, record, None)
        except InvalidTag:
            raise ValueError("chunk") from None
    return plain


def open_object(
    material: bytes, owner: tuple[str, str], sealed: bytes, *, bind: int = 0, name: bytes = b""
) -> bytes:
    """Docs/format.md 2.1."""
    header = sealed[:32]
    if header[:12] != b"\x89SGT\r\n\x1a\n\x01\x01\x00\x20" or header[28:] != bytes([bind, 0, 0, 0]):
        raise ValueError("header")
    label = "sealgate/v1 object cobblestone-256"
    key = derived(material, label, owner, header[12:28], 32)
    context = lp(b"sealgate/v1 body") + header + scope(owner) + lp(name)
    return open_message(key, context, sealed[32:])


def open_field(material: bytes, owner: tuple[str, str], path: str, token: str) -> bytes:
    """Docs/format.md 4."""
    kind, kid, payload = token.split(".")
    key_id, data = decode(kid), decode(payload)
    if kind == "sg1":
        key = derived(material, "sealgate/v1 field cobblestone-256", owner, key_id, 32)
        context = lp(b"sealgate/v1 field") + lp(key_id) + scope(owner) + lp(path.encode())
        return open_message(key, context, data)
    if kind == "sg1d":
        key = derived(material, "sealgate/v1 field-det aes-256-siv", owner, key_id, 64)
        strings = [b"sealgate/v1 field", owner[0].encode(), owner[1].encode(), path.encode()]
        try:
            return AESSIV(key).decrypt(data, strings)
        except InvalidTag:
            raise ValueError("tag") from None
    raise ValueError("prefix")


def open_composite(material: bytes, owner: tuple[str, str], stored: bytes, *, name: bytes = b"") -> bytes:
    """Docs/format.md 3.5."""
    size, magic = int.from_bytes(stored[-16:-8], "big"), stored[-8:]
    if magic != b"SGT-MPU\n":
        raise ValueError("trailer")
    manifest = open_object(material, owner, stored[-16 - size : -16], bind=4, name=name)
    upload, count = manifest[1:17], int.from_bytes(manifest[17:21], "big")
    if manifest[0] not in (1, 2) or len(manifest) != 21 + 44 * count:
        raise ValueError("manifest")
    plain, at, last = b"", 0, -1
    for entry in (manifest[21 + 44 * index : 65 + 44 * index] for index in range(count)):
        number, length = int.from_bytes(entry[:4], "big"), int.from_bytes(entry[4:12], "big")
        message = stored[at : at + length]
        if (manifest[0] == 1 and number <= last) or len(message) != length or message[56:88] != entry[12:]:
            raise ValueError("part")
        plain += open_object(material, owner, message, bind=3, name=upload + entry[:4])
        at, last = at + length, number
    if at != len(stored) - 16 - size:
        raise ValueError("lengths")
    return plain


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
