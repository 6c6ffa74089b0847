"""What a breach of each kind exposes, what follows by itself, and the life of an incident: rules only.

1. "The environment is breached" and "this key is compromised" are two facts. A kind says for both what
   happens at once; whatever goes further is decided by two persons (approvals.py).
2. What happens at once only restricts: it needs nobody's consent but that of whoever opens the incident, and
   an environment that cannot be reached does not hold it up.
3. The scope is exact: for every key of the tenant it is known whether the incident concerns it, and how. A
   key that has ended is never touched again.
4. A suspended key can come back, a compromised one never does.
5. An incident's states are a table. A step that is repeated is no step: each can be, after a crash.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from envelope.errors import MisuseError
from envelope.keys import KeyState


class IncidentKind(StrEnum):
    SUSPECTED = "suspected"
    """Nobody knows what was exposed."""
    DEK = "dek"
    """Single keys, named when it is opened; the environment is sound."""
    RUNTIME = "runtime"
    """The memory of the environment's proxies or of its agent."""
    KEK = "kek"
    """The environment's KEK: with a copy of its database, every key."""
    DB = "db"
    """The environment's database: wrapped keys, which the KEK still protects."""
    SERVICE_CERT = "service_cert"
    """The private key of one network service's certificate, and so the keys pushed to it there."""

    @property
    def heals(self) -> bool:
        """Whether the environment stops serving until it has healed."""
        return self in (IncidentKind.SUSPECTED, IncidentKind.RUNTIME, IncidentKind.KEK)

    @property
    def exposes_agent(self) -> bool:
        """Whether somebody else may have the agent's registry key since: it begins no term any more."""
        return self is IncidentKind.RUNTIME

    @property
    def ends_kek(self) -> bool:
        """Whether the environment's KEK is disabled at once, and every wrap under it erased."""
        return self is IncidentKind.KEK

    @property
    def needs_new_kek(self) -> bool:
        """Whether the environment has healed only with a KEK that was made after the incident was opened."""
        return self in (IncidentKind.KEK, IncidentKind.RUNTIME, IncidentKind.DB)


class Disposition(StrEnum):
    """What an incident means for one key."""

    COMPROMISED = "compromised"
    """Disabled in every environment, for good."""
    SUSPENDED = "suspended"
    """Disabled in every environment until the incident is cancelled or escalated."""
    CANCELLED = "cancelled"
    """It was on its way and has sealed nothing: destroyed."""
    KEPT = "kept"
    """Stays as it is, by the wish of whoever opened the incident."""
    REWRAPPED = "rewrapped"
    """Stays as it is; its wrap under the environment's KEK is made anew, under another one."""
    REVIEW = "review"
    """Possibly exposed: stays as it is until two persons decide."""

    @property
    def disables(self) -> bool:
        return self in (Disposition.COMPROMISED, Disposition.SUSPENDED, Disposition.CANCELLED)

    @property
    def state(self) -> KeyState | None:
        """The state that the key gets; None: the one it has."""
        return _STATES.get(self)


_STATES: Final[Mapping[Disposition, KeyState]] = {
    Disposition.COMPROMISED: KeyState.COMPROMISED,
    Disposition.SUSPENDED: KeyState.SUSPENDED,
    Disposition.CANCELLED: KeyState.DESTROYED,
}


