"""All SQL of the key agent.

1. Every method is one transaction; when it returns, it is on disk. (`Book` and rows are values, not live
   objects.)
2. Sequences are `max(stored + 1, Unix ms)` (format.md 5): rising also after an old backup was restored.
3. A sequence and what may be held under it are committed *before* an envelope leaves; the keys are read in
   the same transaction, so the higher sequence always carries the newer set.
4. Only an active KEK gives a reservation. This is the second lock; the first is `key_agent.consent`.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self

from sqlalchemy import Connection, Row, and_, bindparam, delete, func, insert, select, update

from envelope.errors import MisuseError
from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.registry.access import (
    VERIFIED,
    RefusedChangeError,
    all_links,
    insert_wrap,
    is_sound,
    kek_row,
    link_row,
    made_values,
    place_of,
    proxy_row,
    set_key_state,
    wrapped_key,
)
from key_agent.registry.archiving import Archives
from key_agent.registry.database import Database, OnStandby
from key_agent.registry.kek_succession import KekSuccession
from key_agent.registry.key_life import KeyLife
from key_agent.registry.lease import Holding
from key_agent.registry.model import (
    Book,
    DataKeyRow,
    HeldKey,
    KekRow,
    Link,
    Patience,
    Presenter,
    Proxy,
    Receipt,
    Reservation,
    RotationCause,
)
from key_agent.registry.states import KekState, check_transition
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    environment,
    kek,
    key_ring,
    network_service,
    proxy,
    push_sequence,
    service_proxy,
    tenant,
)
from key_agent.sources.source import Kek, KekReference, WrappedKey

__all__ = ["MAX_SEQUENCE", "MAX_TOMBSTONES", "RefusedChangeError", "Registry"]

MAX_SEQUENCE: Final = 2**53 - 1
MAX_TOMBSTONES: Final = 64
"""Of destroyed keys, the newest of a service travel, so that proxies say "destroyed" and not "unknown"."""
# Destroyed by the agent once their keys have moved on, or used by it now.
_IN_USE: Final = (KekState.ACTIVE, KekState.STAGED, KekState.DEACTIVATED)
_AT_ONCE: Final = Patience(usual_ms=0, unserved_ms=0)
_NEVER: Final = 1 << 30


class Registry(KeyLife, KekSuccession, Archives):
    presenter: Presenter | None = None
    """Set where there are several environments, each with an active key: which of them seals here."""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        tenant_id: str,
        environment_id: str,
        agent_id: str,
        now_ms: int,
        on_standby: OnStandby | None = None,
    ) -> Self:
        """Open, migrate, take the lease, and check that it is this environment's.

        RegistryError if it cannot be opened durably; RefusedChangeError if it belongs to another one. Another
        agent leads: RegistryInUseError, or, with *on_standby*, wait.
        """
        database = await Database.open(url, agent_id=agent_id, on_standby=on_standby)
        registry = cls(database, tenant_id=tenant_id, environment_id=environment_id, agent_id=agent_id)
        try:
            await registry._database.transact(lambda c: registry._establish(c, now_ms))
        except BaseException:
            await registry.close()
            raise
        return registry

    async def close(self) -> None:
        await self._database.close()

    @property
    def leads(self) -> bool:
        """Whether this agent's lease can be relied on at this moment: without it no key leaves."""
        return self._database.leads

    @property
    def term(self) -> int:
        """Fencing term of the lease."""
        return self._database.term

    @property
    def deposed(self) -> asyncio.Event:
        """Set when another agent has taken the registry over."""
        return self._database.deposed

    @property
    def returned(self) -> asyncio.Event:
        """Set when it works again after a failure: memory may differ from it. Whoever waits clears it."""
        return self._database.returned

    async def lease(self) -> Holding | None:
        return await self._database.read_lease()

    def _establish(self, c: Connection, now_ms: int) -> None:
        # Every EKM's binding names tenant and environment: under another name none would open.
        for table, mine in ((environment, self._environment), (tenant, self._tenant)):
            found = c.scalars(select(table.c.id)).all()
            if found and mine not in found:
                raise RefusedChangeError(
                    f"this registry belongs to {table.name} {', '.join(found)}, not to {mine}",
                    "correct agent.tenant and agent.environment_id, or use another registry",
                )
        times = {"created_at_ms": now_ms, "updated_at_ms": now_ms}
        if c.scalar(select(func.count()).select_from(environment)) == 0:
            c.execute(
                insert(environment).values(
                    id=self._environment, kms_type="pkcs11", state="active", state_since_ms=now_ms, **times
                )
            )
        if c.scalar(select(func.count()).select_from(tenant)) == 0:
            c.execute(insert(tenant).values(id=self._tenant, home_environment_id=self._environment, **times))

    # Reading.

    async def book(self) -> Book:
        return await self._database.transact(self._book)

    def _book(self, c: Connection) -> Book:
        services = c.scalars(
            select(network_service.c.id)
            .where(network_service.c.removed.is_(False))
            .order_by(network_service.c.id)
        )
        return Book(
            kek=self._current(c),
            services=tuple(NetworkService.parse(name) for name in services),
            proxies={row.id: proxy_row(row) for row in c.execute(select(proxy))},
            links=tuple(link_row(row) for row in c.execute(all_links())),
            sequences={
                NetworkService.parse(row.network_service_id): row.sequence
                for row in c.execute(select(push_sequence).where(push_sequence.c.issuer == self._agent))
            },
        )

    async def current_kek(self) -> KekRow | None:
        return await self._database.transact(self._current)

    async def keks(self) -> list[KekRow]:
        """Every KEK this environment ever had, oldest first."""
        return await self._database.transact(
            lambda c: [
                kek_row(row)
                for row in c.execute(
                    select(kek).where(kek.c.environment_id == self._environment).order_by(kek.c.version)
                )
            ]
        )

    async def data_keys(self) -> list[DataKeyRow]:
        return await self._database.transact(self._data_keys)

    def _data_keys(self, c: Connection) -> list[DataKeyRow]:
        wraps: dict[str, list[str]] = {}
        waiting: dict[str, list[str]] = {}
        for row in c.execute(select(dek_wrap.c.dek_id, dek_wrap.c.kek_id, dek_wrap.c.state)):
            (wraps if row.state == VERIFIED else waiting).setdefault(row.dek_id, []).append(row.kek_id)
        rows = c.execute(
            select(dek, key_ring.c.network_service_id)
            .join(key_ring, dek.c.ring_id == key_ring.c.id)
            .order_by(key_ring.c.network_service_id, dek.c.key_type, dek.c.version)
        )
        return [
            DataKeyRow(
                owner=NetworkService.parse(row.network_service_id),
                key_id=KeyId.parse(row.id),
                version=row.version,
                state=KeyState(row.state),
                kcv=row.kcv,
                created_at_ms=row.created_at_ms,
                wrapped_by=tuple(sorted(wraps.get(row.id, ()))),
                waits_for=tuple(sorted(waiting.get(row.id, ()))),
                use=KeyUse(row.key_type),
                algorithm=row.alg,
                since_ms=row.state_since_ms,
                activated_at_ms=row.activated_at_ms,
                suspended_from=None if row.suspended_from is None else KeyState(row.suspended_from),
                reason=row.state_reason,
                after_sequence=row.after_sequence,
            )
            for row in rows
        ]

    async def wrapped_keys(self, kek_id: str) -> list[WrappedKey]:
        """Every sound wrap under one KEK, those too that came from a backup and wait for their KEK."""
        return await self._database.transact(
            lambda c: [
                wrapped_key(row)
                for row in c.execute(self._wraps(kek_id).where(dek.c.state != KeyState.DESTROYED))
                if is_sound(row)
            ]
        )

    # KEKs.

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
        self, made: Kek, keys: Sequence[WrappedKey], *, now_ms: int, patience: Patience = _AT_ONCE
    ) -> None:
        """The KEK is made, and *keys* under it: it becomes the current one and they the active ones.

        A KEK before it, which must not work any more, is deactivated; its wraps stay. A service that several
        proxies host gets its new key in two phases, unless there is no *patience*.
        """
        two_phases_from = 2 if patience.unserved_ms else _NEVER

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

    # Network services and proxies.

    async def add_proxy(self, target: Proxy, *, now_ms: int) -> bool:
        """Add it, or change the address or authority of a known one. True if it is new."""

        def work(c: Connection) -> bool:
            values = {"url": target.url, "ca_pem": target.ca_pem, "removed": False, "updated_at_ms": now_ms}
            known = c.execute(select(proxy).where(proxy.c.id == target.id)).one_or_none()
            if known is None:
                c.execute(insert(proxy).values(id=target.id, created_at_ms=now_ms, **values))
                return True
            c.execute(update(proxy).where(proxy.c.id == target.id).values(**values))
            return bool(known.removed)

        return await self._database.transact(work)

    async def remove_proxy(self, proxy_id: str, *, now_ms: int) -> list[NetworkService]:
        """No more keys go there. The services it hosted. RefusedChangeError if it is unknown."""

        def work(c: Connection) -> list[NetworkService]:
            self._require_proxy(c, proxy_id)
            c.execute(update(proxy).where(proxy.c.id == proxy_id).values(removed=True, updated_at_ms=now_ms))
            mine = and_(service_proxy.c.proxy_id == proxy_id, service_proxy.c.withdrawn.is_(False))
            hosted = c.scalars(select(service_proxy.c.network_service_id).where(mine)).all()
            c.execute(update(service_proxy).where(mine).values(withdrawn=True, updated_at_ms=now_ms))
            return [NetworkService.parse(name) for name in sorted(hosted)]

        return await self._database.transact(work)

    def _require_proxy(self, c: Connection, proxy_id: str) -> Row[Any]:
        row = c.execute(select(proxy).where(proxy.c.id == proxy_id, proxy.c.removed.is_(False))).one_or_none()
        if row is None:
            raise RefusedChangeError(
                f"no proxy {proxy_id!r}", "`key-agent proxy list` shows them, `key-agent proxy add` adds one"
            )
        return row

    async def has_active_key(self, owner: NetworkService, use: KeyUse = KeyUse.DATA) -> bool:
        """An active key under the current KEK, or one on its way: a further proxy then needs no new one."""

        def work(c: Connection) -> bool:
            current = self._current(c)
            if current is None:
                return False
            query = self._verified_wraps(current.reference.kek_id).where(
                key_ring.c.network_service_id == str(owner), dek.c.key_type == use
            )
            states = {KeyState(row.state) for row in c.execute(query)}
            is_coming = any(
                rotation.owner == owner and rotation.use is use
                for rotation in self._rotations(c, is_open=True)
            )
            return KeyState.ACTIVE in states or (KeyState.PRE_ACTIVE in states and is_coming)

        return await self._database.transact(work)

    async def add_service(
        self,
        owner: NetworkService,
        *,
        proxy_id: str,
        certificate_pem: str,
        key: WrappedKey | None,
        now_ms: int,
        patience: Patience = _AT_ONCE,
    ) -> str | None:
        """The service is hosted by that proxy under that certificate; *key* becomes its active one.

        In two phases if several proxies host it, unless there is no *patience*; then the rotation's id.
        """

        def work(c: Connection) -> str | None:
            self._require_proxy(c, proxy_id)
            times = {"created_at_ms": now_ms, "updated_at_ms": now_ms}
            if c.execute(select(network_service).where(network_service.c.id == str(owner))).first() is None:
                c.execute(
                    insert(network_service).values(
                        id=str(owner), tenant_id=owner.tenant, name=owner.service, removed=False, **times
                    )
                )
            else:
                c.execute(
                    update(network_service)
                    .where(network_service.c.id == str(owner))
                    .values(removed=False, updated_at_ms=now_ms)
                )
            place = place_of(owner, proxy_id)
            values = {"certificate_pem": certificate_pem, "withdrawn": False}
            if c.execute(select(service_proxy.c.proxy_id).where(place)).first() is None:
                c.execute(
                    insert(service_proxy).values(
                        network_service_id=str(owner),
                        proxy_id=proxy_id,
                        issued_sequence=0,
                        issued_until_ms=0,
                        accepted_sequence=0,
                        withdrawn_sequence=0,
                        **values,
                        **times,
                    )
                )
            else:
                c.execute(update(service_proxy).where(place).values(updated_at_ms=now_ms, **values))
            if key is None:
                return None
            return self._place_key(
                c,
                key,
                now_ms,
                cause=RotationCause.LOST,
                patience=patience,
                two_phases_from=2 if patience.unserved_ms else _NEVER,
            )

        return await self._database.transact(work)

    async def remove_service(
        self, owner: NetworkService, *, proxy_id: str | None = None, now_ms: int
    ) -> list[str]:
        """From one proxy; or altogether: its wrapped keys are erased and its objects unreadable for ever.

        The proxies that hosted it. RefusedChangeError if it is unknown.
        """

        def work(c: Connection) -> list[str]:
            mine = and_(
                service_proxy.c.network_service_id == str(owner), service_proxy.c.withdrawn.is_(False)
            )
            if proxy_id is not None:
                mine = and_(mine, service_proxy.c.proxy_id == proxy_id)
            hosts = sorted(c.scalars(select(service_proxy.c.proxy_id).where(mine)))
            known = c.execute(
                select(network_service).where(
                    network_service.c.id == str(owner), network_service.c.removed.is_(False)
                )
            ).first()
            if known is None or (proxy_id is not None and not hosts):
                where = "" if proxy_id is None else f" at proxy {proxy_id!r}"
                raise RefusedChangeError(
                    f"no network service {owner}{where}", "`key-agent service list` shows them"
                )
            c.execute(update(service_proxy).where(mine).values(withdrawn=True, updated_at_ms=now_ms))
            if proxy_id is None:
                self._erase_keys(c, owner, now_ms)
                c.execute(
                    update(network_service)
                    .where(network_service.c.id == str(owner))
                    .values(removed=True, updated_at_ms=now_ms)
                )
            return hosts

        return await self._database.transact(work)

    def _erase_keys(self, c: Connection, owner: NetworkService, now_ms: int) -> None:
        for rotation in self._rotations(c, is_open=True):
            if rotation.owner == owner:
                self._give_up(c, rotation, now_ms)
        rows = c.scalars(
            select(dek.c.id)
            .join(key_ring, dek.c.ring_id == key_ring.c.id)
            .where(key_ring.c.network_service_id == str(owner), dek.c.state != KeyState.DESTROYED)
        ).all()
        for key_id in rows:
            self._destroy_key(c, key_id, now_ms)

    # Pushing.

    async def reserve(
        self,
        owners: Iterable[NetworkService],
        proxy_ids: Iterable[str],
        *,
        now_ms: int,
        until_ms: int,
    ) -> tuple[Kek, list[Reservation]]:
        """Spend a sequence per service and note what those proxies may hold until *until_ms*; then keys may
        leave.

        Services without a link to one of the proxies, or without a key, are left out. RefusedChangeError
        unless the current KEK is active.
        """
        names, places = sorted(map(str, owners)), sorted(proxy_ids)

        def work(c: Connection) -> tuple[Kek, list[Reservation]]:
            current = self._current(c)
            if current is None or current.kek is None or current.state is not KekState.ACTIVE:
                state = "missing" if current is None else current.state
                raise RefusedChangeError(f"no keys leave: the KEK is {state}", "see `key-agent status`")
            links = self._links_by_owner(c, names, places)
            rows: dict[str, list[Row[Any]]] = {}
            for row in c.execute(
                self._verified_wraps(current.reference.kek_id)
                .where(key_ring.c.network_service_id.in_(names))
                .order_by(dek.c.key_type, dek.c.version)
            ):
                rows.setdefault(row.network_service_id, []).append(row)
            tombstones = self._tombstones(c, names)
            for name in tombstones:
                rows.setdefault(name, [])
            wanted = [name for name in names if name in rows and name in links]
            sequences = self._spend_sequences(c, wanted, lambda _, stored: max(stored + 1, now_ms))
            issued = [
                {"b_service": name, "b_proxy": link.proxy_id, "b_sequence": sequences[name]}
                for name in wanted
                for link in links[name]
            ]
            if issued:
                c.execute(_ISSUED, [row | {"b_until_ms": until_ms} for row in issued])
            made = [
                _reservation(
                    name,
                    sequences[name],
                    rows=rows[name],
                    links=links[name],
                    present=self.presenter,
                    tombstones=[_tombstone(row, current.kek) for row in tombstones.get(name, ())],
                )
                for name in wanted
            ]
            return current.kek, made

        return await self._database.transact(work)

    def _tombstones(self, c: Connection, names: list[str]) -> dict[str, list[Any]]:
        """The newest destroyed keys of each service."""
        found: dict[str, list[Any]] = {}
        query = (
            select(
                dek.c.id,
                dek.c.kcv,
                dek.c.key_type,
                dek.c.alg,
                dek.c.version,
                dek.c.created_at_ms,
                key_ring.c.network_service_id,
            )
            .join(key_ring, dek.c.ring_id == key_ring.c.id)
            # One that never was active is in no object.
            .where(
                key_ring.c.network_service_id.in_(names),
                dek.c.state == KeyState.DESTROYED,
                dek.c.activated_at_ms.is_not(None),
            )
            .order_by(dek.c.state_since_ms.desc(), dek.c.id)
        )
        for row in c.execute(query):
            mine = found.setdefault(row.network_service_id, [])
            if len(mine) < MAX_TOMBSTONES:
                mine.append(row)
        return found

    def _links_by_owner(self, c: Connection, names: list[str], places: list[str]) -> dict[str, list[Link]]:
        links: dict[str, list[Link]] = {}
        query = (
            all_links()
            .join(proxy, proxy.c.id == service_proxy.c.proxy_id)
            .join(network_service, network_service.c.id == service_proxy.c.network_service_id)
            .where(
                service_proxy.c.network_service_id.in_(names),
                service_proxy.c.proxy_id.in_(places),
                service_proxy.c.withdrawn.is_(False),
                proxy.c.removed.is_(False),
                network_service.c.removed.is_(False),
            )
        )
        for row in c.execute(query):
            links.setdefault(row.network_service_id, []).append(link_row(row))
        return links

    async def spend_sequences(self, sequences: Mapping[NetworkService, int]) -> None:
        """Note the sequences of withdrawals. They are above all known ones; a lower one changes nothing."""
        wanted = {str(owner): sequence for owner, sequence in sequences.items()}
        await self._database.transact(
            lambda c: self._spend_sequences(c, list(wanted), lambda name, stored: max(stored, wanted[name]))
        )

    def _spend_sequences(
        self, c: Connection, names: Sequence[str], choose: Callable[[str, int], int]
    ) -> dict[str, int]:
        """Store what *choose* makes of each name and the sequence stored for it (0 for none)."""
        mine = and_(push_sequence.c.issuer == self._agent, push_sequence.c.network_service_id.in_(names))
        stored = {
            row.network_service_id: row.sequence for row in c.execute(select(push_sequence).where(mine))
        }
        chosen = {name: choose(name, stored.get(name, 0)) for name in names}
        for name, sequence in chosen.items():
            if sequence > MAX_SEQUENCE:
                raise RefusedChangeError(
                    f"{name}: sequence {sequence} is too high", "set the clock of this machine"
                )
        rows = [
            {"b_issuer": self._agent, "b_service": name, "b_sequence": sequence}
            for name, sequence in chosen.items()
        ]
        for statement, part in (
            (_SEQUENCE_UPDATE, [row for row in rows if row["b_service"] in stored]),
            (_SEQUENCE_INSERT, [row for row in rows if row["b_service"] not in stored]),
        ):
            if part:
                c.execute(statement, part)
        return chosen

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        """What the proxies answered. An older receipt never overwrites a newer one."""

        def work(c: Connection) -> None:
            for statement, part in (
                (_REFUSED, [receipt for receipt in receipts if not receipt.accepted]),
                (_KEYS_ACCEPTED, [receipt for receipt in receipts if receipt.accepted and receipt.keys]),
                (_WITHDRAWAL_ACCEPTED, [r for r in receipts if r.accepted and not r.keys]),
            ):
                if part:
                    c.execute(statement, [_receipt_row(receipt) for receipt in part])

        await self._database.transact(work)


