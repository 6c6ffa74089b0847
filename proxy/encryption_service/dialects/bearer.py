"""What the dialects with bearer tokens have in common: who calls, which keys exist for them, one record each.

1. A credential for some keys learns nothing of the others: not even that they are not there.
2. A call has one record. `Work` gathers what is known of the call while it is served, so that a refusal at
   any point is recorded with all that was known by then.
3. Strangers cannot fill the log: of calls without a known caller some are recorded, and the next one that is
   says how many were not (`Strangers`).
4. Quota is taken when the caller is known, by size, and once more for a batch, before any of it is done.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from envelope.keys import KeyId
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Call
from proxy.encryption_service.core import Core, Ticket
from proxy.encryption_service.errors import (
    AccessDenied,
    KeyNotFound,
    NotAuthenticated,
    NotRecorded,
    ServiceError,
)
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import DialectName, NamedKey, Op, ServiceDirectory
from proxy.encryption_service.recording import Entry, Outcome, error_code
from proxy.encryption_service.strangers import Strangers
from runtime.clock import Clock

BYTES_PER_UNIT: Final = 64 * 1024
"""A body of so many bytes costs one call more (rule 4)."""


class Work:
    """What is known of one call so far (rule 2)."""

    __slots__ = (
        "busy_s",
        "caller",
        "client_request_id",
        "detail",
        "is_recorded",
        "items",
        "key",
        "key_id",
        "named_key",
        "op",
        "operation",
        "reason",
        "resource",
        "started_s",
        "version",
    )

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.operation = "unknown"
        self.caller: Caller | None = None
        self.key = ""
        self.named_key: NamedKey | None = None
        self.op: Op | None = None
        self.version = 0
        self.key_id: KeyId | None = None
        self.items = 1
        self.client_request_id = ""
        self.resource = ""
        self.reason = ""
        self.detail: dict[str, str] = {}
        """What else the record is to say; public."""
        self.is_recorded = False
        self.busy_s: float | None = None
        """Of a call that waits: the time it took of the process. None: all of it since its start."""

    def used(self, version: int, key_id: KeyId | None = None) -> None:
        self.version = version
        self.key_id = key_id


class BearerCalls:
    """The parts of the service, as a dialect with bearer tokens uses them."""

    def __init__(
        self,
        dialect: DialectName,
        *,
        core: Core,
        access: Access,
        limiter: Limiter,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
    ) -> None:
        self.core: Final = core
        self.directory: Final = directory
        self.clock: Final = clock
        self._dialect: Final = dialect
        self._access: Final = access
        self._limiter: Final = limiter
        self._strangers = Strangers(clock)

    def begin(self) -> Work:
        return Work(self.clock.boot_s())

    def authenticate(self, work: Work, token: str, call: Call) -> Caller:
        """NotAuthenticated, QuotaExceeded."""
        caller = self._access.bearer(token, dialect=self._dialect, peer=call.peer)
        work.caller = caller
        self._limiter.admit(caller.tenant, caller.credential_id, 1 + len(call.body) // BYTES_PER_UNIT)
        return caller

    def tenant_of(self, token: str, call: Call) -> str:
        """Whose *token* it is; empty: nobody's. As `authenticate` would find, and nothing else."""
        try:
            return self._access.bearer(token, dialect=self._dialect, peer=call.peer).tenant
        except NotAuthenticated:
            return ""

    def admit_batch(self, work: Work, items: int) -> None:
        """QuotaExceeded. The call itself has paid for one."""
        work.items = items
        caller = work.caller
        if caller is not None and items > 1:
            self._limiter.admit(caller.tenant, caller.credential_id, items - 1)

    def hold(self, caller: Caller) -> AbstractContextManager[None]:
        """A place for a call that streams: `with` it. QuotaExceeded."""
        return self._limiter.hold(caller.tenant, caller.credential_id)

    def admit_more(self, caller: Caller, units: int) -> None:
        """QuotaExceeded. For a body whose length shows while it is read."""
        self._limiter.admit(caller.tenant, caller.credential_id, units)

    def admit(self, work: Work, caller: Caller, name: str, op: Op) -> Ticket:
        """`Core.admit` for the key *name*. AccessDenied also for a key of others that does not exist."""
        work.op = op
        return self.core.admit(caller, self.find(work, caller, name), op)

    def find(self, work: Work, caller: Caller, name: str) -> NamedKey:
        """KeyNotFound; AccessDenied for a name that the credential is not for and no key has."""
        work.key = name
        try:
            found = work.named_key = self.core.states.find(caller.tenant, name)
        except KeyNotFound:
            keys = self._keys_of(caller)
            if keys is not None and name not in keys:
                raise AccessDenied("the credential is not for this key") from None
            raise
        return found

    def visible(self, caller: Caller) -> list[NamedKey]:
        """The named keys of the caller's tenant that the credential is for, by name, destroyed ones not."""
        keys = self._keys_of(caller)
        found = []
        for key in self.directory().keys_of(caller.tenant):
            if keys is not None and key.name not in keys:
                continue
            try:
                found.append(self.core.states.find(caller.tenant, key.name))
            except KeyNotFound:
                continue
        return found

    def reachable(self, caller: Caller) -> list[NamedKey]:
        """As `visible`, destroyed ones too."""
        keys = self._keys_of(caller)
        return [key for key in self.directory().keys_of(caller.tenant) if keys is None or key.name in keys]

    def describable(self, work: Work, caller: Caller, name: str) -> NamedKey:
        """As `find`, for calls that only look: AccessDenied also for an existing key of others."""
        key = self.find(work, caller, name)
        keys = self._keys_of(caller)
        if keys is not None and name not in keys:
            raise AccessDenied("the credential is not for this key")
        return key

    def operations_of(self, caller: Caller) -> frozenset[Op]:
        """What the caller's credential is for; none if it has ended."""
        entry = self.directory().credentials.get(caller.credential_id or "")
        return frozenset() if entry is None else entry.operations

    def finish(self, work: Work, ticket: Ticket) -> None:
        """`Core.finish`: all is asked again, then recorded. What it raises stands in the log already."""
        work.is_recorded = True
        self.core.finish(ticket, self._entry(work))

    def record(self, work: Work) -> None:
        """For calls that use no key. NotRecorded."""
        work.is_recorded = True
        self.core.record(self._entry(work))

    def record_refusal(self, work: Work, error: ServiceError | str) -> None:
        """Once per call, whoever found out first. NotRecorded: then this is what the caller is told."""
        if work.is_recorded:
            return
        work.is_recorded = True
        if work.caller is None:
            work.items = self._strangers.counted()
            if work.items == 0:
                return
        is_ours = isinstance(error, NotRecorded)
        code = error if isinstance(error, str) else error_code(error)
        self.core.record(self._entry(work, Outcome.FAILED if is_ours else Outcome.REFUSED, code))

    def _keys_of(self, caller: Caller) -> frozenset[str] | None:
        entry = self.directory().credentials.get(caller.credential_id or "")
        return frozenset() if entry is None else entry.keys

    def _entry(self, work: Work, outcome: Outcome = Outcome.OK, error: str = "") -> Entry:
        caller = work.caller
        took_s = self.clock.boot_s() - work.started_s if work.busy_s is None else work.busy_s
        return Entry(
            dialect=self._dialect,
            operation=work.operation,
            tenant=caller.tenant if caller else "",
            key=work.key,
            version=work.version,
            key_id=work.key_id,
            caller=caller.name if caller else "",
            credential_id=(caller.credential_id or "") if caller else "",
            request_id=work.client_request_id,
            resource=work.resource,
            reason=work.reason,
            outcome=outcome,
            error=error,
            items=work.items,
            latency_us=int(took_s * 1e6),
            detail=work.detail,
        )
