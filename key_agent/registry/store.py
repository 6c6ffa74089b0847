"""The agent's registry, whole: opened under its lease, and read.

1. Every method is one transaction; when it returns, it is on disk. (`Book` and rows are values, not live
   objects.)
2. A registry belongs to one tenant and one environment, and to the one agent that holds its lease.
3. What is written is written by its rooms: KEKs (`kek_life.py`, `kek_succession.py`), keys (`key_life.py`),
   proxies and services (`provisioning.py`), pushes (`pushes.py`), backups (`archiving.py`). What they share
   is in `access.py`, and rows are read as values in `rows.py`.
"""

import asyncio
from typing import Self

from sqlalchemy import Connection, func, insert, select

from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.registry.access import VERIFIED, RefusedChangeError, all_links
from key_agent.registry.archiving import Archives
from key_agent.registry.database import Database, OnStandby
from key_agent.registry.kek_life import KekLife
from key_agent.registry.kek_succession import KekSuccession
from key_agent.registry.key_life import KeyLife
from key_agent.registry.lease import Holding
from key_agent.registry.model import Book, DataKeyRow, KekRow
from key_agent.registry.provisioning import Provisioning
from key_agent.registry.pushes import Pushes
from key_agent.registry.rows import is_sound, kek_row, link_row, proxy_row, wrapped_key
from key_agent.registry.states import KekState
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    environment,
    kek,
    key_ring,
    network_service,
    proxy,
    push_sequence,
    tenant,
)
from key_agent.sources.source import Kek, WrappedKey

__all__ = ["RefusedChangeError", "Registry"]


class Registry(KekLife, KekSuccession, KeyLife, Provisioning, Pushes, Archives):
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

    async def active_kek(self) -> Kek:
        """RefusedChangeError unless the KEK of today is active."""
        row = await self.current_kek()
        if row is None or row.kek is None or row.state is not KekState.ACTIVE:
            state = "missing" if row is None else row.state
            raise RefusedChangeError(f"the KEK is {state}", "see `key-agent kek status`")
        return row.kek

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
