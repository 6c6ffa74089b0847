"""Compact tokens, JSON and base64, read more strictly than the libraries do: for key-material envelopes.

1. Whatever has two spellings is taken in one: no member twice, no float, no padding, no other alphabet.
2. Errors are EnvelopeError, and quote nothing of what was read: it may be key material.
3. A secret is read into a buffer that the caller overwrites; the strings made on the way are overwritten here
   (envelope/memory.py).
"""

import json
from typing import Any, Final, NoReturn

from envelope.base64url import b64u_decode, decode_secret
from envelope.errors import EnvelopeError, FormatError
from envelope.memory import wipe, wipe_text

MAX_ENVELOPE_BYTES: Final = 64 * 1024
MAX_SEQUENCE: Final = 2**53 - 1


def segments(token: str, count: int) -> list[str]:
    """The *count* parts of a compact serialisation, each in the one spelling of base64url."""
    if len(token) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too-large", f"more than {MAX_ENVELOPE_BYTES} bytes")
    parts = token.split(".")
    if len(parts) != count:
        raise EnvelopeError("malformed", f"not a compact token of {count} parts")
    try:
        for part in parts:
            b64u_decode(part)
    except FormatError:
        raise EnvelopeError("malformed", "a part is not base64url") from None
    return parts


def json_object(document: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that *document* is: no member twice, no float, no NaN."""
    text = ""
    try:
        text = document.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique_members,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError):
        # Without the cause: its text may quote the document.
        raise EnvelopeError("malformed", "not the JSON of this format") from None
    finally:
        wipe_text(text)
    if not isinstance(value, dict):
        raise EnvelopeError("malformed", "not a JSON object")
    return value


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member twice")
    return members


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"not an integer ({len(text)} characters)")


def integer(claims: dict[str, Any], name: str) -> int:
    """A member that is there: at most MAX_SEQUENCE either way, which is what JSON carries exactly."""
    value = claims[name]
    # A bool is an int to Python, not to this format.
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_SEQUENCE:
        raise EnvelopeError("malformed", f"{name} is not an integer in range")
    return value


def bytes_member(members: dict[str, Any], name: str, size: int | None, code: str) -> bytes:
    """The bytes of a member in base64url, *size* of them if it is given; else an error with *code*."""
    value = members.get(name)
    try:
        data = b64u_decode(value) if isinstance(value, str) else None
    except FormatError:
        data = None
    if data is None or (size is not None and len(data) != size):
        raise EnvelopeError(code, f"{name} is not the base64url of {size or 'some'} bytes")
    return data


def secret_member(members: dict[str, Any], name: str) -> bytearray:
    """As `bytes_member`, of a secret."""
    value = members[name]
    text = value.encode("ascii", "replace") if isinstance(value, str) else b"?"
    try:
        return decode_secret(text)
    except FormatError:
        raise EnvelopeError("malformed", f"{name} is not the base64url of some bytes") from None
    finally:
        wipe(text)
