"""How the blocks of a blob are called at the service, and what a composite's MD5 says there. Pure.

1. A block is never stored under the name that its client gave it, but under that name and a nonce: a block
   that is sent twice, by a retry that overtakes itself say, is two at the service. Which of them belongs to
   which message is never in doubt, so a list of blocks cannot join a message with another one's commitment.
2. Azure wants all names of a blob to have one length. A nonce has always the same, so lengths are equal
   where the client's are.
3. `raw name of the client ‖ nonce (7) ‖ kind (1)`. A name of more than 56 bytes leaves no room within
   Azure's 64: its SHA-256 stands in its place, and the client's name cannot be told from it.
4. The manifest is the last block, of a kind of its own.
5. Azure keeps, and does not check, an MD5 for a blob in blocks. There stands a composite's plaintext
   length, for lists. It is a hint: whoever reads the blob trusts its manifest alone.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from envelope.multipart import TRAILER_MAGIC
from proxy import refusals
from proxy.refusals import RefusedError

NONCE_SIZE: Final = 7
MAX_CLIENT_SIZE: Final = 64
MAX_ENCODED: Final = 88
_TAIL_SIZE: Final = NONCE_SIZE + 1
_LONGEST_KEPT: Final = MAX_CLIENT_SIZE - _TAIL_SIZE
_MARK_SIZE: Final = 16
_MARK: Final = TRAILER_MAGIC
_MAX_PLAIN: Final = 1 << 53


class NameKind(IntEnum):
    """The last byte of a stored name."""

    KEPT = 0  # the client's name stands in it
    MANIFEST = 1
    HASHED = 2  # the client's name was too long to stand in it


@dataclass(frozen=True, slots=True)
class BlockName:
    """A name as the client gives it: 1 to 64 bytes."""

    raw: bytes

    @classmethod
    def of(cls, text: str) -> "BlockName":
        """From base64. RefusedError(BLOCK_ID) for what can be none."""
        if len(text) > MAX_ENCODED:
            raise RefusedError(refusals.BLOCK_ID)
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise RefusedError(refusals.BLOCK_ID) from None
        if not 0 < len(raw) <= MAX_CLIENT_SIZE:
            raise RefusedError(refusals.BLOCK_ID)
        return cls(raw)

    @property
    def stem(self) -> "Stem":
        if len(self.raw) <= _LONGEST_KEPT:
            return Stem(self.raw, NameKind.KEPT)
        return Stem(hashlib.sha256(self.raw).digest(), NameKind.HASHED)

    def stored(self, nonce: bytes) -> str:
        """The name at the service, in base64."""
        stem = self.stem
        return _encoded(stem.raw + nonce + bytes((stem.kind,)))


@dataclass(frozen=True, slots=True)
class Stem:
    """What a stored name has of the client's."""

    raw: bytes
    kind: NameKind

    @classmethod
    def of(cls, stored: str) -> "Stem | None":
        """None for a name that is none of ours."""
        try:
            raw = base64.b64decode(stored, validate=True)
        except (binascii.Error, ValueError):
            return None
        if len(raw) <= _TAIL_SIZE or raw[-1] not in set(NameKind):
            return None
        return cls(raw[:-_TAIL_SIZE], NameKind(raw[-1]))

    @property
    def shown(self) -> str | None:
        """The client's name in base64; None if it cannot be told."""
        return _encoded(self.raw) if self.kind is NameKind.KEPT else None


def manifest_name(like: str, nonce: bytes) -> str:
    """The stored name of the manifest of blocks that have names as long as *like*, a stored one."""
    size = len(base64.b64decode(like))
    return _encoded(bytes(size - _TAIL_SIZE) + nonce + bytes((NameKind.MANIFEST,)))


def size_mark(plain_bytes: int) -> str:
    """What stands in place of a composite's MD5, in base64."""
    return _encoded(_MARK + plain_bytes.to_bytes(8))


def marked_size(content_md5: str | None) -> int | None:
    """The inverse of `size_mark`; None for any other MD5."""
    try:
        raw = base64.b64decode(content_md5 or "", validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(raw) != _MARK_SIZE or not raw.startswith(_MARK):
        return None
    size = int.from_bytes(raw[len(_MARK) :])
    return size if size < _MAX_PLAIN else None


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
