"""The bodies that change on their way: transforms for the gate, over the sealed objects of envelope/.

1. The key is asked at every piece and at the end: a body in flight stops when its key ends.
2. A digest or length that does not fit is found before the last chunk goes up: nothing valid is stored then.
3. Every failure becomes a refusal of the table; which check of an object failed is told to nobody.
4. An answer's head waits until its object has begun to verify.
5. What passes unopened is looked at first, through a coding too: it must not begin like an object of ours.
"""

import hashlib
import hmac
import zlib
from collections.abc import Callable
from typing import Final, NoReturn, override

from envelope.errors import (
    FormatError,
    IntegrityError,
    KeyUnavailableError,
    SealgateError,
    Unavailable,
)
from envelope.keys import NetworkService
from envelope.objects import MAGIC, Header, Opener, RangeOpener, Sealer, has_magic, sealed_length
from proxy import refusals
from proxy.gate.permit import Piece, Transform
from proxy.keys.cache import DataKey
from proxy.message import ExpectedDigest
from proxy.plan import AskedRange, EmptyBody
from proxy.refusals import Refusal, RefusedError
from runtime.audit import AuditUnavailableError

type FindKey = Callable[[Header], DataKey]
"""The key an object names. KeyUnavailableError; AuditUnavailableError if its use could not be recorded."""
type Meter = Callable[[int], None]
"""Told the plaintext bytes of every piece that went through."""

CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate"})
"""Content codings that can be looked through."""
_MAX_LOOK_BYTES: Final = 16 * 1024

_KEY_REFUSALS: Final = {
    Unavailable.UNKNOWN: refusals.KEY_UNKNOWN,
    Unavailable.EXPIRED: refusals.KEY_EXPIRED,
    Unavailable.WITHDRAWN: refusals.KEY_WITHDRAWN,
    Unavailable.NOT_ACTIVE: refusals.NO_ACTIVE_KEY,
    Unavailable.SUSPENDED: refusals.KEY_SUSPENDED,
    Unavailable.COMPROMISED: refusals.KEY_SUSPENDED,
    Unavailable.DESTROYED: refusals.KEY_DESTROYED,
}


def refusal_for(error: SealgateError) -> Refusal:
    """What a client is told about *error*."""
    match error:
        case KeyUnavailableError():
            return _KEY_REFUSALS[error.reason]
        case AuditUnavailableError():
            return refusals.AUDIT_UNAVAILABLE
        case FormatError() | IntegrityError():
            return refusals.OBJECT_INVALID
        case _:
            return refusals.INTERNAL


def sealing_refusal(error: KeyUnavailableError) -> Refusal:
    """The same where no object is at hand yet: a key that was never pushed is no *active* key."""
    return refusals.NO_ACTIVE_KEY if error.reason is Unavailable.UNKNOWN else refusal_for(error)


def _refuse(error: SealgateError) -> NoReturn:
    raise RefusedError(refusal_for(error)) from error


class NoBody(Transform):
    """For a request that must not have a body where the framing cannot rule one out (HTTP/2).

    Its head says `Content-Length: 0`.
    """

    expected_out_bytes = 0

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        raise RefusedError(refusals.UNKNOWN_ROUTE)

    @override
    def finish(self) -> list[Piece]:
        return []


class SealBody(Transform):
    """Seals an upload of *plain_bytes* (None: as many as come) under *key*."""

    def __init__(
        self,
        key: DataKey,
        *,
        plain_bytes: int | None = None,
        empty: EmptyBody = EmptyBody.SEAL,
        digests: tuple[ExpectedDigest, ...] = (),
        meter: Meter,
    ) -> None:
        self.key = key
        self._sealer = Sealer(key.object_key, key.owner, key.key_id)
        self._plain_bytes = plain_bytes
        self._empty = empty
        self._digests = [
            (hashlib.new(digest.algorithm, usedforsecurity=False), digest.value) for digest in digests
        ]
        self._meter = meter
        self._received = 0
        if plain_bytes is not None:
            self.expected_out_bytes = sealed_length(plain_bytes)

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        try:
            self.key.check()
            self._received += len(piece)
            if self._plain_bytes is not None and self._received > self._plain_bytes:
                raise RefusedError(refusals.BAD_LENGTH)
            for digest, _value in self._digests:
                digest.update(piece)
            sealed = self._sealer.update(piece)
        except SealgateError as error:
            _refuse(error)
        self._meter(len(piece))
        return [sealed]

    @override
    def finish(self) -> list[Piece]:
        if self._plain_bytes is not None and self._received != self._plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        for digest, value in self._digests:
            if not hmac.compare_digest(digest.digest(), value):
                raise RefusedError(refusals.BAD_DIGEST)
        if not self._received and self._empty is EmptyBody.KEEP:
            return []
        try:
            self.key.check()
            return [self._sealer.finalize()]
        except SealgateError as error:
            _refuse(error)


