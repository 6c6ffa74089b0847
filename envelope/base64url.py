"""base64url without padding (RFC 4648 section 5), one spelling per value.

A decoder that ignores spare bits or foreign characters accepts many spellings of one token: then a token can
be changed without its content changing, and "the same token" has no meaning.
"""

import base64
import binascii

from envelope.errors import FormatError


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


def encoded_length(size_bytes: int) -> int:
    """Characters of *size_bytes* encoded bytes."""
    return (4 * size_bytes + 2) // 3
