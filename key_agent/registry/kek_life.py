"""A KEK of this environment in the registry: named, made, withdrawn, and what is rescued from one that ended.

1. A KEK has its row before the HSM has the key: after a crash the same name is taken up again.
2. One key of the HSM is never two KEKs at a time.
3. A KEK that works is not replaced here: `kek_succession.py` rotates it. A new one is the current one where
   there was none, or where the one of today must not be used any more.
4. A key whose wrap moves to the KEK of today opens, and seals nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update

from envelope.errors import MisuseError
from envelope.keys import KeyState
from key_agent.registry.access import (
    RefusedChangeError,
    RegistryAccess,
    hosts_worth_two_phases,
    insert_wrap,
    set_key_state,
)
from key_agent.registry.model import AT_ONCE, Patience, RotationCause
from key_agent.registry.rows import kek_row, made_values
from key_agent.registry.states import KekState, check_transition
from key_agent.registry.tables import dek, dek_wrap, kek
from key_agent.sources.source import Kek, KekReference, WrappedKey

# Destroyed by the agent once their keys have moved on, or used by it now.
_IN_USE: Final = (KekState.ACTIVE, KekState.STAGED, KekState.DEACTIVATED)


class KekLife(RegistryAccess):
    async def begin_kek(
        self, reference: KekReference, *, now_ms: int, adopts: bool = False
    ) -> tuple[KekReference, bool]:
        """Name a KEK before the HSM makes it, by *reference* or by the name of one begun earlier and never
        finished.

        True with the latter: the HSM may hold it half-made. One that was to be adopted is no such: it gives
        way to another wish. RefusedChangeError if *adopts* finds one half-made, or the key is in use already:
        a rotation to the very same key would end by destroying it.
        """

        def work(c: Connection) -> tuple[KekReference, bool]:
            for row in c.execute(self._my_keks().where(kek.c.state.in_(_IN_USE))):
                if _hsm_name(row.label, row.object_id) == _hsm_name(reference.label, reference.object_id):
                    raise RefusedChangeError(
                        f"the key {reference.label!r} in the HSM is KEK {row.id} already ({row.state})",
                        "name another key; without label and id a new one is made",
                    )
            found = c.execute(self._my_keks().where(kek.c.state == KekState.PRE_ACTIVE)).one_or_none()
            if found is not None:
                unfinished, was_adoption = kek_row(found), found.attributes is not None
                if not was_adoption and adopts:
                    raise RefusedChangeError(
                        f"KEK {unfinished.reference.kek_id} may be half-made in the HSM",
                        "repeat the command that was interrupted, without label and id: it cleans up",
                    )
                same = replace(reference, kek_id=unfinished.reference.kek_id) == unfinished.reference
                if not was_adoption or (adopts and same):
                    return unfinished.reference, not was_adoption
                self._set_kek_state(c, unfinished, KekState.RETIRED, "never adopted", now_ms)
            version = c.scalar(
                select(func.max(kek.c.version)).where(kek.c.environment_id == self._environment)
            )
            c.execute(
                insert(kek).values(
                    id=reference.kek_id,
                    environment_id=self._environment,
                    version=(version or 0) + 1,
                    label=reference.label,
                    object_id=reference.object_id,
                    # Before it is made, this says no more than that the key is another's.
                    attributes="{}" if adopts else None,
                    state=KekState.PRE_ACTIVE,
                    state_since_ms=now_ms,
                    created_at_ms=now_ms,
                    updated_at_ms=now_ms,
                )
            )
            return reference, False

        return await self._database.transact(work)

    async def complete_kek(
        self, made: Kek, keys: Sequence[WrappedKey], *, now_ms: int, patience: Patience = AT_ONCE
    ) -> None:
        """The KEK is made, and *keys* under it: it becomes the current one and they the active ones.

        A KEK before it, which must not work any more, is deactivated; its wraps stay. A service that several
        proxies host gets its new key in two phases, unless there is no *patience*.
        """
        two_phases_from = hosts_worth_two_phases(patience)

        def work(c: Connection) -> None:
            old = self._current(c)
            if old is not None:
                if not old.state.is_withdrawn:
                    raise MisuseError(f"KEK {old.reference.kek_id} is {old.state}: rotate it instead")
                self._set_kek_state(
                    c, old, KekState.DEACTIVATED, f"replaced by {made.reference.kek_id}", now_ms
                )
            row = c.execute(self._my_keks().where(kek.c.id == made.reference.kek_id)).one()
            check_transition(KekState(row.state), KekState.ACTIVE)
            c.execute(
                update(kek)
                .where(kek.c.id == made.reference.kek_id)
                .values(
                    **made_values(made),
                    state=KekState.ACTIVE,
                    state_reason=None,
                    state_since_ms=now_ms,
                    updated_at_ms=now_ms,
                )
            )
            for key in keys:
                self._place_key(
                    c,
                    key,
                    now_ms,
                    cause=RotationCause.LOST,
                    patience=patience,
                    two_phases_from=two_phases_from,
                )

        await self._database.transact(work)

    async def set_kek_state(self, kek_id: str, state: KekState, reason: str | None, *, now_ms: int) -> None:
        """MisuseError if the KEK may not go there. The state it already has is success."""

        def work(c: Connection) -> None:
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == kek_id)).one())
            if row.state is not state:
                self._set_kek_state(c, row, state, reason, now_ms)

        await self._database.transact(work)

    async def move_wraps(self, old_kek_id: str, keys: Sequence[WrappedKey], *, now_ms: int) -> int:
        """*keys* are wrapped anew, under the current KEK: their wraps under *old_kek_id* are erased.

        They open and seal nothing: one that could still seal is deactivated. A key whose old wrap is gone
        meanwhile is left out. How many moved. RefusedChangeError unless the current KEK is active and theirs.
        """

        def work(c: Connection) -> int:
            current = self._current(c)
            if current is None or current.state is not KekState.ACTIVE:
                state = "missing" if current is None else current.state
                raise RefusedChangeError(f"nothing is restored: the KEK is {state}", "see `key-agent status`")
            if any(key.kek_id != current.reference.kek_id for key in keys):
                raise RefusedChangeError("nothing is restored: the KEK is another one now", "start again")
            old = {
                row.id: KeyState(row.state)
                for row in c.execute(
                    select(dek.c.id, dek.c.state)
                    .join(dek_wrap, dek_wrap.c.dek_id == dek.c.id)
                    .where(dek_wrap.c.kek_id == old_kek_id, dek.c.id.in_([str(key.key_id) for key in keys]))
                )
            }
            moved = [key for key in keys if str(key.key_id) in old]
            for key in moved:
                key_id = str(key.key_id)
                if old[key_id] is KeyState.ACTIVE:
                    set_key_state(c, key_id, old[key_id], KeyState.DEACTIVATED, now_ms)
                c.execute(
                    delete(dek_wrap).where(
                        dek_wrap.c.dek_id == key_id, dek_wrap.c.kek_id.in_((old_kek_id, key.kek_id))
                    )
                )
                insert_wrap(c, key, now_ms)
            return len(moved)

        return await self._database.transact(work)


def _hsm_name(label: str, object_id: bytes) -> str:
    """Equal for two that a token or a key server, which knows no ids, could take for one."""
    return f"{label}-{bytes(object_id).hex()}".rstrip("-")
