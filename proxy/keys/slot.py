"""What is known of one network service's keys: all that were pushed, and what became of them.

1. One key id never has two materials, nor one version of a service's keys two key ids: the encryption service
   finds keys by version, so it must find the same one as before. What would break that is refused before
   anything has changed.
2. Keys that were withdrawn after they were issued, or are past their end, are refused likewise.
3. Everything a stranger can make grow is bounded: key ids nobody knows, tombstones, keys per service.
4. What is told of it is a value of this moment, with countdowns, and holds no secret.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from cachetools import LRUCache, TTLCache

from envelope.errors import EnvelopeError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from envelope.material import Operation
from proxy.keys.data_key import DataKey

MAX_KEYS_PER_SERVICE: Final = 1024
"""An envelope of 64 KiB holds about 250 keys; `add` may collect a few of them."""
MAX_TOMBSTONES: Final = 1024
MAX_MISSES: Final = 256
MISS_TTL_S: Final = 60.0

STOPPING_STATES: Final = {
    KeyState.SUSPENDED: Unavailable.SUSPENDED,
    KeyState.COMPROMISED: Unavailable.COMPROMISED,
    KeyState.DESTROYED: Unavailable.DESTROYED,
}
"""A key that came in one of these is here without its material."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionHolding:
    """One version of a service's keys: the key if it can be used, else why not."""

    version: int
    key_id: KeyId
    use: KeyUse
    seen_at_s: int
    """Unix time at which it came here first."""
    key: DataKey | None
    reason: Unavailable | None
    """None exactly if `key` is there."""