class KeyFacts(Protocol):
    """What the scope of an incident depends on, of one key."""

    @property
    def owner_environment(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def state(self) -> KeyState: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What is known when an incident is opened."""

    kind: IncidentKind
    environment: str
    keys: AbstractSet[str] = frozenset()
    """Key ids in hex; kind `dek` alone."""
    service: str | None = None
    """Kind `service_cert` alone."""
    keep_keys: bool = False
    """Kind `suspected` alone: the environment's own keys stay active, in the others (system B, claim 1)."""

    def __post_init__(self) -> None:
        """MisuseError names what does not fit the kind."""
        if bool(self.keys) != (self.kind is IncidentKind.DEK):
            raise MisuseError("keys are named for an incident of kind dek, and for no other")
        if (self.service is not None) != (self.kind is IncidentKind.SERVICE_CERT):
            raise MisuseError("a service is named for an incident of kind service_cert, and for no other")
        if self.keep_keys and self.kind is not IncidentKind.SUSPECTED:
            raise MisuseError("keys can be kept only while nobody knows what was exposed: kind suspected")


_ENDED: Final = (KeyState.COMPROMISED, KeyState.DESTROYED)


def scope(
    declared: Declaration, keys: Mapping[str, KeyFacts], *, exposed: Collection[str]
) -> dict[str, Disposition]:
    """What the incident means for each key that it concerns, by key id.

    *keys* are all keys of the tenant. *exposed* are those that the environment could open: it has a wrap of
    them. MisuseError: a declared key is none of *keys*, or has ended.
    """
    for name in declared.keys:
        if name not in keys:
            raise MisuseError(f"there is no key {name}")
        if keys[name].state in _ENDED:
            raise MisuseError(f"key {name} is {keys[name].state} already")
    within = frozenset(exposed)
    found = {
        name: _disposition(declared, name, key, is_exposed=name in within)
        for name, key in sorted(keys.items())
        if key.state not in _ENDED
    }
    return {name: disposition for name, disposition in found.items() if disposition is not None}


def _disposition(declared: Declaration, name: str, key: KeyFacts, *, is_exposed: bool) -> Disposition | None:
    is_own = key.owner_environment == declared.environment
    match declared.kind:
        case IncidentKind.SUSPECTED:
            return _suspected(key, keep=declared.keep_keys) if is_own else None
        case IncidentKind.DEK:
            return Disposition.COMPROMISED if name in declared.keys else None
        case IncidentKind.RUNTIME:
            if is_own:
                return Disposition.COMPROMISED
            return Disposition.REVIEW if is_exposed else None
        case IncidentKind.KEK:
            return Disposition.REVIEW if is_exposed else None
        case IncidentKind.DB:
            return Disposition.REWRAPPED if is_exposed else None
        case IncidentKind.SERVICE_CERT:
            concerned = key.service == declared.service and (is_own or is_exposed)
            return Disposition.COMPROMISED if concerned else None


def _suspected(key: KeyFacts, *, keep: bool) -> Disposition | None:
    if keep:
        return Disposition.KEPT
    match key.state:
        case KeyState.PRE_ACTIVE:
            return Disposition.CANCELLED
        case KeyState.SUSPENDED:
            return None  # by somebody else, and it stays so whatever becomes of this incident
        case _:
            return Disposition.SUSPENDED


class IncidentState(StrEnum):
    OPEN = "open"
    """In force. Not everybody is known to have heard of it."""
    CONTAINED = "contained"
    """Everybody has acknowledged it, or holds nothing any more."""
    REKEYED = "rekeyed"
    """Every key that was taken away has an active successor."""
    REJOINING = "rejoining"
    """The environment stores its wraps and proves itself."""
    REENCRYPTING = "reencrypting"
    """The environment serves again; what old keys sealed may still be rewritten."""
    CLOSED = "closed"
    FALSE_ALARM = "false_alarm"

    @property
    def is_over(self) -> bool:
        return self in (IncidentState.CLOSED, IncidentState.FALSE_ALARM)


class IncidentEvent(StrEnum):
    ACKNOWLEDGED = "acknowledged"
    COMPROMISED_MORE = "compromised_more"
    """Two persons have decided about further keys: everybody has to hear of it anew."""
    SUCCEEDED = "succeeded"
    """The successors of all keys are active."""
    REJOIN_BEGUN = "rejoin_begun"
    REJOIN_FAILED = "rejoin_failed"
    REJOINED = "rejoined"
    REENCRYPTION_BEGUN = "reencryption_begun"
    CLOSED = "closed"
    CANCELLED = "cancelled"


_S, _E = IncidentState, IncidentEvent
TRANSITIONS: Final[Mapping[IncidentState, Mapping[IncidentEvent, IncidentState]]] = {
    _S.OPEN: {
        _E.ACKNOWLEDGED: _S.CONTAINED,
        _E.COMPROMISED_MORE: _S.OPEN,
        # Healing does not wait for a proxy that nobody can reach: it holds nothing once its keys expire.
        _E.SUCCEEDED: _S.REKEYED,
        _E.CANCELLED: _S.FALSE_ALARM,
    },
    _S.CONTAINED: {
        _E.COMPROMISED_MORE: _S.OPEN,
        _E.SUCCEEDED: _S.REKEYED,
        _E.CANCELLED: _S.FALSE_ALARM,
    },
    _S.REKEYED: {
        _E.COMPROMISED_MORE: _S.OPEN,
        _E.SUCCEEDED: _S.REKEYED,
        _E.REJOIN_BEGUN: _S.REJOINING,
        _E.REENCRYPTION_BEGUN: _S.REENCRYPTING,
        _E.CLOSED: _S.CLOSED,
    },
    _S.REJOINING: {
        _E.COMPROMISED_MORE: _S.OPEN,
        _E.REJOIN_BEGUN: _S.REJOINING,
        _E.REJOIN_FAILED: _S.REKEYED,
        _E.REJOINED: _S.REENCRYPTING,
    },
    _S.REENCRYPTING: {
        _E.COMPROMISED_MORE: _S.OPEN,
        _E.REENCRYPTION_BEGUN: _S.REENCRYPTING,
        _E.CLOSED: _S.CLOSED,
    },
    _S.CLOSED: {},
    _S.FALSE_ALARM: {},
}


def follow(state: IncidentState, event: IncidentEvent) -> IncidentState:
    """The state after *event*. MisuseError if the table knows no such road."""
    if (to := TRANSITIONS[state].get(event)) is None:
        raise MisuseError(f"an incident that is {state} is not {event.replace('_', ' ')}")
    return to