def _hsm_name(label: str, object_id: bytes) -> str:
    """Equal for two that a token or a key server, which knows no ids, could take for one."""
    return f"{label}-{bytes(object_id).hex()}".rstrip("-")


def _reservation(
    name: str,
    sequence: int,
    *,
    rows: list[Row[Any]],
    links: list[Link],
    tombstones: list[tuple[WrappedKey, KeyState]],
    present: Presenter | None,
) -> Reservation:
    states = {row.id: KeyState(row.state) for row in rows}
    if present is not None:
        states |= present(name, [_held_key(row) for row in rows if is_sound(row)])
    sound = [(wrapped_key(row), states[row.id]) for row in rows if is_sound(row)]
    # Tombstones alone would take a service's keys back: they do so only if there are no others.
    keys = [*sound, *tombstones] if sound or not rows else []
    return Reservation(
        owner=NetworkService.parse(name),
        sequence=sequence,
        keys=tuple(keys),
        damaged=tuple(KeyId.parse(row.id) for row in rows if not is_sound(row)),
        links=tuple(links),
    )


def _held_key(row: Row[Any]) -> HeldKey:
    return HeldKey(
        key_id=row.id, ring=row.ring_id, owner_environment=row.owner_environment_id, state=KeyState(row.state)
    )


def _tombstone(row: Row[Any], current: Kek) -> tuple[WrappedKey, KeyState]:
    """A destroyed key: its name travels, there is nothing else of it."""
    key = WrappedKey(
        owner=NetworkService.parse(row.network_service_id),
        key_id=KeyId.parse(row.id),
        kek_id=current.reference.kek_id,
        environment_id=current.reference.environment_id,
        method=current.method,
        wrapped=b"",
        kcv=bytes(row.kcv),
        token_serial=current.token_serial,
        created_at_ms=row.created_at_ms,
        use=KeyUse(row.key_type),
        algorithm=row.alg,
        version=row.version,
    )
    return key, KeyState.DESTROYED


