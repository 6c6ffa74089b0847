"""What the registry's rows mean, as frozen values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.registry.states import KekState, RotationPhase
from key_agent.sources.source import Kek, KekReference, WrappedKey

RECEIPT_SLACK_MS: Final = 40_000
"""By how much a proxy's deadline may be after `exp`: its clock is at most 30 s behind ours, or it refuses."""
UNSERVED_MS: Final = 15_000
"""How long a new key waits for late proxies if nothing seals meanwhile: longer than one request to one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KekRow:
    reference: KekReference
    version: int
    kek: Kek | None
    """None while the KEK is named but not yet made (`pre-active`)."""
    state: KekState
    reason: str | None
    since_ms: int
    rotated_to: str | None = None
    """The KEK that its keys moved to while it worked; until it is retired, that is not finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    id: str
    url: str
    """https://host:port of its push listener."""
    ca_pem: str = field(repr=False)
    """Who vouches for its server certificate."""
    removed: bool = False
    """No keys go there any more; withdrawals may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network service at one proxy: who opens its envelopes there, what became of the last ones."""

    owner: NetworkService
    proxy_id: str
    certificate_pem: str = field(repr=False)
    """The service's certificate at that proxy, intermediates after it."""
    withdrawn: bool = False
    issued_sequence: int = 0
    issued_until_ms: int = 0
    accepted_sequence: int = 0
    accepted_at_ms: int | None = None
    valid_until_ms: int | None = None
    withdrawn_sequence: int = 0
    withdrawn_at_ms: int | None = None
    error: str | None = None
    error_at_ms: int | None = None
    issued_until_boot_s: float = -math.inf
    """The same on this machine's boot clock, for what this process has issued; not stored."""

    def may_hold_keys(self, now_ms: int, boot_s: float) -> bool:
        """Keys may be valid there: issued, not withdrawn with a receipt since, and time is not up.

        Up by both clocks: a proxy counts on its boot clock, which does not jump with our wall clock.
        """
        is_over = now_ms >= self.silent_at_ms and boot_s >= self.issued_until_boot_s
        return self.issued_sequence > self.withdrawn_sequence and not is_over

    @property
    def withdrawal_is_newest(self) -> bool:
        """The proxy confirmed a withdrawal after it last acknowledged keys."""
        return self.withdrawn_sequence > self.accepted_sequence

    @property
    def silent_at_ms(self) -> int:
        """From then on nothing that was ever issued to it is valid, whoever can reach it or not."""
        return self.issued_until_ms + RECEIPT_SLACK_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKeyRow:
    """One data key without its wraps."""

    owner: NetworkService
    key_id: KeyId
    version: int
    state: KeyState
    kcv: bytes
    created_at_ms: int
    wrapped_by: tuple[str, ...]
    """Ids of the KEKs that hold a wrap of it that the HSM has opened."""
    waits_for: tuple[str, ...] = ()
    """The same, of wraps from a backup that it has not opened yet."""
    use: KeyUse = KeyUse.DATA
    algorithm: str | None = None
    since_ms: int = 0
    activated_at_ms: int | None = None
    suspended_from: KeyState | None = None
    reason: str | None = None
    after_sequence: int = 0
    """An envelope with a higher sequence carries this key."""


class RotationCause(StrEnum):
    COMMAND = "command"
    SCHEDULE = "schedule"
    LOST = "lost"
    """The service had no key that opens any more: a new KEK, or a damaged registry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a new key waits for proxies that have not acknowledged it."""

    usual_ms: int
    """Another key seals meanwhile."""
    unserved_ms: int = UNSERVED_MS
    """Nothing seals meanwhile."""


AT_ONCE: Final = Patience(usual_ms=0, unserved_ms=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """One key taking over from another, in two phases."""

    id: str
    owner: NetworkService
    use: KeyUse
    new_key: KeyId
    old_key: KeyId | None
    phase: RotationPhase
    cause: RotationCause
    after_sequence: int
    """A proxy that acknowledged a higher sequence has what this phase is about."""
    begun_at_ms: int
    since_ms: int
    until_ms: int
    """This phase then ends without the proxies that are late."""
    late: tuple[str, ...]
    """Proxies that had not acknowledged when the first phase ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRing:
    """A ring of keys whose active key is older than its service wants."""

    owner: NetworkService
    use: KeyUse
    algorithm: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A committed licence to send one service's keys to some proxies: its sequence is spent, sent or not."""

    owner: NetworkService
    sequence: int
    keys: tuple[tuple[WrappedKey, KeyState], ...]
    damaged: tuple[KeyId, ...]
    """Wrapped keys whose checksum does not fit: left out, alarm."""
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKey:
    """A key of one service with a wrap here, as it stands in the registry."""

    key_id: str
    """In hex."""
    ring: str
    owner_environment: str
    state: KeyState


type Presenter = Callable[[str, Sequence[HeldKey]], Mapping[str, KeyState]]
"""Which state each key of a service is pushed in, by key id; none is more than the key's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A proxy's answer about one service's envelope, as the registry keeps it."""

    owner: NetworkService
    proxy_id: str
    sequence: int
    accepted: bool
    keys: int
    """How many it then held; 0 confirms a withdrawal."""
    at_ms: int
    valid_until_ms: int | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """All that is needed to reach the proxies: one consistent reading of the registry."""

    kek: KekRow | None
    """The current one: the newest that is neither unfinished nor replaced."""
    services: tuple[NetworkService, ...]
    """Those not removed."""
    proxies: Mapping[str, Proxy]
    """Removed ones too, as long as a link needs them."""
    links: tuple[Link, ...]
    sequences: Mapping[NetworkService, int]
