"""The registry becomes an archive, and an archive fills what a registry lacks (`backup export`, `import`).

1. What is here is newer: a row that exists is never overwritten by one from a backup. Only what is final
   wins in both directions: a key that either side knows as destroyed or compromised is that afterwards.
2. A wrap counts only if the caller has had the HSM open it (*opened*); others are `stored` and do not travel
   until `reinstate --restore` opens them.
3. A key that is new here becomes active only if its ring has no active one. One that was on its way to become
   active may have sealed since: it comes back to open.
4. A KEK that the backup knows to have given way does so here too, and the one that followed it is followed.
5. All in one transaction; a trial run is the same, taken back at its end.
"""

import contextlib
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from envelope.keys import TRANSITIONS, KeyState, KeyUse, NetworkService
from key_agent.registry.access import (
    NOT_CURRENT,
    STORED,
    VERIFIED,
    RefusedChangeError,
    RegistryAccess,
    insert_wrap,
    place_of,
    set_key_state,
)
from key_agent.registry.archive import (
    Archive,
    KekEntry,
    KeyEntry,
    LinkEntry,
    ProxyEntry,
    Restored,
    SequenceEntry,
    ServiceEntry,
    WrapEntry,
)
from key_agent.registry.model import KekRow
from key_agent.registry.rows import EKM_FORMAT, kek_row, made_values
from key_agent.registry.states import REVOKED_BY_COMMAND, KekState
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    kek,
    key_ring,
    network_service,
    proxy,
    push_sequence,
    service_proxy,
)
from key_agent.sources.source import Kek
from key_agent.sources.verdict import Verdict

_COMING: Final = (KekState.PRE_ACTIVE, KekState.STAGED)
_FINAL: Final = (KeyState.DESTROYED, KeyState.COMPROMISED)

type WrapName = tuple[str, str]
"""Key id and KEK id."""


class _TakenBackError(Exception):
    """Ends a trial run."""


@dataclass(frozen=True, slots=True)
class _Import:
    """One import under way."""

    c: Connection
    opened: AbstractSet[WrapName]
    refused: AbstractSet[WrapName]
    now_ms: int
    done: Restored


def _gave_way(current: KekRow, entry: KekEntry) -> bool:
    """Whether today's KEK here ended by the rotation that the backup knows, and by nobody's revocation.

    An agent that starts with an older registry finds it destroyed, and calls that a revocation: it was the
    rotation's last step.
    """
    if current.state is KekState.ACTIVE:
        return True
    return (
        current.state is KekState.REVOKED
        and KekState(entry.state) is KekState.RETIRED
        and REVOKED_BY_COMMAND not in (current.reason or REVOKED_BY_COMMAND)
        and (current.reason or "").startswith(Verdict.KEK_DESTROYED)
    )


