"""Bodies that are on their way: how much of them one listener keeps, and for whom.

1. Whose a body is is asked when a part of it has to be waited for, and told by the head. Who is nobody's
   caller is answered by the head alone: nothing of his body is kept, and no `100 Continue` is sent.
2. Where the head does not tell (the proof is in the body, or goes over it), the body is a stranger's: small,
   by its dialect's limit, and strangers together keep MAX_STRANGERS_BYTES, whatever known callers keep.
3. A tenant keeps MAX_TENANT_BYTES, so that it does not take the place of the others.
"""

from collections import Counter
from typing import Final

MAX_BYTES: Final = 256 << 20
MAX_TENANT_BYTES: Final = 128 << 20
MAX_STRANGERS_BYTES: Final = 32 << 20
"""256 bodies of the longest kind (XKS, 128 KiB), none of which came at once."""

STRANGER: Final = ""
"""In place of a tenant."""


class KeptBodies:
    """The account of one listener."""

    def __init__(
        self,
        *,
        max_bytes: int = MAX_BYTES,
        max_tenant_bytes: int = MAX_TENANT_BYTES,
        max_strangers_bytes: int = MAX_STRANGERS_BYTES,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_tenant_bytes = max_tenant_bytes
        self._max_strangers_bytes = max_strangers_bytes
        self._of: Counter[str] = Counter()
        self._known_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self._known_bytes + self._of[STRANGER]

    def add(self, holder: str, count: int) -> bool:
        """Count *count* more bytes (fewer, if negative) for *holder*. False: that is too much."""
        self._of[holder] += count
        mine = self._of[holder]
        if not mine:
            del self._of[holder]
        if holder == STRANGER:
            return mine <= self._max_strangers_bytes
        self._known_bytes += count
        return mine <= self._max_tenant_bytes and self._known_bytes <= self._max_bytes
