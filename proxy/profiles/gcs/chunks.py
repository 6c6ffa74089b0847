"""A chunk of a resumable upload on its way into the spool, where it waits until it is whole."""

import hashlib
import hmac
from collections.abc import Iterable

from envelope.objects import Sealer
from proxy import refusals
from proxy.messages.message import ExpectedDigest
from proxy.refusals import RefusedError


class Chunk:
    """What a request brings, but for its content."""

    def __init__(self, digests: Iterable[ExpectedDigest]) -> None:
        self.plain_bytes = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._digests = [(hashlib.new(one.algorithm, usedforsecurity=False), one.value) for one in digests]

    def pass_through(self, piece: bytes) -> None:
        self.plain_bytes += len(piece)
        self._md5.update(piece)
        for computed, _ in self._digests:
            computed.update(piece)

    @property
    def md5(self) -> bytes:
        return self._md5.digest()

    def check(self) -> None:
        """RefusedError(BAD_DIGEST)."""
        for computed, said in self._digests:
            if not hmac.compare_digest(computed.digest(), said):
                raise RefusedError(refusals.BAD_DIGEST)


class SealedChunk:
    """A `plan.Reshaper`: a chunk on its way into the spool, a message that goes nowhere else."""

    out_bytes: int | None = None

    def __init__(self, chunk: Chunk, sealer: Sealer) -> None:
        self._chunk = chunk
        self._sealer = sealer

    def feed(self, piece: bytes) -> bytes:
        self._chunk.pass_through(piece)
        return bytes(self._sealer.update(piece))

    def finish(self) -> bytes:
        self._chunk.check()
        return self._sealer.finalize()
