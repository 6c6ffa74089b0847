"""Key material until its end (docs/format.md, "Key-material envelope" and "Keys").

1. A deadline is a point on the boot clock. A virtual machine that is paused, or restored from an image, has a
   boot clock that stood still: the time by which the wall clock then jumps ahead is taken off every deadline.
   Whoever set it, and why, cannot be told from here: a key that ends too early comes anew, one that ends too
   late opens what is forbidden. So agents are to be asked for keys whenever the wall clock was set, either
   way (`on_clock_set`).
2. A refresh prolongs the very object that running bodies hold (data_key.py); withdrawal, suspension, expiry
   end it.
3. What has ended is overwritten, at once when it is taken back, and by the sweeper when its time is up.
4. A withdrawal beats every push that was issued before it, whatever the order of arrival and whoever sent it.
5. Installation is all or nothing: what a service's keys may be is judged before anything changes (slot.py).
6. A look-up by a stranger leaves nothing behind; what is known of a service is bounded (slot.py).
7. Nothing here prints a secret.
"""

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, override

from cachetools import TLRUCache

from envelope.errors import EnvelopeError, KeyUnavailableError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyUse, NetworkService
from envelope.material import Operation
from proxy.keys.data_key import DataKey, unavailable
from proxy.keys.slot import STOPPING_STATES, ServiceStatus, Slot, Version, VersionHolding, Word
from runtime.clock import Clock, wall_ahead_s

SWEEP_INTERVAL_S: Final = 1.0
LOST_TIME_S: Final = 1.0
"""The wall clock was set by less: not worth a word yet. Several such count together."""

# Nobody waits for these: the enterprise has spoken.
_FINAL: Final = frozenset(
    {Unavailable.WITHDRAWN, Unavailable.SUSPENDED, Unavailable.COMPROMISED, Unavailable.DESTROYED}
)


class _Deadlines(TLRUCache[tuple[NetworkService, KeyId], DataKey]):
    """cachetools' time-aware cache on the boot clock, telling the owner what falls out."""

    def __init__(self, clock: Clock, expired: Callable[[DataKey], None]) -> None:
        # No bound here: keys are bounded per service, so that no tenant can push another's out.
        super().__init__(
            maxsize=math.inf, ttu=lambda _key, value, _now: value.deadline_boot_s, timer=clock.boot_s
        )
        self._expired = expired

    @override
    def expire(self, time: float | None = None) -> list[tuple[tuple[NetworkService, KeyId], DataKey]]:
        gone = list(super().expire(time))
        for _key, value in gone:
            self._expired(value)
        return gone


