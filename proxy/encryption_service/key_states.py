"""How named keys stand: what the versions that are here allow, and what a caller is told if they do not.

1. A version's state decides (docs/encryption-service.md, "States"): active does all, deactivated decrypts and
   verifies. Pre-active does nothing while no version is active; beside an active one it decrypts and
   verifies, because in a rotation another proxy may be ahead of us by one push (docs/format.md 6.2).
2. Keys that were withdrawn are the tenant's last word (Revoked), but for one of several environments: there
   another one is to be asked (Withdrawn).
3. What has run out is Stale: it says nothing of the key, and is to be asked again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NoReturn

from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from proxy.encryption_service.errors import KeyNotFound, KeyRefused, Refusal, Revoked, Stale, Withdrawn
from proxy.encryption_service.model import NamedKey, ServiceDirectory
from proxy.encryption_service.signatures import PublicKey
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey

DEGRADED_BELOW_S: Final = 20.0
"""Keys are good for 330 s and refreshed within 300 s: with less than this left the agent is late."""

# A version that cannot be used because of its own state.
_REFUSALS: Final[Mapping[Unavailable, Refusal]] = {
    Unavailable.UNKNOWN: Refusal.VERSION_UNKNOWN,
    Unavailable.WITHDRAWN: Refusal.VERSION_GONE,  # one of several: the service itself is not withdrawn
    Unavailable.NOT_ACTIVE: Refusal.NOT_ACTIVE,
    Unavailable.SUSPENDED: Refusal.SUSPENDED,
    Unavailable.COMPROMISED: Refusal.COMPROMISED,
    Unavailable.DESTROYED: Refusal.VERSION_GONE,
}
_STATES: Final[Mapping[Unavailable | None, KeyState]] = {
    Unavailable.SUSPENDED: KeyState.SUSPENDED,
    Unavailable.COMPROMISED: KeyState.COMPROMISED,
    Unavailable.DESTROYED: KeyState.DESTROYED,
    Unavailable.WITHDRAWN: KeyState.DESTROYED,
}
_KEY_REFUSALS: Final[Mapping[KeyState, Refusal]] = {
    KeyState.PRE_ACTIVE: Refusal.NOT_ACTIVE,
    KeyState.DEACTIVATED: Refusal.DEACTIVATED,
    KeyState.SUSPENDED: Refusal.SUSPENDED,
    KeyState.COMPROMISED: Refusal.COMPROMISED,
    KeyState.DESTROYED: Refusal.DESTROYED,
}


class Standing(StrEnum):
    """How a tenant, or one key, stands: for health, and for what cannot be served."""

    SERVING = "serving"
    DEGRADED = "degraded"  # the agent is late, the keys are still valid
    STALE = "stale"  # validity over, or nothing pushed since the start: retry
    REVOKED = "revoked"  # withdrawn by the tenant: final


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyVersion:
    """One version of a named key that this process holds or has a tombstone of."""

    version: int
    key_id: KeyId
    state: KeyState
    seen_at_s: int
    """Unix time at which this process first received it."""
    public_key: PublicKey | None = None
    """Of a signing key whose material is here."""


class KeyStates:
    def __init__(
        self,
        keys: KeyCache,
        directory: Callable[[], ServiceDirectory],
        *,
        degraded_below_s: float = DEGRADED_BELOW_S,
        refuses: Callable[[str], bool] | None = None,
        is_one_of_several: Callable[[str], bool] | None = None,
    ) -> None:
        """*refuses*: tenants that nothing is done for at this moment. *is_one_of_several*: tenants that have
        other environments (rule 2)."""
        self._keys = keys
        self._directory = directory
        self._degraded_below_s = degraded_below_s
        self._refuses = refuses
        self._is_one_of_several = is_one_of_several

    def check_served(self, tenant: str) -> None:
        """Withdrawn if nothing is done for *tenant* at this moment."""
        if self._refuses is not None and self._refuses(tenant):
            raise Withdrawn("this environment is withdrawn, or was not told yet that it may serve")

    def standing(self, tenant: str, key: NamedKey | None = None) -> Standing:
        """Of one key, or of the tenant, whom one key's withdrawal or block does not make worse.

        A tenant is revoked when all its keys are, stale when none is served, degraded when one that was
        served is late or stale. A tenant without keys serves.
        """
        if key is not None:
            return self._standing_of(key.owner)[0]
        found = [self._standing_of(key.owner) for key in self._directory().keys_of(tenant)]
        standings = {standing for standing, _heard in found}
        if not found or standings == {Standing.SERVING}:
            return Standing.SERVING
        if standings == {Standing.REVOKED}:
            return Standing.REVOKED
        if not standings & {Standing.SERVING, Standing.DEGRADED}:
            return Standing.STALE
        if Standing.DEGRADED in standings or (Standing.STALE, True) in found:
            return Standing.DEGRADED
        return Standing.SERVING

    def find(self, tenant: str, name: str) -> NamedKey:
        """The named key, blocked or not. KeyNotFound; also if every version of it was destroyed."""
        key = self._directory().key(tenant, name)
        if key is None or self.state_of(key) is KeyState.DESTROYED:
            raise KeyNotFound("there is no such key")
        return key

    def state_of(self, key: NamedKey) -> KeyState | None:
        """The state of the key as a whole: that of its active version, else of its newest that lives.

        DESTROYED if no version lives. None if none was ever pushed here, what was has run out, or all of it
        was withdrawn: that says something of the tenant's will, and nothing of the key.
        """
        try:
            return self._active(key).state
        except KeyUnavailableError:
            pass
        versions = [] if self._keys.word(key.owner).withdrawn else self._versions_of(key)
        living = [state for _version, state in versions if state is not KeyState.DESTROYED]
        if not living:
            return KeyState.DESTROYED if versions else None
        used = [state for state in living if state is not KeyState.PRE_ACTIVE]
        return used[-1] if used else living[-1]

    def versions(self, key: NamedKey) -> list[KeyVersion]:
        """What this process knows of the key's versions, ascending; tombstones included, expired ones not."""
        found = []
        for holding in self._keys.versions(key.owner, key.use):
            state = holding.key.state if holding.key else _STATES.get(holding.reason)
            if state is None:
                continue
            public = None
            if holding.key is not None and key.use is KeyUse.SIGN:
                public = holding.key.signing_key.public_key()
            found.append(
                KeyVersion(
                    version=holding.version,
                    key_id=holding.key_id,
                    state=state,
                    seen_at_s=holding.seen_at_s,
                    public_key=public,
                )
            )
        return found

    def public_keys(self, tenant: str, keys: Iterable[NamedKey]) -> list[tuple[NamedKey, KeyVersion]]:
        """What signatures of *keys*, which are *tenant*'s, may be verified with now, ascending.

        Those of a blocked, withdrawn, suspended, compromised or destroyed key are not among them. Withdrawn,
        Stale if that cannot be said at the moment: who takes an empty answer for "none" forgets sound keys.
        """
        self.check_served(tenant)
        found: list[tuple[NamedKey, KeyVersion]] = []
        for key in keys:
            if key.use is not KeyUse.SIGN or key.blocked or key.owner.tenant != tenant:
                continue
            word = self._keys.word(key.owner)
            if word.withdrawn:
                continue
            if word.valid_for_s <= 0:
                raise Stale("no valid key is here at the moment")
            found += [(key, version) for version in self.versions(key) if version.public_key is not None]
        return found

    def holder_of(self, tenant: str, keys: Sequence[NamedKey], key_id: KeyId) -> NamedKey:
        """The one of *keys*, which are *tenant*'s, that *key_id* is or was a version of.

        KeyRefused (VERSION_UNKNOWN) if it is none's. Withdrawn, Revoked, Stale if that cannot be said now,
        because one that is not here at the moment may have it.
        """
        self.check_served(tenant)
        for key in keys:
            if self._keys.knows(key.owner, key_id):
                return key
        words = [self._keys.word(key.owner) for key in keys]
        if words and all(word.withdrawn for word in words):
            self.refuse_withdrawn(tenant)
        if any(not word.withdrawn and word.valid_for_s <= 0 for word in words):
            raise Stale("no valid key is here at the moment")
        raise KeyRefused(Refusal.VERSION_UNKNOWN, "no key of this id is known here")

    def check_openable(self, key: NamedKey) -> None:
        """Return if some version may decrypt or verify: an active one, or else any that is here."""
        try:
            self._active(key)
        except KeyUnavailableError as error:
            reason = error.reason
        else:
            return
        held = (holding.key for holding in self._keys.versions(key.owner, key.use))
        if not any(found is not None and self.may_open(found, key) for found in held):
            self._refuse_key(key, reason)

    def _active(self, key: NamedKey) -> DataKey:
        if key.use is KeyUse.SIGN:
            return self._keys.signing_key(key.owner)
        return self._keys.sealing_key(key.owner)

    def active(self, key: NamedKey) -> DataKey:
        """The active version. KeyRefused, Revoked, Withdrawn, Stale, KeyNotFound."""
        try:
            return self._active(key)
        except KeyUnavailableError as error:
            self._refuse_key(key, error.reason)

    def version(self, key: NamedKey, version: int) -> DataKey:
        """This version, whatever its state. KeyRefused, Revoked, Withdrawn, Stale."""
        try:
            return self._keys.key_of_version(key.owner, key.use, version)
        except KeyUnavailableError as error:
            self.refuse_version(key, error.reason)

    def of_key_id(self, key: NamedKey, key_id: KeyId) -> DataKey:
        """The version with this key id, whatever its state. Errors as `version`."""
        try:
            return self._keys.opening_key(key.owner, key_id)
        except KeyUnavailableError as error:
            self.refuse_version(key, error.reason)

    def may_open(self, version: DataKey, key: NamedKey) -> bool:
        """Rule 1."""
        if version.state is KeyState.PRE_ACTIVE:
            try:
                self._active(key)
            except KeyUnavailableError:
                return False
            return True
        return version.state in {KeyState.ACTIVE, KeyState.DEACTIVATED}

    def _standing_of(self, owner: NetworkService) -> tuple[Standing, bool]:
        """With whether the agent has said anything of it since the start."""
        word = self._keys.word(owner)
        if word.withdrawn:
            return Standing.REVOKED, True
        if word.valid_for_s <= 0:
            return Standing.STALE, word.was_given
        late = word.valid_for_s < self._degraded_below_s
        return (Standing.DEGRADED if late else Standing.SERVING), True

    def _versions_of(self, key: NamedKey) -> list[tuple[int, KeyState]]:
        return [
            (holding.version, state)
            for holding in self._keys.versions(key.owner, key.use)
            if (state := holding.key.state if holding.key else _STATES.get(holding.reason)) is not None
        ]

    def refuse_withdrawn(self, tenant: str) -> NoReturn:
        """The tenant's last word, or, from one of several environments, this one's alone."""
        if self._is_one_of_several is not None and self._is_one_of_several(tenant):
            raise Withdrawn("the keys were withdrawn from this environment")
        raise Revoked("the keys were withdrawn by their owner")

    def _refuse_key(self, key: NamedKey, reason: Unavailable) -> NoReturn:
        """There is no active version: because of the tenant, of time, or of the key's own state?"""
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self.refuse_withdrawn(key.owner.tenant)
        if word.valid_for_s <= 0 or reason is Unavailable.EXPIRED:
            raise Stale("no valid key is here at the moment")
        state = self.state_of(key)
        refusal = Refusal.NOT_ACTIVE if state is None else _KEY_REFUSALS.get(state, Refusal.NOT_ACTIVE)
        if refusal is Refusal.DESTROYED:
            raise KeyNotFound("there is no such key")
        raise KeyRefused(refusal, f"key {key.name} is {'not active' if state is None else state}")

    def refuse_version(self, key: NamedKey, reason: Unavailable) -> NoReturn:
        """One version is not here: because of the tenant, of time, or of its own state?"""
        word = self._keys.word(key.owner)
        if word.withdrawn:
            self.refuse_withdrawn(key.owner.tenant)
        if word.valid_for_s <= 0 or reason is Unavailable.EXPIRED:
            raise Stale("no valid key is here at the moment")
        raise KeyRefused(_REFUSALS[reason], f"this version of key {key.name} cannot be used: {reason}")

    def refuse_state(self, state: KeyState) -> NoReturn:
        """A version is here, and its state does not allow it."""
        raise KeyRefused(_KEY_REFUSALS[state], f"this version of the key is {state}")
