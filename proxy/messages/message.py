"""Reading the head of a message: sizes, ranges, digests, out of fields that may be hostile.

1. Names are lower case here; a field that came twice stays visible as two values.
2. What is ambiguous is refused, never repaired: two lengths, a length beside chunks, an unknown coding.
3. What may be ignored (RFC 9110) when it is malformed, a Range say, is ignored and never guessed at.
"""

import base64
import binascii
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, override

from envelope.objects import PLAIN_LIMIT
from proxy import refusals
from proxy.refusals import RefusedError

# 2^63 has 19 digits; nothing longer is a size, and int() of a long string is slow on purpose.
_NUMBER: Final = re.compile(r"[0-9]{1,19}")
_LONG_NUMBER: Final = re.compile(r"[0-9]{1,256}")
_RANGE: Final = re.compile(r"bytes[ \t]*=[ \t]*([0-9]*)-([0-9]*)", re.IGNORECASE)
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.IGNORECASE)
_DICTIONARY_MEMBER: Final = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):")
_BEYOND: Final = 1 << 62
_MAX_USUAL_NAME: Final = 64

# By the words of the name, whatever product made it up: metadata too, which clients like rclone use.
_DIGEST_NAME: Final = re.compile(
    r"(?:.*[-_.])?(?:md5|sha(?:1|224|256|384|512)?|crc[0-9][a-z0-9]*"
    r"|(?:content)?(?:md5|sha[0-9]*)?(?:checksum|chksum|digest|hash|sum)s?)(?:[-_.].*)?"
)
# A signature of requests without a body needs these; UNSIGNED-PAYLOAD and the like are no digests.
_SIGNED_DIGESTS: Final = frozenset({"x-amz-content-sha256", "x-goog-content-sha256"})
_NO_BODY_SHA256: Final = hashlib.sha256().hexdigest()
_HEX_SHA256: Final = re.compile(r"[0-9A-Fa-f]{64}")
_HASHES: Final = {
    "md5": "md5",
    "sha": "sha1",
    "sha-256": "sha256",
    "sha-512": "sha512",
}
_OC_HASHES: Final = {"md5": "md5", "sha1": "sha1", "sha256": "sha256", "sha512": "sha512"}
_HEX_FIELDS: Final = {"x-checksum-md5": "md5", "x-checksum-sha1": "sha1", "x-checksum-sha256": "sha256"}
_DIGEST_BYTES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}


