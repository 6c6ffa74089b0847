"""Which proxies there are, which network services each of them hosts, and what ends with a service.

1. What is removed keeps its row: withdrawals may still have to go there.
2. A service that is removed altogether takes its keys along: their wraps are erased, open rotations given up.
3. A further proxy needs no new key: the one that is active, or on its way to the proxies, goes there too.
"""

from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.registry.access import (
    RefusedChangeError,
    RegistryAccess,
    hosts_worth_two_phases,
    place_of,
)
from key_agent.registry.model import AT_ONCE, Patience, Proxy, RotationCause
from key_agent.registry.tables import dek, key_ring, network_service, proxy, service_proxy
from key_agent.sources.source import WrappedKey


class Provisioning(RegistryAccess):
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
        patience: Patience = AT_ONCE,
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
                two_phases_from=hosts_worth_two_phases(patience),
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
