"""Bodies that are read into memory before it is decided what goes on: bounded one by one, and all together.

1. What has come of a body counts until its message is over, or given up: its pieces, what they are decoded
   to and what goes on in their place are there side by side. So the process may need several times
   `limit_bytes`, for which a body's own limit is small.
2. Who comes too late, or whose tenant's part is used up, is told to come again (shares.py).
"""

from typing import Final, override

from proxy import refusals
from proxy.bodies.shares import DEFAULT_SHARE, Shares
from proxy.gate.permit import Collect
from proxy.refusals import Refusal

LIMIT_BYTES: Final = 256 * 1024 * 1024


class Collecting:
    """All bodies that a process collects at this moment."""

    def __init__(self, *, limit_bytes: int = LIMIT_BYTES, share: float = DEFAULT_SHARE) -> None:
        self._shares = Shares(
            limit_bytes=limit_bytes,
            share=share,
            full=refusals.MEMORY_FULL,
            share_full=refusals.MEMORY_SHARE,
        )

    @property
    def held_bytes(self) -> int:
        return self._shares.held_bytes

    def collect(
        self, tenant: str, limit_bytes: int, *, too_large: Refusal = refusals.TOO_LARGE
    ) -> "CountedBody":
        """Of one message of *tenant*'s; whoever asks lets it go when the message is over."""
        return CountedBody(self._shares, tenant, limit_bytes, too_large)


class CountedBody(Collect):
    """Collects a body into memory, as far as there is room."""

    def __init__(self, shares: Shares, tenant: str, limit_bytes: int, too_large: Refusal) -> None:
        super().__init__(limit_bytes, too_large=too_large)
        self._shares = shares
        self._tenant = tenant
        self._counted_bytes = 0

    def __del__(self) -> None:
        self.let_go()

    @override
    def _take(self, piece: bytes) -> None:
        self._shares.take(self._tenant, len(piece))
        self._counted_bytes += len(piece)
        super()._take(piece)

    @override
    def discard(self) -> None:
        super().discard()
        self.let_go()

    def let_go(self) -> None:
        """The message is over. Again: no harm."""
        count, self._counted_bytes = self._counted_bytes, 0
        if count:
            self._shares.give_back(self._tenant, count)