@dataclass(frozen=True, slots=True)
class Word:
    """What the agent last said of a service as a whole: by a `set`, which states all of its keys."""

    withdrawn: bool
    valid_for_s: float
    """Seconds for which its last `set` still counts; 0 if it has run out, or none came."""
    was_given: bool
    """Whether any `set` came since this process began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHolding:
    """One key that can be used now, or the state that forbids it."""

    key_id: KeyId
    state: KeyState
    valid_for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """What the cache holds for one network service: for the session answer, readiness and `/metrics`.

    `missed` are key ids that were asked for within the last minute and are not here, at most MAX_MISSES.
    """

    owner: NetworkService
    can_seal: bool
    reason: Unavailable | None
    holds: tuple[KeyHolding, ...]
    missed: tuple[KeyId, ...]

    @property
    def valid_for_s(self) -> float:
        """The countdown: seconds until the service is blind, if nobody renews."""
        return max((holding.valid_for_s for holding in self.holds), default=0.0)

    @classmethod
    def of_nothing(cls, owner: NetworkService) -> Self:
        """As long as nothing was pushed."""
        return cls(owner=owner, can_seal=False, reason=Unavailable.UNKNOWN, holds=(), missed=())


@dataclass(frozen=True, slots=True)
class Version:
    key_id: KeyId
    seen_at_s: int


class Slot:
    """All that is known of one provisioned network service. Only `KeyCache` changes it."""

    __slots__ = (
        "active",
        "keys",
        "misses",
        "no_active",
        "owner",
        "pushed",
        "signing",
        "tombstones",
        "versions",
        "withdrawn",
        "withdrawn_sequence",
        "word_deadline_boot_s",
    )

    def __init__(self, owner: NetworkService, boot_s: Callable[[], float]) -> None:
        self.owner: Final = owner
        self.keys: dict[KeyId, DataKey] = {}
        self.active: DataKey | None = None
        self.signing: DataKey | None = None
        self.versions: dict[tuple[KeyUse, int], Version] = {}
        self.word_deadline_boot_s = -math.inf
        self.no_active = Unavailable.UNKNOWN  # why, while `active` is None
        self.withdrawn = False
        self.withdrawn_sequence = -1
        self.tombstones: LRUCache[KeyId, Unavailable] = LRUCache(maxsize=MAX_TOMBSTONES)
        self.misses: TTLCache[KeyId, None] = TTLCache(maxsize=MAX_MISSES, ttl=MISS_TTL_S, timer=boot_s)
        self.pushed = asyncio.Event()

    def wake(self) -> None:
        self.pushed.set()
        self.pushed = asyncio.Event()

    def let_go(self, key: DataKey, reason: Unavailable) -> None:
        """Nothing is sealed or signed with *key* any more."""
        if self.active is key:
            self.active, self.no_active = None, reason
        if self.signing is key:
            self.signing, self.no_active = None, reason

    @property
    def reason(self) -> Unavailable:
        """Why, while there is no key to seal or sign with."""
        return Unavailable.WITHDRAWN if self.withdrawn else self.no_active

    def refuse_unless_free(self, materials: Sequence[KeyMaterial], operation: Operation) -> None:
        """EnvelopeError "key-conflict", "too-many" or "owner" if *materials* cannot be here as they are."""
        owner, held = self.owner, self.keys
        named = {material.key_id for material in materials}
        if len(named) != len(materials):
            raise EnvelopeError("key-conflict", f"{owner}: a key id stands twice in one envelope")
        if len(named | (held.keys() if operation is Operation.ADD else set())) > MAX_KEYS_PER_SERVICE:
            raise EnvelopeError("too-many", f"{owner} would hold more than {MAX_KEYS_PER_SERVICE} keys")
        for material in materials:
            if material.owner != owner:
                raise EnvelopeError(
                    "owner", f"key {material.key_id} belongs to {material.owner}, not {owner}"
                )
            key = held.get(material.key_id)
            if key is not None and material.state not in STOPPING_STATES and not key.holds(material.secret):
                raise EnvelopeError(
                    "key-conflict", f"key {material.key_id} came with other material than before"
                )
        self._refuse_unless_numbered(materials)

    def _refuse_unless_numbered(self, materials: Sequence[KeyMaterial]) -> None:
        """Rule 1. What is withdrawn or expired holds its number no longer: the agent may have begun anew."""
        taken = {
            number: version.key_id
            for number, version in self.versions.items()
            if version.key_id in self.keys or self.tombstones.get(version.key_id) in STOPPING_STATES.values()
        }
        numbers = {key_id: number for number, key_id in taken.items()}
        for material in materials:
            number = (material.use, material.version)
            if taken.setdefault(number, material.key_id) != material.key_id:
                raise EnvelopeError(
                    "key-conflict",
                    f"{self.owner}: version {material.version} came with another key id than before",
                )
            if numbers.setdefault(material.key_id, number) != number:
                raise EnvelopeError(
                    "key-conflict", f"key {material.key_id} came with another version than before"
                )

    def refuse_unless_timely(
        self, deadline_boot_s: float, sequence: int | None, *, now_boot_s: float
    ) -> None:
        """EnvelopeError "sequence" or "time" for keys that were withdrawn since, or are past their end."""
        if sequence is not None and sequence <= self.withdrawn_sequence:
            raise EnvelopeError("sequence", f"{self.owner} was withdrawn after this envelope was issued")
        if deadline_boot_s <= now_boot_s:
            raise EnvelopeError("time", f"the keys of {self.owner} are past their end")

    def status(self) -> ServiceStatus:
        """What is held now."""
        holds = [
            KeyHolding(key_id=key.key_id, state=key.state, valid_for_s=key.valid_for_s)
            for key in self.keys.values()
        ]
        can_seal = self.active is not None or self.signing is not None
        return ServiceStatus(
            owner=self.owner,
            can_seal=can_seal,
            reason=None if can_seal else self.reason,
            holds=tuple(holds),
            missed=tuple(self.misses),
        )

    def versions_of(self, use: KeyUse) -> list[VersionHolding]:
        """Every version that is here or was ended, ascending."""
        return [
            VersionHolding(
                version=number,
                key_id=version.key_id,
                use=use,
                seen_at_s=version.seen_at_s,
                key=(key := self.keys.get(version.key_id)),
                reason=None if key else self.tombstones.get(version.key_id, Unavailable.UNKNOWN),
            )
            for (version_use, number), version in sorted(self.versions.items())
            if version_use is use
        ]

    def word(self, *, now_boot_s: float) -> Word:
        """What the agent last said of all of them, and for how long that counts."""
        left_s = max(0.0, self.word_deadline_boot_s - now_boot_s)
        given = self.withdrawn or self.word_deadline_boot_s > -math.inf
        return Word(self.withdrawn, 0.0 if self.withdrawn else left_s, given)
