"""Life of data keys in the registry: states by command, rotations, and when the next one is due.

1. Each method is one transaction; the tables in `envelope.keys` and `registry.states` decide what may follow
   what.
2. `suspend` remembers where it came from; `resume` leads there, but never to a second active key.
3. What a destroyed key's row says stays; its wraps are erased with the state.
4. A rotation and its new key are written together, and so are the two keys that change places.
"""

import json
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, select, update

from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.registry.access import RefusedChangeError, RegistryAccess, set_key_state
from key_agent.registry.model import UNSERVED_MS, DueRing, Patience, Rotation, RotationCause
from key_agent.registry.states import RotationPhase
from key_agent.registry.tables import dek, key_ring, key_rotation, network_service
from key_agent.sources.source import WrappedKey

MAX_ROTATE_AFTER_DAYS: Final = 3660
_DAY_MS: Final = 86_400_000


class KeyLife(RegistryAccess):
    # States.

    async def change_key(
        self, owner: NetworkService, key_id: KeyId, new: KeyState, reason: str | None, *, now_ms: int
    ) -> KeyState:
        """Suspend, deactivate, compromise or destroy a key; the state it had. That state again is success.

        RefusedChangeError if it is not a key of *owner*, or the table does not let it go there.
        """

        def work(c: Connection) -> KeyState:
            old = self._state_of(c, owner, key_id)
            if old is new or self._ends_with_its_rotation(c, owner, key_id, new, now_ms):
                return old
            if new is KeyState.DESTROYED:
                if old not in (KeyState.DEACTIVATED, KeyState.COMPROMISED):
                    raise RefusedChangeError(
                        f"key {key_id} of {owner} is {old}: only a deactivated or compromised one is "
                        "destroyed",
                        f"`key-agent rotate {owner}` makes another one active; "
                        f"`key-agent key deactivate {owner} {key_id}` ends this one",
                    )
                self._destroy_key(c, str(key_id), now_ms)
                c.execute(update(dek).where(dek.c.id == str(key_id)).values(state_reason=reason))
                return old
            set_key_state(
                c,
                str(key_id),
                old,
                new,
                now_ms,
                state_reason=reason,
                suspended_from=old if new is KeyState.SUSPENDED else None,
                # Its proxies know of it once they acknowledge a higher sequence.
                after_sequence=self._highest_sequence(c, owner),
            )
            return old

        return await self._database.transact(work)

    async def resume_key(self, owner: NetworkService, key_id: KeyId, *, now_ms: int) -> KeyState:
        """Undo a suspension; the state it has now. RefusedChangeError if the key is not suspended."""

        def work(c: Connection) -> KeyState:
            old = self._state_of(c, owner, key_id)
            if old is not KeyState.SUSPENDED:
                raise RefusedChangeError(
                    f"key {key_id} is {old}, not suspended", "`key-agent key list` shows the states"
                )
            row = c.execute(select(dek.c.ring_id, dek.c.suspended_from).where(dek.c.id == str(key_id))).one()
            # Rows of before there was `suspend` do not say where they came from: to open only.
            new = KeyState(row.suspended_from or KeyState.DEACTIVATED)
            if new is KeyState.ACTIVE and self._active_key(c, row.ring_id) is not None:
                new = KeyState.DEACTIVATED  # another one has become active meanwhile
            set_key_state(
                c,
                str(key_id),
                old,
                new,
                now_ms,
                suspended_from=None,
                state_reason=None,
                after_sequence=self._highest_sequence(c, owner),
            )
            return new

        return await self._database.transact(work)

    def _state_of(self, c: Connection, owner: NetworkService, key_id: KeyId) -> KeyState:
        state = c.scalar(
            select(dek.c.state)
            .join(key_ring, key_ring.c.id == dek.c.ring_id)
            .where(dek.c.id == str(key_id), key_ring.c.network_service_id == str(owner))
        )
        if state is None:
            raise RefusedChangeError(f"{owner} has no key {key_id}", f"`key-agent key list {owner}`")
        return KeyState(state)

    def _ends_with_its_rotation(
        self, c: Connection, owner: NetworkService, key_id: KeyId, new: KeyState, now_ms: int
    ) -> bool:
        """Whether *key_id* was on its way to the proxies and is given up with that."""
        for rotation in self._rotations(c, is_open=True):
            if rotation.phase is not RotationPhase.DISTRIBUTING:
                continue
            if rotation.new_key == key_id:
                if new in (KeyState.COMPROMISED, KeyState.DESTROYED):
                    self._give_up(c, rotation, now_ms)
                    return True
                raise RefusedChangeError(
                    f"key {key_id} is on its way to the proxies of {owner}",
                    f"`key-agent rotate {owner} --cancel` gives it up",
                )
            if rotation.old_key == key_id:
                # Nothing seals from now on: the new key does not wait for the last proxy.
                soon_ms = min(rotation.until_ms, now_ms + UNSERVED_MS)
                c.execute(
                    update(key_rotation)
                    .where(key_rotation.c.id == rotation.id)
                    .values(phase_until_ms=soon_ms)
                )
        return False

    # Rotations.

    async def begin_rotations(
        self, keys: Sequence[WrappedKey], cause: RotationCause, patience: Patience, *, now_ms: int
    ) -> list[str]:
        """*keys* are to take over: pre-active until their proxies know them. The rotations' ids.

        A service without proxies gets its key at once, and needs no rotation. RefusedChangeError: a rotation
        is open already, the service is unknown, or the KEK is not active and theirs; then nothing has begun.
        """

        def work(c: Connection) -> list[str]:
            current = self._active_kek(c)
            begun = []
            for key in keys:
                if key.kek_id != current.reference.kek_id:
                    raise RefusedChangeError("the KEK is another one now", "repeat the command")
                self._require_service(c, key.owner)
                ring_id = self._ring(c, key.owner, key.use, now_ms)
                if self._rotations(c, ring_id=ring_id, is_open=True):
                    raise RefusedChangeError(
                        f"a rotation of {key.owner} is under way",
                        "`key-agent status` shows what it waits for; "
                        f"`key-agent rotate {key.owner} --cancel` gives it up",
                    )
                made = self._place_key(c, key, now_ms, cause=cause, patience=patience, two_phases_from=1)
                begun += [] if made is None else [made]
            return begun

        return await self._database.transact(work)

    async def activate_rotation(
        self, rotation_id: str, late: Sequence[str], patience: Patience, *, now_ms: int
    ) -> Rotation:
        """The new key becomes active and the old one deactivated; *late* proxies have not acknowledged it.

        RefusedChangeError if it is past that, or no key may leave.
        """

        def work(c: Connection) -> Rotation:
            current = self._active_kek(c)
            rotation = self._rotation(c, rotation_id)
            new = str(rotation.new_key)
            if not self._has_wrap(c, new, current.reference.kek_id):
                raise RefusedChangeError(
                    f"key {new} is not wrapped by the KEK of today", f"`key-agent rotate {rotation.owner}`"
                )
            ring_id = c.execute(
                select(key_rotation.c.ring_id).where(key_rotation.c.id == rotation_id)
            ).scalar_one()
            if (before := self._active_key(c, ring_id)) is not None:
                set_key_state(c, before, KeyState.ACTIVE, KeyState.DEACTIVATED, now_ms)
            set_key_state(c, new, KeyState.PRE_ACTIVE, KeyState.ACTIVE, now_ms, activated_at_ms=now_ms)
            self._enter_phase(
                c,
                rotation,
                RotationPhase.ACTIVATED,
                now_ms,
                after_sequence=self._highest_sequence(c, rotation.owner),
                phase_until_ms=now_ms + patience.usual_ms,
                late_proxies=json.dumps(sorted(late)),
            )
            return self._rotation(c, rotation_id)

        return await self._database.transact(work)

    async def distribute_again(self, rotation_id: str, patience: Patience, *, now_ms: int) -> None:
        """What was acknowledged so far does not count: the new key may have been left out of it."""

        def work(c: Connection) -> None:
            rotation = self._rotation(c, rotation_id)
            if rotation.phase is RotationPhase.DISTRIBUTING:
                c.execute(
                    update(key_rotation)
                    .where(key_rotation.c.id == rotation_id)
                    .values(
                        after_sequence=self._highest_sequence(c, rotation.owner),
                        phase_until_ms=now_ms + patience.usual_ms,
                        updated_at_ms=now_ms,
                    )
                )

        await self._database.transact(work)

    async def finish_rotation(self, rotation_id: str, *, now_ms: int) -> None:
        """Every proxy that matters knows. RefusedChangeError unless it is in its second phase."""

        def work(c: Connection) -> None:
            rotation = self._rotation(c, rotation_id)
            self._enter_phase(c, rotation, RotationPhase.DONE, now_ms)

        await self._database.transact(work)

    async def cancel_rotations(self, owner: NetworkService, *, now_ms: int) -> list[Rotation]:
        """Give up those of *owner* that have activated nothing; their new keys are destroyed.

        RefusedChangeError if there are none.
        """

        def work(c: Connection) -> list[Rotation]:
            mine = [r for r in self._rotations(c, is_open=True) if r.owner == owner]
            early = [r for r in mine if r.phase is RotationPhase.DISTRIBUTING]
            if not early:
                found = "is past the point where it can be" if mine else "does not run, so it cannot be"
                raise RefusedChangeError(
                    f"a rotation of {owner} {found} cancelled",
                    f"`key-agent rotate {owner}` makes the next key active",
                )
            for rotation in early:
                self._give_up(c, rotation, now_ms)
            return early

        return await self._database.transact(work)

    async def open_rotations(self) -> list[Rotation]:
        return await self._database.transact(lambda c: self._rotations(c, is_open=True))

    async def rotations(self) -> list[Rotation]:
        """All that ever were, oldest first."""
        return await self._database.transact(self._rotations)

    def _rotation(self, c: Connection, rotation_id: str) -> Rotation:
        for rotation in self._rotations(c, rotation_id=rotation_id):
            return rotation
        raise RefusedChangeError(f"no rotation {rotation_id}", "`key-agent status` shows them")

    # When.

    async def set_rotate_after(self, owner: NetworkService, days: int | None, *, now_ms: int) -> None:
        """Age in days at which the keys of *owner* are rotated; 0: never, None: as the agent's settings say.

        RefusedChangeError if the service is unknown or *days* out of range.
        """

        def work(c: Connection) -> None:
            self._require_service(c, owner)
            if days is not None and not 0 <= days <= MAX_ROTATE_AFTER_DAYS:
                raise RefusedChangeError(
                    f"{days} days is no age to rotate at", f"give 0 to {MAX_ROTATE_AFTER_DAYS} days"
                )
            c.execute(
                update(network_service)
                .where(network_service.c.id == str(owner))
                .values(rotate_after_days=days, updated_at_ms=now_ms)
            )

        await self._database.transact(work)

    async def rotate_after(self) -> dict[NetworkService, int | None]:
        """What is set for each service, None for the agent's own setting."""
        query = select(network_service.c.id, network_service.c.rotate_after_days).where(
            network_service.c.removed.is_(False)
        )
        return await self._database.transact(
            lambda c: {NetworkService.parse(row.id): row.rotate_after_days for row in c.execute(query)}
        )

    async def due_rings(self, default_days: int, *, now_ms: int, limit: int) -> list[DueRing]:
        """Rings whose active key is old enough for a rotation and has none open; the oldest first."""

        def work(c: Connection) -> list[DueRing]:
            busy = {(r.owner, r.use) for r in self._rotations(c, is_open=True)}
            query = (
                select(
                    key_ring.c.network_service_id,
                    dek.c.key_type,
                    dek.c.alg,
                    dek.c.activated_at_ms,
                    network_service.c.rotate_after_days,
                )
                .join(key_ring, key_ring.c.id == dek.c.ring_id)
                .join(network_service, network_service.c.id == key_ring.c.network_service_id)
                .where(dek.c.state == KeyState.ACTIVE, network_service.c.removed.is_(False))
                .order_by(dek.c.activated_at_ms, dek.c.id)
            )
            due = []
            for row in c.execute(query):
                days = default_days if row.rotate_after_days is None else row.rotate_after_days
                ring = DueRing(
                    owner=NetworkService.parse(row.network_service_id),
                    use=KeyUse(row.key_type),
                    algorithm=row.alg,
                )
                is_old = days > 0 and now_ms - (row.activated_at_ms or 0) >= days * _DAY_MS
                if is_old and (ring.owner, ring.use) not in busy:
                    due.append(ring)
                    if len(due) == limit:
                        break
            return due

        return await self._database.transact(work)
