"""CRC-32C and MD5 of an upload, as Google's API names them: said by the client, computed here, compared.

1. What the client says of its content, in `X-Goog-Hash`, `Content-MD5` or the object's metadata, is compared
   before the last byte goes up. None of it goes up: it is of what is not stored.
2. What was computed is what the answer to the upload names: clients compare it with their own.
"""

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from proxy import refusals
from proxy.messages.checksums import Crc32C
from proxy.messages.message import Fields
from proxy.profiles.json_rewriting import JsonObject
from proxy.refusals import RefusedError

OF_RESOURCES: Final = ("crc32c", "md5Hash")
"""Members of an object's metadata."""
_FIELD: Final = "x-goog-hash"
_SIZES: Final = {"crc32c": 4, "md5": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Of a plaintext, or of what it is said to be; None: not known."""

    crc32c: bytes | None = None
    md5: bytes | None = None

    @classmethod
    def of_fields(cls, fields: Fields, *, body: bool = True) -> "Digests":
        """RefusedError(INVALID_DIGEST). *body*: `Content-MD5` is of the object, not of a piece of it."""
        found: dict[str, bytes] = {}
        said = [part.strip(" \t") for value in fields.all(_FIELD) for part in value.split(",")]
        pairs = [part.partition("=")[::2] for part in said if part]
        if body:
            pairs += [("md5", value) for value in fields.all("content-md5")]
        for name, encoded in pairs:
            if name not in _SIZES:
                raise RefusedError(refusals.INVALID_DIGEST)
            value = _decoded(encoded, _SIZES[name])
            if found.setdefault(name, value) != value:
                raise RefusedError(refusals.BAD_DIGEST)
        return cls(crc32c=found.get("crc32c"), md5=found.get("md5"))

    @classmethod
    def of_resource(cls, resource: JsonObject) -> "Digests":
        """Of an object's metadata, as a client sends it. RefusedError(INVALID_DIGEST)."""
        values: list[bytes | None] = []
        for name, size in zip(OF_RESOURCES, _SIZES.values(), strict=True):
            value = resource.value(name)
            if value is not None and not isinstance(value, str):
                raise RefusedError(refusals.INVALID_DIGEST)
            values.append(_decoded(value, size) if value else None)
        return cls(crc32c=values[0], md5=values[1])

    def check(self, said: "Digests") -> None:
        """That this plaintext is the one *said*, as far as both are known. RefusedError(BAD_DIGEST)."""
        for mine, theirs in ((self.crc32c, said.crc32c), (self.md5, said.md5)):
            if mine is not None and theirs is not None and not hmac.compare_digest(mine, theirs):
                raise RefusedError(refusals.BAD_DIGEST)

    def in_resource(self) -> dict[str, str]:
        """What is known, as the metadata names it."""
        pairs = zip(OF_RESOURCES, (self.crc32c, self.md5), strict=True)
        return {name: base64.b64encode(value).decode() for name, value in pairs if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """What is known of content that has just been uploaded."""

    digests: Digests
    plain_bytes: int | None = None
    """None: as it is stored tells."""


class Tally:
    """Computes both while content passes. A `plan.Decoder`: *said* is compared at its end."""

    def __init__(self, *said: Digests) -> None:
        self._said = said
        self._crc = Crc32C()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._plain_bytes = 0

    def feed(self, piece: bytes) -> bytes:
        self._crc.update(piece)
        self._md5.update(piece)
        self._plain_bytes += len(piece)
        return piece

    def finish(self) -> bytes:
        """RefusedError(BAD_DIGEST)."""
        for said in self._said:
            self.digests.check(said)
        return b""

    @property
    def digests(self) -> Digests:
        """Of what has passed."""
        return Digests(crc32c=self._crc.digest(), md5=self._md5.digest())

    @property
    def uploaded(self) -> Uploaded:
        return Uploaded(plain_bytes=self._plain_bytes, digests=self.digests)


def _decoded(encoded: str, size: int) -> bytes:
    try:
        value = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != size:
        raise RefusedError(refusals.INVALID_DIGEST)
    return value
