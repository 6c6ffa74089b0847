"""What a KACLS hands out: a key, sealed together with what it may be used for (docs/format.md).

    blob      = format(1) ‖ kind(1) ‖ key version(4) ‖ nonce(24) ‖ ciphertext ‖ tag(16)
    plaintext = binding(32) ‖ length of perimeter id(1) ‖ perimeter id ‖ secret

1. The binding is SHA-256 of the resource name, or of the SubjectPublicKeyInfo of a private key. Sealed, not
   authenticated beside: another resource (403) is told from damage (400), and a name of 512 bytes still
   leaves the blob of a data key below Google's kilobyte.
2. Format, kind, version and nonce are the cipher's AAD; tenant, named key, version and dialect are in the
   derived key. So nothing of a blob can be changed, and it opens for nobody else.
3. No copy of the secret is kept: the blob is the only one.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from envelope.errors import FormatError
from envelope.keys import KeyId
from proxy.encryption_service.core import NONCE_SIZE, TAG_SIZE, Core, Purpose, Ticket
from proxy.encryption_service.errors import DoesNotVerify
from proxy.encryption_service.model import DialectName

FORMAT: Final = 1
BINDING_SIZE: Final = 32
MAX_SECRET_BYTES: Final = 4096
"""PKCS #8 of an RSA key of 4096 bits has about 2400."""
_VERSION_SIZE: Final = 4
_HEAD_SIZE: Final = 2 + _VERSION_SIZE + NONCE_SIZE
_MIN_SIZE: Final = _HEAD_SIZE + BINDING_SIZE + 1 + 1 + TAG_SIZE
_PURPOSE: Final = Purpose(DialectName.KACLS)


class Kind(IntEnum):
    DATA_KEY = 1
    PRIVATE_KEY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is in a blob."""

    binding: bytes
    perimeter_id: str
    secret: bytes = field(repr=False)

    def is_of_resource(self, resource_name: str) -> bool:
        return hmac.compare_digest(self.binding, resource_binding(resource_name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob, and which version of the key sealed it."""

    data: bytes = field(repr=False)
    version: int
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class Parsed:
    """A blob taken apart; nothing of it is verified."""

    kind: Kind
    version: int
    head: bytes
    nonce: bytes
    ciphertext: bytes = field(repr=False)
    tag: bytes


def resource_binding(resource_name: str) -> bytes:
    return hashlib.sha256(resource_name.encode()).digest()


def seal(core: Core, ticket: Ticket, kind: Kind, content: Content) -> Blob:
    """Seal *content*. The errors of `Core.encrypt`."""
    perimeter = content.perimeter_id.encode()
    plaintext = content.binding + bytes([len(perimeter)]) + perimeter + content.secret

    def head(version: int, nonce: bytes) -> bytes:
        return bytes([FORMAT, kind]) + version.to_bytes(_VERSION_SIZE) + nonce

    sealed = core.encrypt(ticket, plaintext, head, purpose=_PURPOSE)
    data = head(sealed.version, sealed.nonce) + sealed.ciphertext + sealed.tag
    return Blob(data=data, version=sealed.version, key_id=sealed.key_id)


def parse(data: bytes) -> Parsed:
    """FormatError if no blob looks like this."""
    if len(data) < _MIN_SIZE or data[0] != FORMAT or data[1] not in tuple(Kind):
        raise FormatError("not a key that this KACLS has wrapped")
    head = data[:_HEAD_SIZE]
    return Parsed(
        kind=Kind(data[1]),
        version=int.from_bytes(data[2 : 2 + _VERSION_SIZE]),
        head=head,
        nonce=head[-NONCE_SIZE:],
        ciphertext=data[_HEAD_SIZE:-TAG_SIZE],
        tag=data[-TAG_SIZE:],
    )


def unseal(core: Core, ticket: Ticket, kind: Kind, blob: Parsed) -> Content:
    """What *blob* holds. DoesNotVerify also for one of another kind; the errors of `Core.decrypt`."""
    if blob.kind is not kind:
        raise DoesNotVerify
    plaintext = core.decrypt(
        ticket,
        version=blob.version,
        nonce=blob.nonce,
        ciphertext=blob.ciphertext,
        tag=blob.tag,
        aad=blob.head,
        purpose=_PURPOSE,
    )
    start = BINDING_SIZE + 1
    end = start + plaintext[BINDING_SIZE]
    return Content(
        binding=plaintext[:BINDING_SIZE],
        perimeter_id=plaintext[start:end].decode(),
        secret=plaintext[end:],
    )


def resource_key_hash(secret: bytes, resource_name: str, perimeter_id: str) -> bytes:
    """Google's check value of a data key, 32 bytes (Workspace CSE API, "Resource key hash")."""
    return hmac.digest(secret, f"ResourceKeyDigest:{resource_name}:{perimeter_id}".encode(), "sha256")
