"""What the data path tells the audit log and the meters.

1. Every use of a key is recorded before a byte it changes moves on; once per key and exchange.
2. What cannot be recorded must not happen: AuditUnavailableError.
3. Never a query, a body, a credential.
"""

from typing import Final

from envelope.keys import KeyId, NetworkService
from proxy.keys.data_key import DataKey
from proxy.metrics import OK, ProxyMetrics, ServiceMeters
from proxy.plans.request import Route
from runtime.audit import AuditLog, AuditUnavailableError

_MAX_PATH: Final = 512


class Recorder:
    """Events of requests of clients."""

    def __init__(self, audit: AuditLog, metrics: ProxyMetrics) -> None:
        self._audit = audit
        self.metrics: Final = metrics
        self.trouble: str | None = None
        """Why the last event could not be written; None if it was."""

    def event(self, action: str, *, outcome: str = OK, **fields: str | int | None) -> None:
        """One event of the data path. AuditUnavailableError: what it stands for must not happen."""
        try:
            self._audit.append(action, outcome=outcome, durable=False, **fields)
        except AuditUnavailableError as error:
            self.trouble = str(error)
            raise
        self.trouble = None


class Trail:
    """What is recorded of one request: of whom, what for, with which keys."""

    def __init__(
        self, recorder: Recorder, route: Route, *, method: str, target: str, client: str, user: str | None
    ) -> None:
        """*user*: as whom the client was identified, if by more than where it came from."""
        self._recorder = recorder
        self._owner = route.service.owner
        self._method = method
        self._target = target
        self._client = client
        self.user: Final = user
        self._used: set[tuple[str, KeyId]] = set()
        self._has_tried = False

    @property
    def owner(self) -> NetworkService:
        return self._owner

    @property
    def meters(self) -> ServiceMeters:
        return self._recorder.metrics.of(self._owner)

    def use(
        self,
        action: str,
        key: DataKey,
        *,
        size_bytes: int | None,
        span: tuple[int, int] | None = None,
        target: str | None = None,
    ) -> None:
        """*size_bytes*: what is declared, of plaintext going up or of the object coming down."""
        if (action, key.key_id) in self._used:
            return
        self._used.add((action, key.key_id))
        self.note(
            action,
            key_id=str(key.key_id),
            target=target,
            size_bytes=size_bytes,
            start=span[0] if span else None,
            stop=span[1] if span else None,
        )

    def tried(self, keys: int) -> None:
        """An object names no key: so many are compared with it, once per exchange."""
        if self._has_tried:
            return
        self._has_tried = True
        self.note("object-search", keys=keys)

    def legacy_passed(self) -> None:
        self.note("object-passed-unsealed")
        self.meters.legacy()

    def passed_as_stored(self) -> None:
        self.note("object-passed-as-stored")
        self.meters.legacy()

    def note(
        self, action: str, *, target: str | None = None, outcome: str = OK, **fields: str | int | None
    ) -> None:
        """Any other event of this request."""
        self._recorder.event(
            action,
            outcome=outcome,
            service=str(self._owner),
            method=self._method[:32],
            path=path_of(target or self._target),
            client=self._client,
            user=self.user,
            **fields,
        )


def path_of(target: str) -> str:
    """Without the query, which may hold credentials."""
    return target.partition("?")[0][:_MAX_PATH]