class Archives(RegistryAccess):
    async def archive(self, *, now_ms: int) -> Archive:
        """All of it, read at one moment. Damaged wraps are left out: they open nothing."""
        return await self._database.transact(lambda c: self._archive(c, now_ms))

    async def restore(
        self,
        archive: Archive,
        *,
        opened: AbstractSet[WrapName],
        refused: AbstractSet[WrapName],
        now_ms: int,
        is_trial: bool = False,
    ) -> Restored:
        """Take over what is missing here; what that was.

        *opened*: wraps that the HSM has opened; *refused*: those that it has not. The others' KEKs are not
        there. RefusedChangeError: it is another registry's.
        """
        done = Restored()

        def work(c: Connection) -> None:
            if (archive.tenant, archive.environment) != (self._tenant, self._environment):
                raise RefusedChangeError(
                    f"the backup is of {archive.tenant}, environment {archive.environment}: its keys open "
                    "nowhere else",
                    "import it at an agent of that tenant and environment",
                )
            self._restore_keks(c, archive, now_ms, done)
            self._restore_places(c, archive, now_ms, done)
            for entry in archive.keys:
                self._restore_key(_Import(c, opened, refused, now_ms, done), entry)
            self._restore_sequences(c, archive)
            if is_trial:
                raise _TakenBackError

        with contextlib.suppress(_TakenBackError):
            await self._database.transact(work)
        return done

    def _archive(self, c: Connection, now_ms: int) -> Archive:
        wraps: dict[str, list[WrapEntry]] = {}
        for row in c.execute(select(dek_wrap).order_by(dek_wrap.c.dek_id, dek_wrap.c.kek_id)):
            if sha256(row.wrapped).digest() == row.wrapped_sha256 and row.format == EKM_FORMAT:
                wraps.setdefault(row.dek_id, []).append(
                    WrapEntry(
                        kek_id=row.kek_id,
                        method=row.wrap_alg,
                        wrapped=bytes(row.wrapped),
                        token_serial=row.token_serial,
                        made_at_ms=row.made_at_ms,
                    )
                )
        keys = c.execute(
            select(dek, key_ring.c.network_service_id)
            .join(key_ring, key_ring.c.id == dek.c.ring_id)
            .order_by(key_ring.c.network_service_id, dek.c.key_type, dek.c.version)
        )
        return Archive(
            tenant=self._tenant,
            environment=self._environment,
            agent=self._agent,
            made_at_ms=now_ms,
            keks=tuple(self._kek_entries(c)),
            services=tuple(
                ServiceEntry(id=row.id, removed=row.removed, rotate_after_days=row.rotate_after_days)
                for row in c.execute(select(network_service).order_by(network_service.c.id))
            ),
            proxies=tuple(
                ProxyEntry(id=row.id, url=row.url, ca_pem=row.ca_pem, removed=row.removed)
                for row in c.execute(select(proxy).order_by(proxy.c.id))
            ),
            links=tuple(
                LinkEntry(
                    service=row.network_service_id,
                    proxy=row.proxy_id,
                    certificate_pem=row.certificate_pem,
                    withdrawn=row.withdrawn,
                    issued_sequence=row.issued_sequence,
                    issued_until_ms=row.issued_until_ms,
                    withdrawn_sequence=row.withdrawn_sequence,
                )
                for row in c.execute(select(service_proxy))
            ),
            keys=tuple(
                KeyEntry(
                    kid=row.id,
                    service=row.network_service_id,
                    use=row.key_type,
                    algorithm=row.alg,
                    version=row.version,
                    state=row.state,
                    reason=row.state_reason,
                    since_ms=row.state_since_ms,
                    activated_at_ms=row.activated_at_ms,
                    suspended_from=row.suspended_from,
                    kcv=bytes(row.kcv),
                    created_at_ms=row.created_at_ms,
                    wraps=tuple(wraps.get(row.id, ())),
                )
                for row in keys
            ),
            sequences=tuple(
                SequenceEntry(issuer=row.issuer, service=row.network_service_id, sequence=row.sequence)
                for row in c.execute(select(push_sequence))
            ),
        )

    def _kek_entries(self, c: Connection) -> list[KekEntry]:
        found = []
        for row in c.execute(self._my_keks().order_by(kek.c.version)):
            known = kek_row(row)
            entry = KekEntry(
                id=known.reference.kek_id,
                label=known.reference.label,
                object_id=known.reference.object_id,
                version=known.version,
                state=known.state,
                reason=known.reason,
                since_ms=known.since_ms,
                rotated_to=known.rotated_to,
            )
            if (made := known.kek) is not None:
                entry = msgspec.structs.replace(
                    entry,
                    method=made.method,
                    token_serial=made.token_serial,
                    canary_ciphertext=made.canary_ciphertext,
                    canary_sha256=made.canary_sha256,
                    made_at_ms=made.created_at_ms,
                    public_key_der=made.public_key_der,
                    valid_from_s=made.valid_from_s,
                    valid_until_s=made.valid_until_s,
                    is_adopted=made.is_adopted,
                )
            found.append(entry)
        return found

    # The way back.

    def _restore_keks(self, c: Connection, archive: Archive, now_ms: int, done: Restored) -> None:
        known = {row.id: row for row in c.execute(self._my_keks())}
        current = self._current(c)
        for entry in archive.keks:
            # Rule 4: today's KEK here had given way when the backup was made.
            if (
                current is not None
                and current.reference.kek_id == entry.id
                and KekState(entry.state) in (KekState.DEACTIVATED, KekState.RETIRED)
                and entry.rotated_to is not None
            ):
                if not _gave_way(current, entry):
                    continue  # taken back here: that stays, whatever came after it there
                self._set_kek_state(c, current, KekState.DEACTIVATED, entry.reason, now_ms)
                c.execute(update(kek).where(kek.c.id == entry.id).values(rotated_to=entry.rotated_to))
                done.kept[entry.id] = f"this KEK had given way to {entry.rotated_to}"
                current = None
        for entry in archive.keks:
            made = entry.kek(self._environment)
            if made is None:
                continue
            state = KekState(entry.state)
            if (row := known.get(entry.id)) is not None:
                # Rule 4: it was on its way here when its rotation went on there.
                if current is None and row.state in _COMING and state not in NOT_CURRENT:
                    current = self._follow(c, kek_row(row), entry, made, now_ms)
                    done.keks.append(entry.id)
                continue
            if state is KekState.STAGED or (state not in NOT_CURRENT and current is not None):
                state = KekState.DEACTIVATED
            c.execute(
                insert(kek).values(
                    id=entry.id,
                    environment_id=self._environment,
                    version=self._free_version(c, entry.version),
                    label=entry.label,
                    object_id=entry.object_id,
                    **made_values(made),
                    state=state,
                    state_reason=entry.reason,
                    rotated_to=entry.rotated_to,
                    state_since_ms=now_ms,
                    created_at_ms=now_ms,
                    updated_at_ms=now_ms,
                )
            )
            done.keks.append(entry.id)
            if state not in NOT_CURRENT:
                current = kek_row(c.execute(self._my_keks().where(kek.c.id == entry.id)).one())

    def _follow(self, c: Connection, coming: KekRow, entry: KekEntry, made: Kek, now_ms: int) -> KekRow:
        """*coming* is today's KEK from now on, as *made*, in the state of *entry*."""
        state = KekState(entry.state)
        mine = self._my_keks().where(kek.c.id == coming.reference.kek_id)
        c.execute(update(kek).where(kek.c.id == coming.reference.kek_id).values(**made_values(made)))
        self._set_kek_state(c, coming, KekState.ACTIVE, entry.reason, now_ms)
        row = kek_row(c.execute(mine).one())
        if state is not row.state:  # it worked, and was taken back
            self._set_kek_state(c, row, state, entry.reason, now_ms)
            row = kek_row(c.execute(mine).one())
        return row

    def _free_version(self, c: Connection, wanted: int) -> int:
        mine = select(kek.c.version).where(kek.c.environment_id == self._environment)
        used = set(c.scalars(mine))
        return wanted if wanted not in used else max(used) + 1

    def _restore_places(self, c: Connection, archive: Archive, now_ms: int, done: Restored) -> None:
        times = {"created_at_ms": now_ms, "updated_at_ms": now_ms}
        services = {row.id: row.removed for row in c.execute(select(network_service))}
        for service in archive.services:
            if service.id not in services:
                owner = NetworkService.parse(service.id)
                c.execute(
                    insert(network_service).values(
                        id=service.id,
                        tenant_id=owner.tenant,
                        name=owner.service,
                        removed=service.removed,
                        rotate_after_days=service.rotate_after_days,
                        **times,
                    )
                )
                services[service.id] = service.removed
                done.services.append(service.id)
        proxies = {row.id: row.removed for row in c.execute(select(proxy))}
        for place in archive.proxies:
            if place.id not in proxies:
                c.execute(
                    insert(proxy).values(
                        id=place.id, url=place.url, ca_pem=place.ca_pem, removed=place.removed, **times
                    )
                )
                proxies[place.id] = place.removed
                done.proxies.append(place.id)
        for link in archive.links:
            where = place_of(NetworkService.parse(link.service), link.proxy)
            if c.execute(select(service_proxy.c.proxy_id).where(where)).first() is not None:
                continue
            is_gone = services[link.service] or proxies[link.proxy]
            c.execute(
                insert(service_proxy).values(
                    network_service_id=link.service,
                    proxy_id=link.proxy,
                    certificate_pem=link.certificate_pem,
                    withdrawn=link.withdrawn or is_gone,
                    issued_sequence=link.issued_sequence,
                    issued_until_ms=link.issued_until_ms,
                    accepted_sequence=0,
                    withdrawn_sequence=link.withdrawn_sequence,
                    **times,
                )
            )
            done.links += 1

    def _restore_key(self, run: _Import, entry: KeyEntry) -> None:
        c, now_ms, done = run.c, run.now_ms, run.done
        row = c.execute(select(dek).where(dek.c.id == entry.kid)).one_or_none()
        theirs = KeyState(entry.state)
        if row is None:
            self._add_from(run, entry)
            if theirs is KeyState.DESTROYED or entry.kid not in done.keys:
                return
        else:
            ours = KeyState(row.state)
            if bytes(row.kcv) != entry.kcv:
                done.kept[entry.kid] = "the check values differ: one of the two is another key"
                return
            if ours is KeyState.DESTROYED:
                if theirs is not KeyState.DESTROYED:
                    done.kept[entry.kid] = "destroyed here: it stays destroyed"
                return
            if theirs in _FINAL and ours not in _FINAL:
                self._end_as(c, entry, ours, theirs, now_ms)
                done.ended[entry.kid] = theirs
            elif ours is not theirs:
                done.kept[entry.kid] = f"{ours} here, {theirs} in the backup"
            if theirs is KeyState.DESTROYED and ours is KeyState.COMPROMISED:
                self._destroy_key(c, entry.kid, now_ms)
                done.ended[entry.kid] = theirs
            now = c.scalar(select(dek.c.state).where(dek.c.id == entry.kid))
            if KeyState.DESTROYED in (theirs, now):
                return  # one that was on its way is destroyed by now, whatever it became there
        self._restore_wraps(run, entry)

    def _end_as(self, c: Connection, entry: KeyEntry, ours: KeyState, theirs: KeyState, now_ms: int) -> None:
        for rotation in self._rotations(c, is_open=True):
            if str(rotation.new_key) == entry.kid:
                self._give_up(c, rotation, now_ms)
                ours = KeyState(c.execute(select(dek.c.state).where(dek.c.id == entry.kid)).scalar_one())
        if theirs is KeyState.DESTROYED:
            if ours is not KeyState.DESTROYED:
                self._destroy_key(c, entry.kid, now_ms)
        elif theirs in TRANSITIONS[ours]:
            set_key_state(c, entry.kid, ours, theirs, now_ms)

    def _add_from(self, run: _Import, entry: KeyEntry) -> None:
        """The key's row without wraps."""
        c, now_ms, done = run.c, run.now_ms, run.done
        owner, use = NetworkService.parse(entry.service), KeyUse(entry.use)
        removed = c.scalar(select(network_service.c.removed).where(network_service.c.id == entry.service))
        state = KeyState(entry.state)
        if removed is not False and state is not KeyState.DESTROYED:
            done.kept[entry.kid] = f"{owner} is removed here: it stays so"
            return
        places = {(entry.kid, wrap.kek_id) for wrap in entry.wraps}
        if state is not KeyState.DESTROYED and not places - run.refused:
            done.kept[entry.kid] = "no wrap of it in the backup opens"
            return
        ring_id = self._ring(c, owner, use, now_ms)
        is_free = self._active_key(c, ring_id) is None and bool(places & run.opened)
        if state is KeyState.PRE_ACTIVE or (state is KeyState.ACTIVE and not is_free):
            state = KeyState.DEACTIVATED
        used = {
            row.version: row.id
            for row in c.execute(select(dek.c.id, dek.c.version).where(dek.c.ring_id == ring_id))
        }
        c.execute(
            insert(dek).values(
                id=entry.kid,
                tenant_id=owner.tenant,
                ring_id=ring_id,
                owner_environment_id=self._environment,
                generator_environment_id=self._environment,
                key_type=use,
                alg=entry.algorithm,
                version=entry.version if entry.version not in used else max(used) + 1,
                state=state,
                state_reason=entry.reason,
                state_since_ms=now_ms,
                activated_at_ms=entry.activated_at_ms,
                suspended_from=entry.suspended_from,
                after_sequence=self._highest_sequence(c, owner),
                kcv=entry.kcv,
                created_at_ms=entry.created_at_ms,
                updated_at_ms=now_ms,
            )
        )
        done.keys.append(entry.kid)

    def _restore_wraps(self, run: _Import, entry: KeyEntry) -> None:
        c, done = run.c, run.done
        keks = set(c.scalars(self._my_keks().with_only_columns(kek.c.id)))
        for wrap in entry.wraps:
            place = (entry.kid, wrap.kek_id)
            if place in run.refused or wrap.kek_id not in keks:
                continue
            where = (dek_wrap.c.dek_id == entry.kid, dek_wrap.c.kek_id == wrap.kek_id)
            found = c.execute(select(dek_wrap).where(*where)).one_or_none()
            is_sound = found is not None and sha256(found.wrapped).digest() == found.wrapped_sha256
            if found is not None and is_sound and (found.state == VERIFIED or place not in run.opened):
                continue
            c.execute(delete(dek_wrap).where(*where))
            state = VERIFIED if place in run.opened else STORED
            insert_wrap(c, entry.wrapped(wrap, self._environment), run.now_ms, state=state)
            if state == STORED:
                done.waiting.append(entry.kid)
            elif entry.kid not in done.keys:
                done.wraps.append(entry.kid)

    def _restore_sequences(self, c: Connection, archive: Archive) -> None:
        for entry in archive.sequences:
            mine = (
                push_sequence.c.issuer == entry.issuer,
                push_sequence.c.network_service_id == entry.service,
            )
            known = c.scalar(select(func.max(push_sequence.c.sequence)).where(*mine))
            if known is None:
                c.execute(
                    insert(push_sequence).values(
                        issuer=entry.issuer, network_service_id=entry.service, sequence=entry.sequence
                    )
                )
            elif known < entry.sequence:
                c.execute(update(push_sequence).where(*mine).values(sequence=entry.sequence))
