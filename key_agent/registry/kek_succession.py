"""One KEK follows another that works: the registry's part of a rotation of KEKs.

1. While keys are being wrapped by the staged KEK as well, the current one pushes, as ever.
2. They change places in one transaction, and only if every key that lives is soundly wrapped by the new one.
3. The old wraps are erased after that, and only where the new one stands beside them.
4. Every method can be repeated: it does what is left to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, exists, func, select, update

from envelope.keys import KeyId, KeyState
from key_agent.registry.access import VERIFIED, RefusedChangeError, RegistryAccess, insert_wrap
from key_agent.registry.model import KekRow
from key_agent.registry.rows import is_sound, kek_row, made_values, wrapped_key
from key_agent.registry.states import KekState, check_transition
from key_agent.registry.tables import dek, dek_wrap, kek
from key_agent.sources.source import Kek, WrappedKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """How far a rotation of KEKs has come, read at one moment."""

    current: KekRow | None
    coming: KekRow | None
    """Named (`pre-active`) or made (`staged`)."""
    leaving: KekRow | None
    """Deactivated by the rotation to the current one, and not yet gone from the HSM."""


class KekSuccession(RegistryAccess):
    async def succession(self) -> Succession:
        def work(c: Connection) -> Succession:
            rows = [kek_row(row) for row in c.execute(self._my_keks().order_by(kek.c.version))]
            current = self._current(c)
            coming = [row for row in rows if row.state in (KekState.PRE_ACTIVE, KekState.STAGED)]
            leaving = [row for row in rows if _leaves(row, current)]
            return Succession(
                current=current,
                coming=coming[0] if coming else None,
                leaving=leaving[0] if leaving else None,
            )

        return await self._database.transact(work)

    async def stage_kek(self, made: Kek, *, now_ms: int) -> None:
        """The next KEK is made. RefusedChangeError unless the current one is active."""

        def work(c: Connection) -> None:
            self._active_kek(c)
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == made.reference.kek_id)).one())
            check_transition(row.state, KekState.STAGED)
            c.execute(
                update(kek)
                .where(kek.c.id == made.reference.kek_id)
                .values(
                    **made_values(made),
                    state=KekState.STAGED,
                    state_reason=None,
                    state_since_ms=now_ms,
                    updated_at_ms=now_ms,
                )
            )

        await self._database.transact(work)

    async def keys_to_wrap(self, old_kek_id: str, new_kek_id: str) -> tuple[list[WrappedKey], list[KeyId]]:
        """Keys that live and are not soundly wrapped by the new KEK: those that can be, and damaged ones."""

        def work(c: Connection) -> tuple[list[WrappedKey], list[KeyId]]:
            done = self._sound_under(c, new_kek_id)
            sound, damaged = [], []
            query = self._wraps(old_kek_id).where(dek.c.state != KeyState.DESTROYED)
            for row in c.execute(query.order_by(dek.c.id)):
                if row.id not in done:
                    if is_sound(row):
                        sound.append(wrapped_key(row))
                    else:
                        damaged.append(KeyId.parse(row.id))
            return sound, damaged

        return await self._database.transact(work)

    async def add_wraps(self, keys: Sequence[WrappedKey], *, now_ms: int) -> int:
        """*keys* are wrapped by the staged KEK as well; how many. One destroyed meanwhile is left out.

        RefusedChangeError unless that KEK is staged and the current one active.
        """

        def work(c: Connection) -> int:
            self._active_kek(c)
            staged = c.scalar(
                select(kek.c.id).where(
                    kek.c.environment_id == self._environment, kek.c.state == KekState.STAGED
                )
            )
            if any(key.kek_id != staged for key in keys):
                raise RefusedChangeError("no key is wrapped: the KEK is not staged", "repeat `kek rotate`")
            names = [str(key.key_id) for key in keys]
            living = set(
                c.scalars(select(dek.c.id).where(dek.c.id.in_(names), dek.c.state != KeyState.DESTROYED))
            )
            c.execute(delete(dek_wrap).where(dek_wrap.c.kek_id == staged, dek_wrap.c.dek_id.in_(names)))
            mine = [key for key in keys if str(key.key_id) in living]
            for key in mine:
                insert_wrap(c, key, now_ms)
            return len(mine)

        return await self._database.transact(work)

    async def succeed_kek(self, new_kek_id: str, *, now_ms: int) -> int:
        """The staged KEK becomes the current one, if every living key is wrapped by it; how many are not.

        0: it is done. Otherwise nothing has changed. RefusedChangeError unless the current one is active.
        """

        def work(c: Connection) -> int:
            old = self._active_kek(c)
            new = kek_row(c.execute(self._my_keks().where(kek.c.id == new_kek_id)).one())
            done = self._sound_under(c, new_kek_id)
            living = self._wraps(old.reference.kek_id).where(dek.c.state != KeyState.DESTROYED)
            left = sum(row.id not in done for row in c.execute(living))
            if left:
                return left
            self._set_kek_state(c, old, KekState.DEACTIVATED, f"rotated to {new_kek_id}", now_ms)
            c.execute(update(kek).where(kek.c.id == old.reference.kek_id).values(rotated_to=new_kek_id))
            self._set_kek_state(c, new, KekState.ACTIVE, None, now_ms)
            return 0

        return await self._database.transact(work)

    async def erase_old_wraps(self, old_kek_id: str) -> int:
        """Where a key is soundly wrapped by the KEK that followed, the old wrap goes; how many stay."""

        def work(c: Connection) -> int:
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == old_kek_id)).one())
            current = self._active_kek(c)
            if not _leaves(row, current):
                raise RefusedChangeError(
                    f"KEK {old_kek_id} is {row.state}: its wraps are needed", "see `key-agent kek status`"
                )
            done = self._sound_under(c, current.reference.kek_id)
            for key_id in c.scalars(select(dek_wrap.c.dek_id).where(dek_wrap.c.kek_id == old_kek_id)).all():
                if key_id in done:
                    c.execute(
                        delete(dek_wrap).where(dek_wrap.c.kek_id == old_kek_id, dek_wrap.c.dek_id == key_id)
                    )
            return self._count_wraps(c, old_kek_id)

        return await self._database.transact(work)

    async def erase_wraps_of_ended(self, ended_kek_id: str) -> tuple[int, int]:
        """Of a KEK that an incident has ended: where a key is soundly wrapped by the KEK of today, the old
        wrap goes. How many went, and how many stay. RefusedChangeError if it is the KEK of today.
        """

        def work(c: Connection) -> tuple[int, int]:
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == ended_kek_id)).one())
            current = self._active_kek(c)
            if row.state is KekState.ACTIVE or current.reference.kek_id == ended_kek_id:
                raise RefusedChangeError(
                    f"KEK {ended_kek_id} is {row.state}: its wraps are needed", "see `key-agent kek status`"
                )
            done = self._sound_under(c, current.reference.kek_id)
            before = self._count_wraps(c, ended_kek_id)
            for key_id in c.scalars(select(dek_wrap.c.dek_id).where(dek_wrap.c.kek_id == ended_kek_id)).all():
                if key_id in done:
                    c.execute(
                        delete(dek_wrap).where(dek_wrap.c.kek_id == ended_kek_id, dek_wrap.c.dek_id == key_id)
                    )
            left = self._count_wraps(c, ended_kek_id)
            return before - left, left

        return await self._database.transact(work)

    async def abandon_kek(self, kek_id: str, reason: str, *, now_ms: int) -> None:
        """A KEK on its way is given up, once it is gone from the HSM: no wrap under it is the only one."""

        def work(c: Connection) -> None:
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == kek_id)).one())
            if row.state is KekState.RETIRED:
                return
            other = dek_wrap.alias()
            only_here = c.scalar(
                select(func.count())
                .select_from(dek_wrap)
                .where(
                    dek_wrap.c.kek_id == kek_id,
                    ~exists().where(other.c.dek_id == dek_wrap.c.dek_id, other.c.kek_id != kek_id),
                )
            )
            if only_here or row.state not in (KekState.PRE_ACTIVE, KekState.STAGED):
                raise RefusedChangeError(
                    f"KEK {kek_id} is {row.state} and {only_here} keys are wrapped by it alone",
                    "see `key-agent kek status`",
                )
            c.execute(delete(dek_wrap).where(dek_wrap.c.kek_id == kek_id))
            self._set_kek_state(c, row, KekState.RETIRED, reason, now_ms)

        await self._database.transact(work)

    async def wraps_under(self, kek_id: str) -> int:
        """How many wraps there are under one KEK, damaged ones included."""
        return await self._database.transact(lambda c: self._count_wraps(c, kek_id))

    async def retire_kek(self, kek_id: str, reason: str, *, now_ms: int) -> None:
        """The HSM has it no more, and nothing here needs it. RefusedChangeError if something does."""

        def work(c: Connection) -> None:
            if left := self._count_wraps(c, kek_id):
                raise RefusedChangeError(
                    f"{left} keys are still wrapped by KEK {kek_id}", "see `key-agent service list`"
                )
            row = kek_row(c.execute(self._my_keks().where(kek.c.id == kek_id)).one())
            if row.state is not KekState.RETIRED:
                self._set_kek_state(c, row, KekState.RETIRED, reason, now_ms)

        await self._database.transact(work)

    def _count_wraps(self, c: Connection, kek_id: str) -> int:
        count = c.scalar(select(func.count()).select_from(dek_wrap).where(dek_wrap.c.kek_id == kek_id))
        return count or 0

    def _sound_under(self, c: Connection, kek_id: str) -> set[str]:
        query = self._wraps(kek_id).where(dek_wrap.c.state == VERIFIED)
        return {row.id for row in c.execute(query) if is_sound(row)}


def _leaves(row: KekRow, current: KekRow | None) -> bool:
    """Whether *row* gave way to the KEK of today. (If that was replaced since, old wraps may be the last.)"""
    return (
        row.state is KekState.DEACTIVATED
        and current is not None
        and row.rotated_to == current.reference.kek_id
    )
