"""How the body of an upload to S3 comes, how long it is as plaintext, and what it has to match.

1. Digests and checksums are verified over plaintext, whatever announces them: `Content-MD5`,
   `X-Amz-Content-Sha256`, `x-amz-checksum-*` in headers, trailers, or the query of a presigned URL. One that
   does not fit is found before the last record goes up: nothing is stored then (`BadDigest`).
2. None of them goes up, none comes down: they are of what is not stored.
3. S3 needs to know a body's length before it comes; where a client does not say it, S3 refuses, and so do we.
4. Coded or not is decided by what the request says in any of three places; where they contradict each other
   it is refused.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from envelope.objects import PLAIN_LIMIT
from proxy import refusals
from proxy.messages.checksums import CHECKSUMS, Checksum, new_checksum
from proxy.messages.message import Fields, Framing
from proxy.plans.request import Edits, Request
from proxy.profiles.s3.addressing import parameters
from proxy.profiles.s3.authentication import UNSIGNED, Authenticated, ChunkKey, Standing
from proxy.profiles.s3.aws_chunked import AwsChunked
from proxy.profiles.s3.call import Content
from proxy.profiles.s3.hoisted import hoisted
from proxy.refusals import Refusal, RefusedError

CODING: Final = "aws-chunked"
_PREFIX: Final = "x-amz-checksum-"
_NO_VALUES: Final = frozenset({"algorithm", "mode", "type"})
_ALGORITHMS: Final = frozenset({"crc32", "crc32c", "crc64nvme", "md5", "sha1", "sha256", "sha512"})
_NUMBER: Final = re.compile(r"[0-9]{1,19}")
_HEX_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_STREAMING: Final = "STREAMING-"
_SIGNED_CHUNKS: Final = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
_UNSIGNED_CHUNKS: Final = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_TRAILER: Final = "-TRAILER"
_ECDSA: Final = "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"
GONE: Final = frozenset(
    {
        "content-md5",
        "transfer-encoding",
        "x-amz-decoded-content-length",
        "x-amz-sdk-checksum-algorithm",
        "x-amz-trailer",
    }
)
"""Fields of an upload that speak of its body as it came; signers see to X-Amz-Content-Sha256."""


class Expected(NamedTuple):
    """What the body's plaintext hashes to, and what the client is told if it does not."""

    algorithm: str
    value: bytes
    refusal: Refusal
    is_checksum: bool = False
    """`x-amz-checksum-*`, in whatever place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """The body of an upload as it comes, and what of its head goes on with it."""

    content: Content
    edits: Edits
    """Of the head, for another body in place of this one; its length is not among them."""


class CheckedBody:
    """The decoder of one upload: undoes aws-chunked, and compares checksums at the end (rule 1)."""

    def __init__(
        self,
        coded: AwsChunked | None,
        expected: tuple[Expected, ...],
        announced: frozenset[str],
        *,
        sums: dict[str, bytes] | None = None,
    ) -> None:
        """*sums*: filled at the end, with the checksums that the request named as such."""
        self._coded = coded
        self._told = sums
        self._expected = expected
        self._announced = announced
        algorithms = {item.algorithm for item in expected} | {_algorithm(name) for name in announced}
        self._sums: dict[str, Checksum] = {name: new_checksum(name) for name in algorithms}

    def feed(self, piece: bytes) -> bytes:
        plain = piece if self._coded is None else self._coded.feed(piece)
        for checksum in self._sums.values():
            checksum.update(plain)
        return plain

    def finish(self) -> bytes:
        expected = self._expected
        if self._coded is not None:
            self._coded.finish()
            trailers = self._coded.trailers
            expected = (*expected, *(_expected(name, trailers[name]) for name in sorted(self._announced)))
        for item in expected:
            if not hmac.compare_digest(self._sums[item.algorithm].digest(), item.value):
                raise RefusedError(item.refusal)
        if self._told is not None:
            self._told.update((item.algorithm, item.value) for item in expected if item.is_checksum)
        return b""


def read_head(request: Request, authenticated: Authenticated) -> Incoming:
    """RefusedError for what is contradictory, has no length, or could not be checked."""
    fields = request.head.fields
    payload = authenticated.payload or UNSIGNED
    codings = fields.tokens("content-encoding")
    is_coded = payload.startswith(_STREAMING) or CODING in codings or "x-amz-decoded-content-length" in fields
    plain_bytes = _decoded_length(fields) if is_coded else _length(request)
    in_query = hoisted(parameters(request.head.target))
    expected = tuple(dict.fromkeys(_all_expected(fields, in_query, payload)))
    announced = _announced(fields, payload) if is_coded else frozenset[str]()
    key = _chunk_key(payload, authenticated) if is_coded else None
    edits = request.edits.also(drop={*GONE, *(name for name in fields if name.startswith(_PREFIX))})

    sums: dict[str, bytes] = {}

    def decoder() -> CheckedBody:
        coded = None
        if is_coded:
            coded = AwsChunked(decoded_bytes=plain_bytes, announced=announced, key=key)
        return CheckedBody(coded, expected, announced, sums=sums)

    return Incoming(
        content=Content(
            plain_bytes=plain_bytes,
            decoder=decoder if is_coded or expected else None,
            sent_bytes=request.frame.length_bytes,
            sums=sums,
        ),
        edits=without_coding(edits, fields) if CODING in codings else edits,
    )


def without_coding(edits: Edits, fields: Fields) -> Edits:
    """Without the one token; other codings are the object's own, in the client's spelling."""
    kept = [
        token
        for value in fields.all("content-encoding")
        for token in (part.strip(" \t") for part in value.split(","))
        if token and token.lower() != CODING
    ]
    if not kept:
        return edits.also(drop=("content-encoding",))
    return edits.also(put=(("content-encoding", ",".join(kept)),))


def read_document(
    authenticated: Authenticated, fields: Fields, body: bytes, *, has_checksums: bool = True
) -> bytes:
    """A small body that was collected, decoded and checked. RefusedError.

    *has_checksums*: `x-amz-checksum-*` in the head are of this body.
    """
    payload = authenticated.payload or UNSIGNED
    is_coded = payload.startswith(_STREAMING) or "x-amz-decoded-content-length" in fields
    announced = _announced(fields, payload) if is_coded else frozenset[str]()
    coded = None
    if is_coded:
        coded = AwsChunked(
            decoded_bytes=_decoded_length(fields),
            announced=announced,
            key=_chunk_key(payload, authenticated),
        )
    expected = _all_expected(fields, {}, payload, has_checksums=has_checksums)
    checked = CheckedBody(coded, tuple(expected), announced)
    plain = checked.feed(body)
    return plain + checked.finish()


def _length(request: Request) -> int:
    if request.frame.framing is Framing.NONE:
        return 0
    if request.frame.length_bytes is None:
        raise RefusedError(refusals.LENGTH_REQUIRED)
    return request.frame.length_bytes


def _decoded_length(fields: Fields) -> int:
    text = fields.sole("x-amz-decoded-content-length")
    if text is None:
        raise RefusedError(refusals.LENGTH_REQUIRED)
    if not _NUMBER.fullmatch(text) or int(text) >= PLAIN_LIMIT:
        raise RefusedError(refusals.BAD_MESSAGE)
    return int(text)


def _chunk_key(payload: str, authenticated: Authenticated) -> ChunkKey | None:
    """What the chunks are signed with; None: they are not. RefusedError for a kind nobody can verify."""
    if payload in {_UNSIGNED_CHUNKS, UNSIGNED}:
        return None
    if payload in {_SIGNED_CHUNKS, _SIGNED_CHUNKS + _TRAILER}:
        if authenticated.standing is not Standing.VERIFIED or authenticated.chunks is None:
            raise RefusedError(refusals.CANNOT_SIGN)
        return authenticated.chunks
    if payload in {_ECDSA, _ECDSA + _TRAILER}:
        raise RefusedError(refusals.SIGNATURE_VERSION)
    # Another STREAMING-*, or a hash that is of the coded body and cannot be checked against what it holds.
    raise RefusedError(refusals.UNKNOWN_ROUTE if payload.startswith(_STREAMING) else refusals.BAD_MESSAGE)


def _announced(fields: Fields, payload: str) -> frozenset[str]:
    """Names of the trailers to come. RefusedError for one that could not be checked."""
    names = fields.tokens("x-amz-trailer")
    if (bool(names) and not payload.endswith(_TRAILER)) or len(set(names)) < len(names):
        raise RefusedError(refusals.BAD_MESSAGE)
    for name in names:
        _algorithm(name)
    return frozenset(names)


def _algorithm(name: str) -> str:
    """Of a field `x-amz-checksum-...`. RefusedError for one that is not known."""
    algorithm = name.removeprefix(_PREFIX)
    if algorithm == name or algorithm not in _ALGORITHMS:
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    return algorithm


def _all_expected(
    fields: Fields, in_query: dict[str, str], payload: str, *, has_checksums: bool = True
) -> Iterator[Expected]:
    for value in fields.all("content-md5"):
        yield Expected("md5", _decoded("md5", value), refusals.BAD_DIGEST)
    if _HEX_SHA256.fullmatch(payload):
        yield Expected("sha256", bytes.fromhex(payload), refusals.PAYLOAD_MISMATCH)
    elif payload != UNSIGNED and not payload.startswith(_STREAMING):
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    for name in fields:
        if has_checksums and _is_value(name):
            for value in fields.all(name):
                yield _expected(name, value)
    for name, value in in_query.items():
        if _is_value(name):
            yield _expected(name, value)


def _is_value(name: str) -> bool:
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _NO_VALUES


def _expected(name: str, value: str) -> Expected:
    algorithm = _algorithm(name)
    return Expected(algorithm, _decoded(algorithm, value), refusals.BAD_DIGEST, is_checksum=True)


def _decoded(algorithm: str, text: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(refusals.INVALID_DIGEST) from None
    if len(value) != CHECKSUMS[algorithm][1]:
        raise RefusedError(refusals.INVALID_DIGEST)
    return value
