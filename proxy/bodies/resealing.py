"""Uploads that are sealed objects already, on services whose option `sealed_upload` is `pass`.

1. What begins like one of our objects is stored as it is, if it opens under a key of this service, whole: it
   is opened on the way, and its plaintext dropped. What does not open is refused, and its end never goes up.
2. Anything else is sealed as ever. The head waits for the first bytes: they decide how long the body is.
3. Composites are refused: their proof lies at their end, which this way comes too late.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import override

from envelope.errors import KeyUnavailableError, SealgateError, Unavailable
from envelope.objects import MAGIC, Header, Opener, has_magic
from proxy import refusals
from proxy.bodies.bodies import Meter, SealBody, refusal_for
from proxy.gate.permit import Piece, Transform
from proxy.keys.data_key import DataKey
from proxy.plans.plan import Decoder, Seal
from proxy.refusals import Refusal, RefusedError


class SealOrPassBody(Transform):
    """*sealing* for what is not sealed; *on_pass* is told, before anything leaves, that it is, and how long
    the body then is (None: not known)."""

    holds_head = True

    def __init__(
        self,
        plan: Seal,
        sealing: SealBody,
        *,
        find_key: Callable[[Header], DataKey],
        on_pass: Callable[[int | None], None],
        meter: Meter,
    ) -> None:
        self.key: DataKey | None = sealing.key
        self._plan = plan
        self._sealing = sealing
        self._decoder: Decoder | None = plan.decoder() if plan.decoder is not None else None
        self._find_key = find_key
        self._on_pass = on_pass
        self._meter = meter
        self._begin: bytes | None = b""
        self._opener: Opener | None = None
        self._received = 0
        self._hashes = {
            digest: hashlib.new(digest.algorithm, usedforsecurity=False) for digest in plan.digests
        }
        self.expected_out_bytes = sealing.expected_out_bytes

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        return self._take(piece if self._decoder is None else self._decoder.feed(piece))

    def _take(self, piece: bytes) -> list[Piece]:
        if self._begin is not None:
            self._begin += piece
            if len(self._begin) < len(MAGIC):
                return []
            piece, self._begin = self._begin, None
            if has_magic(piece):
                self._begin_to_pass()
        return self._pass(piece) if self._opener is not None else list(self._sealing.feed(piece))

    def _begin_to_pass(self) -> None:
        self._opener = Opener(self._sealing.key.owner, self._object_key)
        self.expected_out_bytes = self._plan.plain_bytes
        self._on_pass(self.expected_out_bytes)

    def _object_key(self, header: Header) -> memoryview:
        self.key = self._find_key(header)
        return self.key.object_key

    def _pass(self, piece: bytes) -> list[Piece]:
        self._received += len(piece)
        if self._plan.plain_bytes is not None and self._received > self._plan.plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        for digest in self._hashes.values():
            digest.update(piece)
        self._proved(lambda opener: opener.update(piece))
        self._meter(len(piece))
        return [piece]

    def _proved(self, step: Callable[[Opener], object]) -> None:
        if self._opener is None:
            raise RefusedError(refusals.INTERNAL)
        try:
            if self.key is not None:
                self.key.check()
            step(self._opener)
        except SealgateError as error:
            raise RefusedError(_refusal_for(error)) from error

    @override
    def finish(self) -> list[Piece]:
        rest: list[Piece] = []
        if self._decoder is not None and (last := self._decoder.finish()):
            rest = self._take(last)
        if self._begin:
            rest += self._sealing.feed(self._begin)
        if self._opener is None:
            return rest + self._sealing.finish()
        if self._plan.plain_bytes is not None and self._received != self._plan.plain_bytes:
            raise RefusedError(refusals.BAD_LENGTH)
        for digest, made in self._hashes.items():
            if not hmac.compare_digest(made.digest(), digest.value):
                raise RefusedError(refusals.BAD_DIGEST)
        self._proved(lambda opener: opener.finalize())
        return rest


def _refusal_for(error: SealgateError) -> Refusal:
    """Whose object it is, and which check failed, is told to nobody here either."""
    if isinstance(error, KeyUnavailableError) and error.reason is not Unavailable.UNKNOWN:
        return refusal_for(error)
    told = refusal_for(error)
    is_about_it = told in (refusals.OBJECT_INVALID, refusals.KEY_UNKNOWN)
    return refusals.SEALED_UPLOAD if is_about_it else told
