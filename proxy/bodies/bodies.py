"""The bodies that change on their way up, and what all that change have in common: transforms for the gate.

1. The key is asked at every piece and at the end: a body in flight stops when its key ends.
2. A digest or length that does not fit is found before the last chunk goes up: nothing valid is stored then.
   A decoder (aws-chunked, say) stands before all of it, and its own checks count like a digest's.
3. Every failure becomes a refusal of the table; which check of an object failed is told to nobody.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Final, NoReturn, override

from envelope.errors import (
    FormatError,
    IntegrityError,
    KeyUnavailableError,
    SealgateError,
    Unavailable,
)
from envelope.keys import ANONYMOUS, NetworkService
from envelope.multipart import part_sealer
from envelope.objects import MAGIC, Sealer, has_magic, sealed_length
from proxy import refusals
from proxy.gate.permit import Piece, Transform
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import ExpectedDigest
from proxy.plans.conversing import PartOf, Sealed
from proxy.plans.plan import Decoder, EmptyBody, Reshape, Reshaper, Seal
from proxy.refusals import Refusal, RefusedError
from proxy.uploads import UploadsFullError, UploadsUnavailableError
from runtime.audit import AuditUnavailableError

type Meter = Callable[[int], None]
"""Told the plaintext bytes of every piece that went through."""

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
        case UploadsUnavailableError():
            return refusals.UPLOADS_UNAVAILABLE
        case UploadsFullError():
            return refusals.UPLOADS_FULL
        case _:
            return refusals.INTERNAL


def sealing_refusal(error: KeyUnavailableError) -> Refusal:
    """The same where no object is at hand yet: a key that was never pushed is no *active* key."""
    return refusals.NO_ACTIVE_KEY if error.reason is Unavailable.UNKNOWN else refusal_for(error)


async def sealing_key(keys: KeyCache, owner: NetworkService, *, wait_s: float) -> DataKey:
    """The active key; one that is late is waited for: a push may be on its way. RefusedError without one."""
    try:
        return keys.sealing_key(owner)
    except KeyUnavailableError:
        pass
    try:
        return await keys.wait_for_sealing_key(owner, timeout_s=wait_s)
    except KeyUnavailableError as error:
        raise RefusedError(sealing_refusal(error)) from error


def refuse(error: SealgateError) -> NoReturn:
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


def sealer_of(key: DataKey, part: PartOf | None = None, *, anonymous: bool = False) -> Sealer:
    """A sealer for one message under *key*: an object, or a part of a composite, always naming its key."""
    if part is None and anonymous:
        return Sealer(key.anonymous_object_key, key.owner, ANONYMOUS)
    if part is None:
        return Sealer(key.object_key, key.owner, key.key_id)
    return part_sealer(key.object_key, key.owner, key.key_id, upload=part.upload_ref, number=part.number)


class SealBody(Transform):
    """Seals an upload of *plain_bytes* (None: as many as come) under *key*.

    *digests* are checked; those that *record_digests* names are computed. With a *decoder* all of this is
    about what it yields. *on_sealed* is told of an upload that begins like a sealed object. *anonymous*: the
    object names no key.
    """

    def __init__(
        self,
        key: DataKey,
        *,
        plain_bytes: int | None = None,
        empty: EmptyBody = EmptyBody.SEAL,
        digests: tuple[ExpectedDigest, ...] = (),
        decoder: Decoder | None = None,
        part: PartOf | None = None,
        record_digests: tuple[str, ...] = (),
        on_sealed: Callable[[], None] | None = None,
        anonymous: bool = False,
        meter: Meter,
    ) -> None:
        self.key = key
        self._sealer = sealer_of(key, part, anonymous=anonymous)
        self._on_sealed = on_sealed
        self._begin = b""
        self._plain_bytes = plain_bytes
        self._empty = empty
        self._expected = digests
        algorithms = dict.fromkeys((*(digest.algorithm for digest in digests), *record_digests))
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
        self._decoder = decoder
        self._meter = meter
        self._received = 0
        if plain_bytes is not None:
            self.expected_out_bytes = sealed_length(plain_bytes)

    @classmethod
    def by(
        cls,
        plan: Seal,
        key: DataKey,
        meter: Meter,
        *,
        anonymous: bool = False,
        on_sealed: Callable[[], None] | None = None,
    ) -> "SealBody":
        return cls(
            key,
            plain_bytes=plan.plain_bytes,
            empty=plan.empty,
            digests=plan.digests,
            decoder=plan.decoder() if plan.decoder is not None else None,
            part=plan.part,
            record_digests=plan.record_digests,
            on_sealed=on_sealed,
            anonymous=anonymous,
            meter=meter,
        )

    @property
    def sealed(self) -> Sealed:
        """What the upload became; RefusedError(INTERNAL) before its end."""
        if not self.finished:
            raise RefusedError(refusals.INTERNAL)
        return Sealed(
            plain_bytes=self._received,
            stored_bytes=self.out_bytes,
            commitment=self._sealer.commitment,
            key_id=self.key.key_id.raw,
            digests={name: made.digest() for name, made in self._hashes.items()},
        )

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        return self._seal(piece if self._decoder is None else self._decoder.feed(piece))

    def _seal(self, piece: bytes) -> list[Piece]:
        try:
            self.key.check()
            if self._on_sealed is not None:
                self._look(piece)
            self._received += len(piece)
            if self._plain_bytes is not None and self._received > self._plain_bytes:
                raise RefusedError(refusals.BAD_LENGTH)
            for digest in self._hashes.values():
                digest.update(piece)
            sealed = self._sealer.update(piece)
        except SealgateError as error:
            refuse(error)
        self._meter(len(piece))
        return [sealed]

    def _look(self, piece: bytes) -> None:
        self._begin += piece[: len(MAGIC) - len(self._begin)]
        if len(self._begin) == len(MAGIC):
            told, self._on_sealed = self._on_sealed, None
            if told is not None and has_magic(self._begin):
                told()

    @override
    def finish(self) -> list[Piece]:
        rest: list[Piece] = []
        if self._decoder is not None and (last := self._decoder.finish()):
            rest = self._seal(last)
        if self._plain_bytes is not None and self._received != self._plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        for digest in self._expected:
            if not hmac.compare_digest(self._hashes[digest.algorithm].digest(), digest.value):
                raise RefusedError(refusals.BAD_DIGEST)
        if not self._received and self._empty is EmptyBody.KEEP:
            return []
        try:
            self.key.check()
            return [*rest, self._sealer.finalize()]
        except SealgateError as error:
            refuse(error)


class ReshapeBody(Transform):
    """A body that a profile's reshaper makes, with messages sealed under *key* in it.

    The head waits for the first output, by which the reshaper may know its length: *on_length* then declares
    it (None: none is). Until then *declared_bytes*, the length that came, stands in.
    """

    holds_head = True

    def __init__(
        self,
        plan: Reshape,
        key: DataKey,
        *,
        declared_bytes: int | None,
        on_length: Callable[[int | None], None],
        meter: Meter,
    ) -> None:
        self.key = key
        self._reshaper: Reshaper = plan.make(lambda part=None: sealer_of(key, part))
        self._on_length = on_length
        self._meter = meter
        self._is_settled = False
        self.expected_out_bytes = declared_bytes

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        made = self._checked_by_key(lambda: self._reshaper.feed(piece))
        self._meter(len(piece))
        return self._settled(made)

    @override
    def finish(self) -> list[Piece]:
        return self._settled(self._checked_by_key(self._reshaper.finish), is_end=True)

    def _checked_by_key(self, step: Callable[[], bytes]) -> bytes:
        try:
            self.key.check()
            return step()
        except SealgateError as error:
            refuse(error)

    def _settled(self, made: bytes, *, is_end: bool = False) -> list[Piece]:
        if not self._is_settled and (made or is_end):
            self._is_settled = True
            if self.expected_out_bytes != self._reshaper.out_bytes:
                self.expected_out_bytes = self._reshaper.out_bytes
                self._on_length(self.expected_out_bytes)
        return [made]