class Fields:
    """The header fields of one message, by lower-case name; values in the order they came."""

    __slots__ = ("_values",)

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        values: dict[str, list[str]] = {}
        for name, value in fields:
            values.setdefault(name.decode("latin-1").lower(), []).append(
                value.decode("utf-8", "surrogateescape").strip(" \t")
            )
        self._values: Final = values

    @override
    def __repr__(self) -> str:
        # Names only: values are credentials as often as not.
        return f"Fields({sorted(self._values)})"

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])

    def joined_values(self) -> str:
        """All values of all fields, one after the other: to look for what must be in none of them."""
        return "".join([value for values in self._values.values() for value in values])

    def first(self, name: str) -> str | None:
        values = self._values.get(name)
        return values[0] if values else None

    def sole(self, name: str) -> str | None:
        """The value of a field that came exactly once; None if it is absent or came several times."""
        values = self._values.get(name)
        return values[0] if values is not None and len(values) == 1 else None

    def tokens(self, name: str) -> list[str]:
        """The comma-separated members of all fields of this name, lower case, without empty ones."""
        return [
            token.strip(" \t").lower()
            for value in self._values.get(name, ())
            for token in value.split(",")
            if token.strip(" \t")
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """A request without its body. `target` is path and query as they came (origin form)."""

    method: str
    target: str
    fields: Fields
    http2: bool = False
    host: str = ""
    """Host field or authority as the client sent it: what it has signed, where it signs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """A service's answer without its body."""

    status: int
    fields: Fields


class Framing(Enum):
    """How a request says where its body ends."""

    NONE = "none"  # no body
    LENGTH = "length"  # Content-Length, 0 included
    CHUNKED = "chunked"
    STREAM = "stream"  # HTTP/2 without Content-Length: a body may come, or none


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFrame:
    framing: Framing
    length_bytes: int | None = None

    @property
    def is_declared(self) -> bool:
        """Whether the client announced a body that is not empty."""
        return self.framing is Framing.CHUNKED or bool(self.length_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedDigest:
    """What the client says the plaintext hashes to. `algorithm` is hashlib's name."""

    algorithm: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """One range, both ends inclusive. `first` None: the last `last` bytes. `last` None: to the end."""

    first: int | None
    last: int | None

    def resolve(self, total_bytes: int) -> tuple[int, int] | None:
        """Half-open [start, stop) within *total_bytes*; None if nothing of it lies inside."""
        if self.first is None:
            start, stop = max(0, total_bytes - (self.last or 0)), total_bytes
        else:
            start = self.first
            stop = total_bytes if self.last is None else min(self.last + 1, total_bytes)
        return (start, stop) if start < stop else None


def body_frame(head: RequestHead) -> BodyFrame:
    """How the request's body is delimited. RefusedError(BAD_MESSAGE) where that is ambiguous or unknown."""
    lengths = head.fields.all("content-length")
    codings = head.fields.tokens("transfer-encoding")
    if codings or "transfer-encoding" in head.fields:
        if lengths or head.http2 or codings != ["chunked"]:
            raise RefusedError(refusals.BAD_MESSAGE)
        return BodyFrame(framing=Framing.CHUNKED)
    if not lengths:
        return BodyFrame(framing=Framing.STREAM if head.http2 else Framing.NONE)
    if len(lengths) > 1 or not _NUMBER.fullmatch(lengths[0]):
        raise RefusedError(refusals.BAD_MESSAGE)
    length = int(lengths[0])
    if length >= PLAIN_LIMIT:
        raise RefusedError(refusals.BAD_MESSAGE)
    return BodyFrame(framing=Framing.LENGTH, length_bytes=length)


def byte_range(fields: Fields) -> ByteRange | None:
    """The one range that is asked for; None where there is none, or one that may be ignored (RFC 9110 14.2).

    Several ranges, malformed ones and other units are ignored: the answer is the whole object.
    """
    return byte_range_of(fields.sole("range"))


def byte_range_of(text: str | None) -> ByteRange | None:
    """The same of one field's value: dialects have ranges of their own (`x-ms-range`)."""
    match = _RANGE.fullmatch(text or "")
    if match is None:
        return None
    first, last = (_position(text) for text in match.groups())
    if first is None and last is None:
        return None
    if first is not None and last is not None and first > last:
        return None
    return ByteRange(first=first, last=last)


def _position(text: str) -> int | None:
    if not text:
        return None
    # No object reaches so far: where exactly a huge number lies makes no difference.
    return min(int(text), _BEYOND) if _LONG_NUMBER.fullmatch(text) else _BEYOND


def content_range(fields: Fields) -> tuple[int, int, int] | None:
    """Half-open range and total of a 206; None if it is missing, malformed, or does not state the total."""
    match = _CONTENT_RANGE.fullmatch(fields.sole("content-range") or "")
    if match is None:
        return None
    first, last, total = (int(text) for text in match.groups())
    return (first, last + 1, total) if first <= last < total else None


def strong_etag(fields: Fields) -> str | None:
    """The entity tag if it identifies bytes (RFC 9110 8.8.3): quoted and not weak."""
    etag = fields.sole("etag")
    strong = etag is not None and len(etag) >= 2 and etag.startswith('"') and etag.endswith('"')
    return etag if strong else None


def request_digests(fields: Fields) -> tuple[ExpectedDigest, ...]:
    """The digests of the body that can be checked; unknown algorithms are left out (RFC 9530 2).

    One of each algorithm at most: every further one would cost the hashing of the whole body again.
    RefusedError(BAD_DIGEST) if one of a known algorithm is malformed, or two of an algorithm differ.
    """
    found = [_expected("md5", value) for value in fields.all("content-md5")]
    for value in fields.all("digest"):
        for member in value.split(","):
            name, _, encoded = member.strip(" \t").partition("=")
            if (algorithm := _HASHES.get(name.lower())) is not None:
                found.append(_expected(algorithm, encoded))
    for name in ("content-digest", "repr-digest"):
        for value in fields.all(name):
            found.extend(_dictionary(value))
    for value in fields.all("oc-checksum"):
        for member in value.split():
            kind, _, digits = member.partition(":")
            if (algorithm := _OC_HASHES.get(kind.lower())) is not None:
                found.append(_sized(algorithm, _from_hex(digits)))
    for name, algorithm in _HEX_FIELDS.items():
        found.extend(_sized(algorithm, _from_hex(value)) for value in fields.all(name))
    for name in _SIGNED_DIGESTS:
        values = filter(_HEX_SHA256.fullmatch, fields.all(name))
        found.extend(_sized("sha256", _from_hex(value)) for value in values)
    distinct = tuple(dict.fromkeys(found))
    if len({digest.algorithm for digest in distinct}) < len(distinct):
        raise RefusedError(refusals.BAD_DIGEST)
    return distinct


def _dictionary(value: str) -> list[ExpectedDigest]:
    found: list[ExpectedDigest] = []
    for member in value.split(","):
        text = member.strip(" \t")
        match = _DICTIONARY_MEMBER.fullmatch(text)
        if match is None:
            if text.partition("=")[0] in _HASHES:
                raise RefusedError(refusals.BAD_DIGEST)
            continue
        if (algorithm := _HASHES.get(match[1])) is not None:
            found.append(_expected(algorithm, match[2]))
    return found


def _expected(algorithm: str, encoded: str) -> ExpectedDigest:
    try:
        value = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(refusals.BAD_DIGEST) from None
    return _sized(algorithm, value)


def _from_hex(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise RefusedError(refusals.BAD_DIGEST) from None


def _sized(algorithm: str, value: bytes) -> ExpectedDigest:
    if len(value) != _DIGEST_BYTES[algorithm]:
        raise RefusedError(refusals.BAD_DIGEST)
    return ExpectedDigest(algorithm=algorithm, value=value)


def digest_fields(fields: Fields) -> frozenset[str]:
    """The fields of this message that hold a digest of its body, by their names."""
    return frozenset([name for name in fields if _is_digest_name(name) and _tells(name, fields)])


def _is_digest_name(name: str) -> bool:
    # Nearly all messages have the same fields. What is kept is bounded in length too.
    return _is_known_digest_name(name) if len(name) <= _MAX_USUAL_NAME else _matches_digest_name(name)


def _matches_digest_name(name: str) -> bool:
    return _DIGEST_NAME.fullmatch(name) is not None


_is_known_digest_name: Final = functools.lru_cache(maxsize=1024)(_matches_digest_name)


def _tells(name: str, fields: Fields) -> bool:
    if name not in _SIGNED_DIGESTS:
        return True
    return any(_HEX_SHA256.fullmatch(value) and value != _NO_BODY_SHA256 for value in fields.all(name))


def declared_length(fields: Fields) -> int | None:
    """The answer's Content-Length. RefusedError(OBJECT_INVALID) if it came several times or is no number."""
    if "content-length" not in fields:
        return None
    value = fields.sole("content-length")
    if value is None or not _NUMBER.fullmatch(value):
        raise RefusedError(refusals.OBJECT_INVALID)
    return int(value)