class KeyCache:
    """Keys by network service and key id, each until its deadline. One event loop, no threads."""

    def __init__(self, clock: Clock, *, on_clock_set: Callable[[float], None] | None = None) -> None:
        """*on_clock_set*: hears by how many seconds the wall clock was set, negative: back; after keys were
        shortened for it. It must not wait and must not raise."""
        self._clock = clock
        self._on_clock_set = on_clock_set
        self._slots: dict[NetworkService, Slot] = {}
        self._deadlines = _Deadlines(clock, self._on_expired)
        self._ahead_s = wall_ahead_s(self._clock)
        """By how much the wall clock was ahead of the boot clock when it was set last, as far as we saw."""
        self._lost_s = 0.0

    @override
    def __repr__(self) -> str:
        return f"<KeyCache of {len(self._slots)} network services>"

    # Changing.

    def install(
        self,
        owner: NetworkService,
        keys: Iterable[KeyMaterial],
        *,
        deadline_boot_s: float,
        operation: Operation = Operation.SET,
        sequence: int | None = None,
    ) -> None:
        """Install *keys*, taking their secrets over, until *deadline_boot_s*; empty `set` withdraws.

        `set` replaces whatever the service had, `add` leaves it. On EnvelopeError nothing has changed and
        *keys* are wiped: "sequence" if a withdrawal has at least this *sequence*; "time" if the deadline has
        passed; "owner" if a key belongs to someone else; "key-conflict" if a key id would get a second
        material or version, or a version a second key id; "too-many".
        """
        self.take_off_lost_time()  # of the keys that are here, not of those that come
        self.sweep()
        materials = tuple(keys)
        slot = self._slots.get(owner) or Slot(owner, self._clock.boot_s)
        try:
            slot.refuse_unless_free(materials, operation)
            if materials:
                slot.refuse_unless_timely(deadline_boot_s, sequence, now_boot_s=self._clock.boot_s())
        except EnvelopeError:
            for material in materials:
                material.wipe()
            raise
        self._slots[owner] = slot
        if operation is Operation.SET:
            if not materials:
                self._withdraw(slot, sequence)
                return
            named = {material.key_id for material in materials}
            for key in [key for key in slot.keys.values() if key.key_id not in named]:
                self._end(slot, key, Unavailable.WITHDRAWN)
            slot.active = slot.signing = None
            slot.withdrawn = False
            slot.word_deadline_boot_s = deadline_boot_s
            stopping = [STOPPING_STATES.get(material.state) for material in materials]
            slot.no_active = stopping[0] if stopping[0] and all(stopping) else Unavailable.NOT_ACTIVE
        for material in materials:
            self._install_one(slot, material, deadline_boot_s)
        if slot.active is not None and not slot.active.state.may_seal:  # `add` brought its new state
            slot.active, slot.no_active = None, Unavailable.NOT_ACTIVE
        if slot.signing is not None and not slot.signing.state.may_seal:
            slot.signing, slot.no_active = None, Unavailable.NOT_ACTIVE
        slot.versions = {  # as bounded as what it points to
            number: version
            for number, version in slot.versions.items()
            if version.key_id in slot.keys or version.key_id in slot.tombstones
        }
        slot.wake()

    def withdraw(self, owner: NetworkService, *, sequence: int | None = None) -> None:
        """Take back all keys of *owner* now: running bodies stop at their next piece.

        With *sequence*, pushes up to this number stay refused.
        """
        self._withdraw(self._slot(owner), sequence)

    def withdraw_tenant(self, tenant: str) -> None:
        """Take back everything that *tenant* has here, now."""
        for owner in [owner for owner in self._slots if owner.tenant == tenant]:
            self.withdraw(owner)

    def forget(self, owner: NetworkService) -> None:
        """The service is no longer provisioned: withdraw its keys and drop what was known of it."""
        slot = self._slots.get(owner)
        if slot is not None:
            self._withdraw(slot, None)
            del self._slots[owner]

    def sweep(self) -> None:
        """Overwrite what has expired."""
        self._deadlines.expire()

    @property
    def lost_s(self) -> float:
        """All the time that was taken off so far: a deadline that was set before and has no key here yet is
        to be shortened by what came to it since."""
        return self._lost_s

    def take_off_lost_time(self) -> None:
        """Shorten every key by the time that the wall clock has seen and the boot clock has not."""
        ahead_s = wall_ahead_s(self._clock)
        lost_s = ahead_s - self._ahead_s
        if abs(lost_s) < LOST_TIME_S:
            return
        # Set back, it is believed too: else nobody would see the time that is lost after that.
        self._ahead_s = ahead_s
        if lost_s > 0:
            self._lost_s += lost_s
            self._shorten(lost_s)
        if self._on_clock_set is not None:
            self._on_clock_set(lost_s)

    def _shorten(self, lost_s: float) -> None:
        for slot in self._slots.values():
            slot.word_deadline_boot_s -= lost_s
            for key in list(slot.keys.values()):
                key.shorten(lost_s)
                if key.valid_for_s > 0:
                    self._deadlines[key.owner, key.key_id] = key
                else:
                    self._deadlines.pop((key.owner, key.key_id), None)
                    self._on_expired(key)

    async def run_sweeper(self) -> NoReturn:
        """Overwrite what expires, also when nobody asks for it."""
        while True:
            await self._clock.sleep(SWEEP_INTERVAL_S)
            self.take_off_lost_time()
            self.sweep()

    def close(self) -> None:
        """Overwrite everything: the process ends."""
        for owner in list(self._slots):
            self.forget(owner)

    # Asking.

    def sealing_key(self, owner: NetworkService) -> DataKey:
        """The active key of *owner*. KeyUnavailableError if there is none."""
        slot = self._slots.get(owner)
        if slot is not None and slot.active is not None:
            slot.active.check()
            return slot.active
        raise unavailable(Unavailable.UNKNOWN if slot is None else slot.reason, owner, None)

    def opening_key(self, owner: NetworkService, key_id: KeyId) -> DataKey:
        """The key *key_id* of *owner*, in a state that may open. KeyUnavailableError if there is none."""
        slot = self._slots.get(owner)
        if slot is None:
            raise unavailable(Unavailable.UNKNOWN, owner, key_id)
        key = slot.keys.get(key_id)
        if key is not None and key.use is KeyUse.DATA:
            key.check()
            return key
        reason = slot.tombstones.get(key_id)
        if reason is None and slot.withdrawn:
            reason = Unavailable.WITHDRAWN
        if reason is None:
            if not key_id.is_anonymous:  # nobody can bring that one
                slot.misses[key_id] = None
            reason = Unavailable.UNKNOWN
        raise unavailable(reason, owner, key_id)

    def candidates(self, owner: NetworkService) -> list[DataKey]:
        """The keys of *owner* that may open an object which names none: the active one, then the newest.

        Empty if there are none now. Not to be kept: any of them may end at any moment.
        """
        slot = self._slots.get(owner)
        if slot is None:
            return []
        found = [
            key
            for key in slot.keys.values()
            if key.use is KeyUse.DATA and key.state.may_open and key.valid_for_s > 0
        ]
        return sorted(found, key=lambda key: (not key.state.may_seal, -key.version))

    def knows(self, owner: NetworkService, key_id: KeyId) -> bool:
        """Whether *key_id* is, or was, one of *owner*'s: it is here, or ended here."""
        slot = self._slots.get(owner)
        return slot is not None and (key_id in slot.keys or key_id in slot.tombstones)

    def signing_key(self, owner: NetworkService) -> DataKey:
        """The active signing key of *owner*. KeyUnavailableError if there is none."""
        slot = self._slots.get(owner)
        if slot is not None and slot.signing is not None:
            slot.signing.check()
            return slot.signing
        raise unavailable(Unavailable.UNKNOWN if slot is None else slot.reason, owner, None)

    def key_of_version(self, owner: NetworkService, use: KeyUse, version: int) -> DataKey:
        """The key of this version, whatever its state allows. KeyUnavailableError if it is not here."""
        slot = self._slots.get(owner)
        if slot is None:
            raise unavailable(Unavailable.UNKNOWN, owner, None)
        found = slot.versions.get((use, version))
        key = None if found is None else slot.keys.get(found.key_id)
        if key is not None:
            key.check()
            return key
        reason = Unavailable.WITHDRAWN if slot.withdrawn else Unavailable.UNKNOWN
        if found is not None and not slot.withdrawn:
            reason = slot.tombstones.get(found.key_id, reason)
        raise unavailable(reason, owner, None if found is None else found.key_id)

    def versions(self, owner: NetworkService, use: KeyUse) -> list[VersionHolding]:
        """Every version that is here or was ended, ascending."""
        self.sweep()
        slot = self._slots.get(owner)
        return [] if slot is None else slot.versions_of(use)

    def word(self, owner: NetworkService) -> Word:
        """What the agent last said of *owner*, and for how long that counts."""
        slot = self._slots.get(owner)
        if slot is None:
            return Word(withdrawn=False, valid_for_s=0.0, was_given=False)
        return slot.word(now_boot_s=self._clock.boot_s())

    async def wait_for_sealing_key(self, owner: NetworkService, *, timeout_s: float) -> DataKey:
        """Like `sealing_key`, but wait up to *timeout_s* for a push if the key is merely missing or late.

        What the enterprise has withdrawn or suspended is refused at once.
        """
        slot = self._slot(owner)
        deadline_boot_s = self._clock.boot_s() + timeout_s
        while True:
            try:
                return self.sealing_key(owner)
            except KeyUnavailableError as error:
                left_s = deadline_boot_s - self._clock.boot_s()
                if error.reason in _FINAL or left_s <= 0:
                    raise
            await self._pushed_within(slot.pushed, left_s)

    def status(self, owners: Iterable[NetworkService] | None = None) -> list[ServiceStatus]:
        """What is held for each of *owners* (default: all that were ever pushed), with countdowns."""
        self.sweep()
        return [
            slot.status() if (slot := self._slots.get(owner)) is not None else ServiceStatus.of_nothing(owner)
            for owner in (sorted(self._slots) if owners is None else owners)
        ]

    # Within.

    def _slot(self, owner: NetworkService) -> Slot:
        """Made if there is none: for who is provisioned. A look-up never makes one."""
        slot = self._slots.get(owner)
        if slot is None:
            slot = self._slots[owner] = Slot(owner, self._clock.boot_s)
        return slot

    def _install_one(self, slot: Slot, material: KeyMaterial, deadline_boot_s: float) -> None:
        key = slot.keys.get(material.key_id)
        number = (material.use, material.version)
        known = slot.versions.get(number)
        if known is None or known.key_id != material.key_id:
            slot.versions[number] = Version(material.key_id, int(self._clock.wall_s()))
        stopping = STOPPING_STATES.get(material.state)
        if stopping is not None:
            # The material of a key that may not be used is not kept; a push brings it if it is reinstated.
            material.wipe()
            if key is not None:
                self._end(slot, key, stopping)
            slot.tombstones[material.key_id] = stopping
            return
        if key is None:
            key = DataKey(material, deadline_boot_s=deadline_boot_s, boot_s=self._clock.boot_s)
            slot.keys[material.key_id] = key
        else:
            key.prolong(material.state, deadline_boot_s)
            material.wipe()
        slot.tombstones.pop(material.key_id, None)
        slot.misses.pop(material.key_id, None)
        self._deadlines[material.owner, material.key_id] = key
        if slot.active is None and key.use is KeyUse.DATA and key.state.may_seal:
            slot.active = key
        if slot.signing is None and key.use is KeyUse.SIGN and key.state.may_seal:
            slot.signing = key

    def _withdraw(self, slot: Slot, sequence: int | None) -> None:
        for key in list(slot.keys.values()):
            self._end(slot, key, Unavailable.WITHDRAWN)
        slot.active = slot.signing = None
        slot.withdrawn = True
        slot.word_deadline_boot_s = -math.inf
        slot.misses.clear()
        if sequence is not None:
            slot.withdrawn_sequence = max(slot.withdrawn_sequence, sequence)
        slot.wake()

    def _end(self, slot: Slot, key: DataKey, reason: Unavailable) -> None:
        key.end(reason)
        slot.keys.pop(key.key_id, None)
        slot.tombstones[key.key_id] = reason
        slot.let_go(key, reason)
        self._deadlines.pop((key.owner, key.key_id), None)

    def _on_expired(self, key: DataKey) -> None:
        key.end(Unavailable.EXPIRED)
        slot = self._slots.get(key.owner)
        if slot is not None and slot.keys.get(key.key_id) is key:
            del slot.keys[key.key_id]
            slot.tombstones[key.key_id] = Unavailable.EXPIRED
            slot.let_go(key, Unavailable.EXPIRED)

    async def _pushed_within(self, pushed_event: asyncio.Event, timeout_s: float) -> None:
        """Return at the next push or withdrawal, or when *timeout_s* of our own clock have passed."""
        pushed = asyncio.create_task(pushed_event.wait(), name="keys:pushed")
        timer = asyncio.create_task(self._clock.sleep(timeout_s), name="keys:timeout")
        try:
            await asyncio.wait({pushed, timer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pushed, timer):
                task.cancel()
            await asyncio.gather(pushed, timer, return_exceptions=True)
