"""An upload on its way into a spool: sealed piece by piece, and held for the handler of its conversation.

1. The gate collects into it, within the plan's limit; nothing but ciphertext reaches the spool.
2. Its checks are those of a body that streams: key, lengths, digests, decoder. What fails leaves no spool.
"""

from collections.abc import AsyncIterator
from typing import override

from proxy.bodies.bodies import ReshapeBody, SealBody
from proxy.bodies.spool import Spool
from proxy.gate.permit import Collect
from proxy.plans.conversing import Sealed


class SpoolingBody(Collect):
    """Collects an upload through *body* into *spool*, which it closes when the message is given up."""

    def __init__(self, limit_bytes: int, body: SealBody | ReshapeBody, spool: Spool) -> None:
        super().__init__(limit_bytes)
        self._made = body
        self._spool = spool

    @override
    def _take(self, piece: bytes) -> None:
        for made in self._made(piece):
            self._spool.write(made)

    @override
    def body(self) -> bytes:
        """Nothing of it is here."""
        return b""

    @override
    def discard(self) -> None:
        self._spool.close()

    def finish(self) -> "HeldUpload":
        """The body has ended properly. RefusedError if it is not what was said."""
        for made in self._made(b""):
            self._spool.write(made)
        return HeldUpload(self._spool, self._made.sealed if isinstance(self._made, SealBody) else None)


class HeldUpload:
    """What `Conversation.spooled` is."""

    def __init__(self, spool: Spool, sealed: Sealed | None) -> None:
        self._spool = spool
        self._sealed = sealed

    @property
    def stored_bytes(self) -> int:
        return self._spool.size_bytes

    @property
    def sealed(self) -> Sealed | None:
        return self._sealed

    def read(self, start: int, stop: int) -> bytes:
        return self._spool.read(start, stop)

    def pieces(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        return self._spool.pieces(start, stop)

    def close(self) -> None:
        self._spool.close()