class OpenBody(Transform):
    """Opens the object in an answer.

    *out_bytes*: what the head will declare, None where it will not. *may_be_sealed*, *may_be_legacy*: what
    the body can be, by its length and the service's policy; the first bytes tell which it is. *on_legacy*:
    called once, before anything comes out, when the body passes as it is; what it raises refuses the body.
    *coding*: one of CODINGS that the answer names; a service may have coded what it stores.
    """

    holds_head = True

    def __init__(
        self,
        owner: NetworkService,
        find_key: FindKey,
        *,
        out_bytes: int | None,
        may_be_sealed: bool = True,
        may_be_legacy: bool = False,
        on_legacy: Callable[[], None] | None = None,
        coding: str | None = None,
        meter: Meter,
    ) -> None:
        self._find_key = find_key
        self.key: DataKey | None = None
        self._opener = Opener(owner, self._object_key)
        self._may_be_sealed = may_be_sealed
        self._may_be_legacy = may_be_legacy
        self._on_legacy = on_legacy
        self._coding = coding
        self._meter = meter
        self._begin: bytearray | None = bytearray()
        self._passes = False
        self.expected_out_bytes = out_bytes

    def _object_key(self, header: Header) -> memoryview:
        self.key = self._find_key(header)
        return self.key.object_key

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        if self._begin is not None:
            self._begin += piece
            if len(self._begin) < len(MAGIC) or not self._decide(more_may_come=True):
                return []
            piece, self._begin = bytes(self._begin), None
        return self._pass_on(piece)

    @override
    def finish(self) -> list[Piece]:
        rest: list[Piece] = []
        if self._begin is not None:
            self._decide(more_may_come=False)
            rest = self._pass_on(bytes(self._begin))
        if self._passes:
            return rest
        try:
            if self.key is not None:
                self.key.check()
            last = self._opener.finalize()
        except SealgateError as error:
            _refuse(error)
        self._meter(len(last))
        return [*rest, last]

    def _decide(self, *, more_may_come: bool) -> bool:
        """By the first bytes: an object of ours, or what was there before us. False: too few to tell."""
        begin = self._begin or b""
        if has_magic(begin):
            if not self._may_be_sealed:
                raise RefusedError(refusals.OBJECT_INVALID)
            return True
        if not self._may_be_legacy:
            raise RefusedError(refusals.NOT_SEALED if begin else refusals.OBJECT_INVALID)
        decoded = _decoded(begin, self._coding) if self._coding is not None else None
        if decoded is not None:
            is_short = len(decoded) < len(MAGIC)
            if has_magic(decoded) or (is_short and len(begin) > _MAX_LOOK_BYTES):
                raise RefusedError(refusals.OBJECT_INVALID)
            if is_short and more_may_come:
                return False
        self._passes = True
        if self._on_legacy is not None:
            try:
                self._on_legacy()
            except SealgateError as error:
                _refuse(error)
        return True

    def _pass_on(self, piece: bytes) -> list[Piece]:
        if self._passes:
            return [piece]
        try:
            if self.key is not None:
                self.key.check()
            opened = self._opener.update(piece)
        except SealgateError as error:
            _refuse(error)
        self._meter(len(opened))
        return [opened]


def _decoded(begin: bytes | bytearray, coding: str) -> bytes | None:
    """The first bytes that *begin* decodes to, as far as it goes; None if it is not coded so."""
    windows = [zlib.MAX_WBITS | 32, -zlib.MAX_WBITS] if coding == "deflate" else [zlib.MAX_WBITS | 16]
    for window_bits in windows:  # many send deflate without its zlib frame (RFC 9110 8.4.1.2)
        try:
            return zlib.decompressobj(window_bits).decompress(begin, len(MAGIC))
        except zlib.error:
            continue
    return None


class OpenRangeBody(Transform):
    """Opens the stored range *asked* of an object whose first 88 bytes are *prefix*."""

    holds_head = True

    def __init__(self, key: DataKey, prefix: bytes, asked: AskedRange, *, meter: Meter) -> None:
        """RefusedError if the prefix is no object's under *key*."""
        self.key = key
        self._meter = meter
        start, stop = asked.plain
        self.expected_out_bytes = stop - start
        try:
            self._opener = RangeOpener(
                key.owner,
                lambda _header: key.object_key,
                prefix,
                start=start,
                stop=stop,
                plain_bytes=asked.plain_bytes,
            )
        except SealgateError as error:
            _refuse(error)

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        try:
            self.key.check()
            opened = self._opener.update(piece)
        except SealgateError as error:
            _refuse(error)
        self._meter(len(opened))
        return [opened]

    @override
    def finish(self) -> list[Piece]:
        try:
            self.key.check()
            return [self._opener.finalize()]
        except SealgateError as error:
            _refuse(error)