# Statements for many rows at once; their parameters are `b_...`.

_PLACE: Final = and_(
    service_proxy.c.network_service_id == bindparam("b_service"),
    service_proxy.c.proxy_id == bindparam("b_proxy"),
)
_ISSUED: Final = (
    update(service_proxy)
    .where(_PLACE)
    .values(issued_sequence=bindparam("b_sequence"), issued_until_ms=bindparam("b_until_ms"))
)
_SEQUENCE_UPDATE: Final = (
    update(push_sequence)
    .where(
        push_sequence.c.issuer == bindparam("b_issuer"),
        push_sequence.c.network_service_id == bindparam("b_service"),
    )
    .values(sequence=bindparam("b_sequence"))
)
_SEQUENCE_INSERT: Final = insert(push_sequence).values(
    issuer=bindparam("b_issuer"),
    network_service_id=bindparam("b_service"),
    sequence=bindparam("b_sequence"),
)
_NO_ERROR: Final = {"error": None, "error_at_ms": None}
_REFUSED: Final = (
    update(service_proxy)
    .where(_PLACE)
    .values(error=bindparam("b_error"), error_at_ms=bindparam("b_at_ms"), updated_at_ms=bindparam("b_at_ms"))
)
_KEYS_ACCEPTED: Final = (
    update(service_proxy)
    .where(_PLACE, service_proxy.c.accepted_sequence < bindparam("b_sequence"))
    .values(
        accepted_sequence=bindparam("b_sequence"),
        accepted_at_ms=bindparam("b_at_ms"),
        valid_until_ms=bindparam("b_until_ms"),
        updated_at_ms=bindparam("b_at_ms"),
        **_NO_ERROR,
    )
)
_WITHDRAWAL_ACCEPTED: Final = (
    update(service_proxy)
    .where(_PLACE, service_proxy.c.withdrawn_sequence < bindparam("b_sequence"))
    .values(
        withdrawn_sequence=bindparam("b_sequence"),
        withdrawn_at_ms=bindparam("b_at_ms"),
        valid_until_ms=None,
        updated_at_ms=bindparam("b_at_ms"),
        **_NO_ERROR,
    )
)


def _receipt_row(receipt: Receipt) -> dict[str, object]:
    return {
        "b_service": str(receipt.owner),
        "b_proxy": receipt.proxy_id,
        "b_sequence": receipt.sequence,
        "b_at_ms": receipt.at_ms,
        "b_until_ms": receipt.valid_until_ms,
        "b_error": receipt.error,
    }
