"""What a body that comes up has to match, and what is said of it.

1. `Content-MD5` and `x-ms-content-crc64` are verified over plaintext before the last record goes up: Azure
   stores nothing then, and neither do we. None of them goes up: they are of what is not stored.
2. Azure needs a body's length before it comes; who does not say it is refused, as Azure refuses it.
3. A checksum that was verified is what the answer names: clients compare it with their own.
4. An MD5 that a client wants to be kept with its blob (`x-ms-blob-content-md5`) is dropped: in the clear it
   confirms what the blob holds.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from proxy import refusals
from proxy.messages.checksums import Crc64Nvme
from proxy.messages.message import BodyFrame, ExpectedDigest, Fields, Framing
from proxy.plans.plan import Decoder
from proxy.refusals import RefusedError

CHECKSUM_FIELDS: Final = ("content-md5", "x-ms-content-crc64")
_MD5_SIZE: Final = 16
_CRC64_SIZE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """What a request says of its body; `named`: the fields as they came."""

    md5: bytes | None
    crc64: bytes | None
    named: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, fields: Fields) -> "Checksums":
        """RefusedError(INVALID_DIGEST) for what is no value of its kind."""
        return cls(
            md5=_decoded(fields, "content-md5", _MD5_SIZE),
            crc64=_decoded(fields, "x-ms-content-crc64", _CRC64_SIZE),
            named=tuple((name, fields.sole(name) or "") for name in CHECKSUM_FIELDS if name in fields),
        )

    @property
    def digests(self) -> tuple[ExpectedDigest, ...]:
        """What sealing compares by itself."""
        return () if self.md5 is None else (ExpectedDigest(algorithm="md5", value=self.md5),)

    @property
    def decoder(self) -> Callable[[], Decoder] | None:
        """What stands before the sealer for the rest; None: nothing."""
        expected = self.crc64
        return None if expected is None else lambda: CheckedCrc64(expected)

    def check(self, body: bytes) -> None:
        """Of a body that was collected. RefusedError."""
        if self.md5 is not None:
            made = hashlib.md5(body, usedforsecurity=False).digest()
            if not hmac.compare_digest(made, self.md5):
                raise RefusedError(refusals.BAD_DIGEST)
        if self.crc64 is not None:
            checked = CheckedCrc64(self.crc64)
            checked.feed(body)
            checked.finish()


class CheckedCrc64:
    """Passes what comes, and compares its CRC-64 at the end. Azure writes it with the lowest byte first."""

    def __init__(self, expected: bytes) -> None:
        self._expected = expected
        self._crc = Crc64Nvme()

    def feed(self, piece: bytes) -> bytes:
        self._crc.update(piece)
        return piece

    def finish(self) -> bytes:
        """RefusedError(BAD_CHECKSUM)."""
        if not hmac.compare_digest(self._crc.digest()[::-1], self._expected):
            raise RefusedError(refusals.BAD_CHECKSUM)
        return b""


def plain_length_of(frame: BodyFrame) -> int:
    """Of a body that is content. RefusedError(LENGTH_REQUIRED)."""
    if frame.framing is Framing.NONE:
        return 0
    if frame.length_bytes is None:
        raise RefusedError(refusals.LENGTH_REQUIRED)
    return frame.length_bytes


def _decoded(fields: Fields, name: str, size: int) -> bytes | None:
    if name not in fields:
        return None
    try:
        value = base64.b64decode(fields.sole(name) or "", validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != size:
        raise RefusedError(refusals.INVALID_DIGEST)
    return value
