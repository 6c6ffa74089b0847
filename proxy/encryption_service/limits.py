"""How much a tenant and a credential may ask for, decided before any work is done.

1. Two token buckets per call, the tenant's and the credential's; both must have room.
2. Work that waits or streams holds a place as well; places are counted per tenant.
3. When the process is short of time, every tenant keeps its fair share of it.
"""

from contextlib import AbstractContextManager

from runtime.clock import Clock


class Limiter:
    """One per process; holds the process's share of every quota."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def admit(self, tenant: str, credential_id: str | None, cost: int = 1) -> None:
        """Take *cost* (items of a batch) from both buckets. QuotaExceeded, and then nothing is taken."""
        raise NotImplementedError

    def hold(self, tenant: str, credential_id: str | None, cost: int = 1) -> AbstractContextManager[None]:
        """As `admit`, and a place until the block is left: for calls that await or stream. QuotaExceeded."""
        raise NotImplementedError
