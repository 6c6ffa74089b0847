"""How much a tenant and a credential may ask for, decided before any work is done.

1. Two token buckets per call, the tenant's and the credential's: both must have room, or neither is
   touched. A batch costs as many as it has items, and at most a bucket's size, so that a full bucket always
   admits it.
2. Work that waits or streams holds a place besides; places are counted per tenant.
3. The process's time is shared. Each call's time is charged to its tenant (`charge`). While the process has
   more than BUSY of its time taken, a tenant who has had more than its part of it waits: its part is what
   its weight is of the weights of all who called within the window. Alone, a tenant may have everything.
   How much is taken the charges say, or the kernel (`strained`): where others use the machine as well, the
   process may be at its end with little.
4. Memory is bounded by the tenants and credentials of the directory: a caller is known before it is
   counted.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from proxy.encryption_service.errors import QuotaExceeded
from runtime.clock import Clock

BUSY: Final = 0.7
"""Of the process's time; beyond it queues grow faster than they empty."""
WINDOW_S: Final = 0.5
"""What lies further back counts for less than 1/e."""
OVERHEAD_S: Final = 60e-6
"""Of a call's time that its dialect does not see: HTTP on both sides."""
MAX_CHARGE_S: Final = 0.25
"""Of one call: one that waited for somebody else did not compute all the while."""
JUDGED_EVERY_S: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """`requests_per_s` in the long run, `burst` at once."""

    requests_per_s: float
    burst: float

    def share(self, processes: int) -> "Quota":
        """The part of one of *processes* that serve the same tenants."""
        return Quota(requests_per_s=self.requests_per_s / processes, burst=max(1.0, self.burst / processes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of every tenant, and of every credential that has no limit of its own."""

    tenant: Quota = Quota(requests_per_s=10_000, burst=20_000)
    credential: Quota = Quota(requests_per_s=5_000, burst=10_000)
    places: int = 256
    """Calls of one tenant that wait or stream at the same time."""


class _Bucket:
    __slots__ = ("_at_s", "_level", "_quota")

    def __init__(self, quota: Quota, now_s: float) -> None:
        self._quota = quota
        self._level = quota.burst
        self._at_s = now_s

    def fill(self, now_s: float) -> None:
        if now_s > self._at_s:
            gained = (now_s - self._at_s) * self._quota.requests_per_s
            self._level = min(self._quota.burst, self._level + gained)
            self._at_s = now_s

    def wait_s(self, cost: float) -> float:
        """Seconds until *cost* fits; 0 if it does."""
        missing = min(cost, self._quota.burst) - self._level
        return max(0.0, missing / self._quota.requests_per_s)

    def take(self, cost: float) -> None:
        self._level -= cost


class _Share:
    """How much of the process's time a tenant has had lately."""

    __slots__ = ("at_s", "places", "used_s")

    def __init__(self, now_s: float) -> None:
        self.used_s = 0.0
        self.at_s = now_s
        self.places = 0

    def used(self, now_s: float) -> float:
        if now_s > self.at_s:
            self.used_s *= math.exp((self.at_s - now_s) / WINDOW_S)
            self.at_s = now_s
        return self.used_s


class Limiter:
    """One per process; holds the process's share of every quota."""

    def __init__(
        self,
        clock: Clock,
        limits: Limits | None = None,
        *,
        processes: int = 1,
        credential_rate: Callable[[str], float | None] = lambda _credential_id: None,
        weight: Callable[[str], float] = lambda _tenant: 1.0,
    ) -> None:
        """*processes*: how many share the tenants' calls. *credential_rate*: of one, requests/s or None."""
        limits = limits or Limits()
        self._clock = clock
        self._tenant_quota = limits.tenant.share(processes)
        self._credential_quota = limits.credential.share(processes)
        self._max_places = max(1, limits.places // processes)
        self._processes = processes
        self._credential_rate = credential_rate
        self._weight = weight
        self._tenants: dict[str, _Bucket] = {}
        self._credentials: dict[str, _Bucket] = {}
        self._shares: dict[str, _Share] = {}
        self._strain = 0.0
        self._judged_at_s = -math.inf
        self._part_s: float | None = None

    def admit(self, tenant: str, credential_id: str | None, cost: int = 1) -> None:
        """Take *cost* (items of a batch) from both buckets. QuotaExceeded, and then nothing is taken."""
        now_s = self._clock.boot_s()
        buckets = [self._tenant_bucket(tenant, now_s)]
        if credential_id is not None:
            buckets.append(self._credential_bucket(credential_id, now_s))
        for bucket in buckets:
            bucket.fill(now_s)
        wait_s = max(bucket.wait_s(cost) for bucket in buckets)
        if wait_s > 0:
            self.charge(tenant, 0.0)
            raise QuotaExceeded("more calls than agreed", retry_after_s=wait_s)
        self._check_share(tenant, now_s)
        for bucket in buckets:
            bucket.take(cost)

    @contextmanager
    def hold(self, tenant: str, credential_id: str | None, cost: int = 1) -> Iterator[None]:
        """As `admit`, and a place until the block is left: for calls that await or stream. QuotaExceeded, and
        then nothing is taken.
        """
        share = self._share(tenant, self._clock.boot_s())
        if share.places >= self._max_places:
            self.charge(tenant, 0.0)
            raise QuotaExceeded("more calls at the same time than agreed", retry_after_s=1.0)
        self.admit(tenant, credential_id, cost)
        share.places += 1
        try:
            yield
        finally:
            share.places -= 1

    def charge(self, tenant: str, used_s: float) -> None:
        """*tenant*'s call has taken *used_s* of the process's time, HTTP not counted."""
        now_s = self._clock.boot_s()
        share = self._share(tenant, now_s)
        share.used(now_s)
        share.used_s += min(max(used_s, 0.0), MAX_CHARGE_S) + OVERHEAD_S

    def strained(self, part: float) -> None:
        """The kernel says that the process wanted to run for this part of the time lately (pressure.py)."""
        self._strain = part

    def busy(self) -> float:
        """Which part of the process's time all tenants together take."""
        now_s = self._clock.boot_s()
        charged = sum(share.used(now_s) for share in self._shares.values()) / WINDOW_S
        return max(charged, self._strain)

    def _check_share(self, tenant: str, now_s: float) -> None:
        """Rule 3."""
        if now_s >= self._judged_at_s + JUDGED_EVERY_S:
            self._judge(now_s)
        if self._part_s is None or self._share(tenant, now_s).used(now_s) <= max(
            OVERHEAD_S, self._part_s * self._weight(tenant)
        ):
            return
        self.charge(tenant, 0.0)
        raise QuotaExceeded("others wait for their part of the service", retry_after_s=WINDOW_S)

    def _judge(self, now_s: float) -> None:
        """Whether time is short, and then how much of it a tenant of weight 1 may have had.

        Not at every call: it looks at every tenant that has called lately.
        """
        self._judged_at_s = now_s
        self._part_s = None
        used = {name: share.used(now_s) for name, share in self._shares.items()}
        total_s = sum(used.values())
        if max(total_s / WINDOW_S, self._strain) <= BUSY:
            return
        weights = [self._weight(name) for name, spent_s in used.items() if spent_s > OVERHEAD_S / math.e]
        if len(weights) > 1:
            self._part_s = min(BUSY * WINDOW_S, total_s) / sum(weights)

    def _tenant_bucket(self, tenant: str, now_s: float) -> _Bucket:
        bucket = self._tenants.get(tenant)
        if bucket is None:
            bucket = self._tenants[tenant] = _Bucket(self._tenant_quota, now_s)
        return bucket

    def _credential_bucket(self, credential_id: str, now_s: float) -> _Bucket:
        bucket = self._credentials.get(credential_id)
        if bucket is None:
            rate = self._credential_rate(credential_id)
            quota = self._credential_quota
            if rate is not None:
                quota = Quota(requests_per_s=rate, burst=max(1.0, 2 * rate)).share(self._processes)
            bucket = self._credentials[credential_id] = _Bucket(quota, now_s)
        return bucket

    def _share(self, tenant: str, now_s: float) -> _Share:
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = _Share(now_s)
        return share

    def forget(self, tenants: set[str], credential_ids: set[str]) -> None:
        """The directory has changed: keep what is known of these alone (rule 4)."""
        self._tenants = {name: bucket for name, bucket in self._tenants.items() if name in tenants}
        self._shares = {name: share for name, share in self._shares.items() if name in tenants}
        self._credentials = {
            name: bucket for name, bucket in self._credentials.items() if name in credential_ids
        }
