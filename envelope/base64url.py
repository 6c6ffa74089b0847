"""base64url without padding (RFC 4648 section 5), one spelling per value.

1. A decoder that ignores spare bits or foreign characters accepts many spellings of one token: then a token
   can be changed without its content changing, and "the same token" has no meaning.
2. For secrets there is a pair of functions that leaves no copy behind but what it returns. `binascii` works
   in a buffer that is too large and then moved to a smaller place; up to 512 bytes that buffer is on the
   stack, where the next call overwrites it. So secrets go through it in steps, and zeros after them.
   `translate` of `bytes` that stay the same throws a copy away; that of a `bytearray` returns it.
"""

import base64
import binascii
from typing import Final

from envelope.errors import FormatError
from envelope.memory import wipe

type Buffer = bytes | bytearray | memoryview

_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
# What has a meaning in the other alphabet only must not pass.
_FROM_URL: Final = bytes.maketrans(b"-_+/=", b"+/!!!")
_STEP: Final = 192
_STEP_CHARACTERS: Final = 256


def b64u_encode(data: bytes) -> str:
    """*data* as base64url text without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def b64u_decode(text: str) -> bytes:
    """Inverse of `b64u_encode`. FormatError for any text that `b64u_encode` does not write."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if b64u_encode(data) != text:
        raise FormatError("not base64url without padding")
    return data


def encode_secret(secret: Buffer) -> bytearray:
    """What `b64u_encode` writes, to be overwritten by the caller."""
    encoded = bytearray(encoded_length(len(secret)))
    # Views: assigning to a slice of a bytearray would make a copy first.
    with memoryview(secret) as source, memoryview(encoded) as target:
        for start in range(0, len(secret), _STEP):
            written = binascii.b2a_base64(source[start : start + _STEP], newline=False)
            padded = bytearray(written)
            translated = padded.translate(_TO_URL)
            place = target[start // 3 * 4 : start // 3 * 4 + _STEP_CHARACTERS]
            place[:] = memoryview(translated)[: len(place)]
            wipe(written)
            padded[:] = translated[:] = bytes(len(padded))
    binascii.b2a_base64(bytes(_STEP))
    return encoded


def decode_secret(text: Buffer) -> bytearray:
    """What `b64u_decode` reads, to be overwritten by the caller. FormatError as there."""
    decoded = bytearray(len(text) * 3 // 4)
    again = bytearray()
    try:
        with memoryview(text) as source, memoryview(decoded) as target:
            for start in range(0, len(text), _STEP_CHARACTERS):
                _decode_step(source[start : start + _STEP_CHARACTERS], target[start // 4 * 3 :][:_STEP])
        again = encode_secret(decoded)
        is_good = again == text
    except (binascii.Error, FormatError):
        is_good = False
    finally:
        again[:] = bytes(len(again))
        binascii.a2b_base64(b"A" * _STEP_CHARACTERS)
    if not is_good:
        decoded[:] = bytes(len(decoded))
        raise FormatError("not base64url without padding")
    return decoded


def _decode_step(text: memoryview, target: memoryview) -> None:
    """binascii.Error or FormatError: not base64url, as far as one can tell without encoding it again."""
    padded = bytearray(b"=" * (len(text) + -len(text) % 4))
    read = bytearray(text)
    translated = read.translate(_FROM_URL)
    padded[: len(text)] = translated  # from a bytearray: without a copy
    piece = b""
    try:
        piece = binascii.a2b_base64(padded, strict_mode=True)
        if len(piece) != len(target):
            raise FormatError("not base64url without padding")
        target[:] = piece
    finally:
        wipe(piece)
        for copy in (padded, read, translated):
            copy[:] = bytes(len(copy))


def encoded_length(size_bytes: int) -> int:
    """Characters of *size_bytes* encoded bytes."""
    return (4 * size_bytes + 2) // 3
