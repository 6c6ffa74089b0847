"""Room that all tenants of a process share: so much in all, and of that no more than a part for each.

1. What is taken is given back, by the same tenant, however its use ends.
2. The refusal says which it is: the room is full, or this tenant's part of it. Both mean: come again.
"""

from collections import Counter
from typing import Final

from proxy.refusals import Refusal, RefusedError

DEFAULT_SHARE: Final = 0.5


class Shares:
    """*share*: the part of *limit_bytes* that one tenant may hold, above 0 and up to 1."""

    def __init__(self, *, limit_bytes: int, share: float, full: Refusal, share_full: Refusal) -> None:
        self._limit_bytes = limit_bytes
        self._tenant_bytes = int(limit_bytes * share)
        self._full = full
        self._share_full = share_full
        self._of: Counter[str] = Counter()
        self.held_bytes = 0

    def take(self, tenant: str, size_bytes: int) -> None:
        """RefusedError if there is no room (rule 2); then nothing is taken."""
        if self.held_bytes + size_bytes > self._limit_bytes:
            raise RefusedError(self._full)
        if self._of[tenant] + size_bytes > self._tenant_bytes:
            raise RefusedError(self._share_full)
        self.held_bytes += size_bytes
        self._of[tenant] += size_bytes

    def give_back(self, tenant: str, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self._of[tenant] -= size_bytes
        if not self._of[tenant]:
            del self._of[tenant]
