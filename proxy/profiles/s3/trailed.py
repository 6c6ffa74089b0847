"""An upload that goes up with a checksum of its ciphertext behind it, where the service wants one.

1. S3 takes no object under Object Lock without a digest of what it stores. That is known only when all of it
   has been sealed, so it goes as a trailer: aws-chunked without signatures, one chunk, CRC-32 behind it.
2. The length of the whole is known before: the sealed length, and framing of a length that follows from it.
"""

import base64
from typing import Final

from envelope.objects import Sealer, sealed_length
from proxy import refusals
from proxy.messages.checksums import Crc32
from proxy.messages.message import Fields
from proxy.plans.plan import Decoder, NewSealer, Reshape, Reshaper
from proxy.plans.request import Edits
from proxy.profiles.s3.bodies import CODING, Incoming
from proxy.refusals import RefusedError

PAYLOAD: Final = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_TRAILER: Final = "x-amz-checksum-crc32"
_LOCK: Final = "x-amz-object-lock-"


def is_wanted(fields: Fields, *, always: bool) -> bool:
    """Whether the service will ask for a digest. *always*: the bucket locks what is put, by its settings."""
    return always or any(name.startswith(_LOCK) for name in fields)


def trailed_length(plain_bytes: int) -> int:
    """Of the whole body that goes up for *plain_bytes* of plaintext."""
    return len(_before(plain_bytes)) + sealed_length(plain_bytes) + len(_behind(bytes(4)))


def plan_trailed(incoming: Incoming, fields: Fields, edits: Edits) -> Reshape:
    """*edits*: of the head, without length and coding; the signer is the caller's to add."""
    plain_bytes = incoming.content.plain_bytes or 0
    codings = [token for token in _own_codings(fields) if token.lower() != CODING]
    decoder = incoming.content.decoder

    def make(new_sealer: NewSealer) -> Reshaper:
        return _Trailed(plain_bytes, decoder() if decoder is not None else None, new_sealer())

    return Reshape(
        edits=Edits(drop=edits.drop - {"transfer-encoding", "content-encoding"}, put=edits.put).also(
            put=(
                ("content-encoding", ",".join((CODING, *codings))),
                ("x-amz-decoded-content-length", str(sealed_length(plain_bytes))),
                ("x-amz-sdk-checksum-algorithm", "CRC32"),
                ("x-amz-trailer", _TRAILER),
            )
        ),
        make=make,
    )


class _Trailed:
    """Decodes, seals, frames."""

    def __init__(self, plain_bytes: int, decoder: Decoder | None, sealer: Sealer) -> None:
        self.out_bytes: int | None = trailed_length(plain_bytes)
        self._plain_bytes = plain_bytes
        self._decoder = decoder
        self._sealer = sealer
        self._checksum = Crc32()
        self._received = 0
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        return self._framed(self._seal(piece if self._decoder is None else self._decoder.feed(piece)))

    def finish(self) -> bytes:
        rest = self._seal(self._decoder.finish()) if self._decoder is not None else b""
        if self._received != self._plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        last = self._sealer.finalize()
        self._checksum.update(last)
        return self._framed(rest + last) + _behind(self._checksum.digest())

    def _seal(self, plain: bytes) -> bytes:
        self._received += len(plain)
        if self._received > self._plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        sealed = bytes(self._sealer.update(plain))
        self._checksum.update(sealed)
        return sealed

    def _framed(self, sealed: bytes) -> bytes:
        if self._begun or not sealed:
            return sealed
        self._begun = True
        return _before(self._plain_bytes) + sealed


def _before(plain_bytes: int) -> bytes:
    return f"{sealed_length(plain_bytes):x}\r\n".encode()


def _behind(checksum: bytes) -> bytes:
    return f"\r\n0\r\n{_TRAILER}:{base64.b64encode(checksum).decode()}\r\n\r\n".encode()


def _own_codings(fields: Fields) -> list[str]:
    values = (part.strip(" \t") for value in fields.all("content-encoding") for part in value.split(","))
    return [value for value in values if value]
