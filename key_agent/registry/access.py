"""What all of the registry's SQL shares: keys, wraps and rings written, rotations, the KEK of today.

1. Methods that take a `Connection` are parts of the caller's transaction.
2. A wrap counts, and travels, only once the HSM has opened it (`verified`). One from a backup whose KEK is
   not there waits as `stored`.
3. A key's first state depends on who would have to know it: `active` if nobody seals or opens yet, else
   `pre-active` with a rotation that carries it through both phases.
"""

import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Connection, Select, and_, delete, func, insert, select, update

from envelope.keys import TRANSITIONS, KeyState, KeyUse, NetworkService
from key_agent.errors import KeyAgentError
from key_agent.registry.database import Database
from key_agent.registry.model import KekRow, Patience, Rotation, RotationCause
from key_agent.registry.rows import EKM_FORMAT, PURPOSE, kek_row, rotation_row
from key_agent.registry.states import ROTATION_TRANSITIONS, KekState, RotationPhase, check_transition
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    kek,
    key_ring,
    key_rotation,
    network_service,
    proxy,
    push_sequence,
    service_proxy,
)
from key_agent.sources.source import WrappedKey

VERIFIED: Final = "verified"
STORED: Final = "stored"
# States that a newer KEK does not share a table with: see the index one_current_kek.
NOT_CURRENT: Final = (KekState.PRE_ACTIVE, KekState.STAGED, KekState.DEACTIVATED, KekState.RETIRED)
_NEVER: Final = 1 << 30


class RefusedChangeError(KeyAgentError):
    """The registry's content forbids this change; the text names the cause, `next_step` the way out."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.next_step = next_step


class RegistryAccess:
    def __init__(self, database: Database, *, tenant_id: str, environment_id: str, agent_id: str) -> None:
        self._database = database
        self._tenant = tenant_id
        self._environment = environment_id
        self._agent = agent_id

    @property
    def tenant_id(self) -> str:
        return self._tenant

    @property
    def environment_id(self) -> str:
        return self._environment

    @property
    def agent_id(self) -> str:
        return self._agent

    async def transact[T](self, work: Callable[[Connection], T]) -> T:
        """For what has tables of its own in this database (key_agent/environments): one transaction of it."""
        return await self._database.transact(work)

    # KEKs.

    def _my_keks(self) -> Select[Any]:
        return select(kek).where(kek.c.environment_id == self._environment)

    def _current(self, c: Connection) -> KekRow | None:
        row = c.execute(self._my_keks().where(kek.c.state.not_in(NOT_CURRENT))).one_or_none()
        return None if row is None else kek_row(row)

    def _active_kek(self, c: Connection) -> KekRow:
        """RefusedChangeError unless the KEK of today is active."""
        current = self._current(c)
        if current is None or current.state is not KekState.ACTIVE:
            state = "missing" if current is None else current.state
            raise RefusedChangeError(f"the KEK is {state}", "see `key-agent kek status`")
        return current

    def _set_kek_state(
        self, c: Connection, row: KekRow, state: KekState, reason: str | None, now_ms: int
    ) -> None:
        check_transition(row.state, state)
        c.execute(
            update(kek)
            .where(kek.c.id == row.reference.kek_id)
            .values(state=state, state_reason=reason, state_since_ms=now_ms, updated_at_ms=now_ms)
        )

    def _wraps(self, kek_id: str) -> Select[Any]:
        """Keys with their wraps under one KEK, whatever their states."""
        return (
            select(
                dek.c.id,
                dek.c.state,
                dek.c.kcv,
                dek.c.key_type,
                dek.c.alg,
                dek.c.version,
                dek.c.ring_id,
                dek.c.owner_environment_id,
                key_ring.c.network_service_id,
                kek.c.environment_id,
                dek_wrap.c.kek_id,
                dek_wrap.c.format,
                dek_wrap.c.wrap_alg,
                dek_wrap.c.wrapped,
                dek_wrap.c.wrapped_sha256,
                dek_wrap.c.token_serial,
                dek_wrap.c.made_at_ms,
                dek_wrap.c.state.label("wrap_state"),
            )
            .select_from(dek)
            .join(dek_wrap, dek_wrap.c.dek_id == dek.c.id)
            .join(kek, kek.c.id == dek_wrap.c.kek_id)
            .join(key_ring, dek.c.ring_id == key_ring.c.id)
            .where(dek_wrap.c.kek_id == kek_id)
        )

    def _verified_wraps(self, kek_id: str) -> Select[Any]:
        return self._wraps(kek_id).where(dek_wrap.c.state == VERIFIED, dek.c.state != KeyState.DESTROYED)

    # Keys.

    def _place_key(
        self,
        c: Connection,
        key: WrappedKey,
        now_ms: int,
        *,
        cause: RotationCause,
        patience: Patience,
        two_phases_from: int,
    ) -> str | None:
        """A new key, in two phases if at least so many proxies host its service; the rotation's id.

        A rotation of the same ring that is still open ends here.
        """
        ring_id = self._ring(c, key.owner, key.use, now_ms)
        for rotation in self._rotations(c, ring_id=ring_id, is_open=True):
            self._give_up(c, rotation, now_ms)
        active = self._active_key(c, ring_id)
        if len(self._hosts(c, key.owner)) < two_phases_from:
            self._insert_key(c, key, ring_id, KeyState.ACTIVE, now_ms)
            return None
        self._insert_key(c, key, ring_id, KeyState.PRE_ACTIVE, now_ms)
        # What seals meanwhile: a key that is active and under the same KEK.
        is_served = active is not None and self._has_wrap(c, active, key.kek_id)
        rotation_id = os.urandom(16).hex()
        c.execute(
            insert(key_rotation).values(
                id=rotation_id,
                ring_id=ring_id,
                new_dek_id=str(key.key_id),
                old_dek_id=active,
                phase=RotationPhase.DISTRIBUTING,
                cause=cause,
                after_sequence=self._highest_sequence(c, key.owner),
                phase_since_ms=now_ms,
                phase_until_ms=now_ms + (patience.usual_ms if is_served else patience.unserved_ms),
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )
        return rotation_id

    def _insert_key(
        self, c: Connection, key: WrappedKey, ring_id: str, state: KeyState, now_ms: int, **fields: object
    ) -> None:
        """*state* `active`: the one before is deactivated."""
        if state is KeyState.ACTIVE and (before := self._active_key(c, ring_id)) is not None:
            # First, and flushed: the index one_active cannot be deferred.
            set_key_state(c, before, KeyState.ACTIVE, KeyState.DEACTIVATED, now_ms)
        last = c.execute(
            select(dek.c.id, dek.c.version)
            .where(dek.c.ring_id == ring_id)
            .order_by(dek.c.version.desc())
            .limit(1)
        ).first()
        values: dict[str, object] = {
            "id": str(key.key_id),
            "tenant_id": key.owner.tenant,
            "ring_id": ring_id,
            "owner_environment_id": self._environment,
            "generator_environment_id": self._environment,
            "key_type": key.use,
            "alg": key.algorithm,
            "version": 1 if last is None else last.version + 1,
            "state": state,
            "state_since_ms": now_ms,
            "activated_at_ms": now_ms if state is KeyState.ACTIVE else None,
            "after_sequence": self._highest_sequence(c, key.owner),
            "kcv": key.kcv,
            "predecessor_id": None if last is None else last.id,
            "created_at_ms": now_ms,
            "updated_at_ms": now_ms,
        }
        c.execute(insert(dek).values(**(values | fields)))
        insert_wrap(c, key, now_ms)

    def _active_key(self, c: Connection, ring_id: str) -> str | None:
        return c.scalar(select(dek.c.id).where(dek.c.ring_id == ring_id, dek.c.state == KeyState.ACTIVE))

    def _has_wrap(self, c: Connection, key_id: str, kek_id: str) -> bool:
        query = select(dek_wrap.c.dek_id).where(
            dek_wrap.c.dek_id == key_id, dek_wrap.c.kek_id == kek_id, dek_wrap.c.state == VERIFIED
        )
        return c.execute(query).first() is not None

    def _ring(self, c: Connection, owner: NetworkService, use: KeyUse, now_ms: int) -> str:
        found = c.scalar(
            select(key_ring.c.id).where(
                key_ring.c.network_service_id == str(owner), key_ring.c.purpose == PURPOSE[use]
            )
        )
        if found is not None:
            return str(found)
        ring_id = os.urandom(16).hex()
        c.execute(
            insert(key_ring).values(
                id=ring_id,
                tenant_id=owner.tenant,
                name=owner.service,
                purpose=PURPOSE[use],
                network_service_id=str(owner),
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )
        return ring_id

    def _destroy_key(self, c: Connection, key_id: str, now_ms: int) -> None:
        """The row stays as a tombstone: the key id is never used again."""
        state = KeyState(c.execute(select(dek.c.state).where(dek.c.id == key_id)).scalar_one())
        if KeyState.DESTROYED not in TRANSITIONS[state]:
            set_key_state(c, key_id, state, KeyState.DEACTIVATED, now_ms)
            state = KeyState.DEACTIVATED
        set_key_state(c, key_id, state, KeyState.DESTROYED, now_ms)
        c.execute(delete(dek_wrap).where(dek_wrap.c.dek_id == key_id))

    # Rotations.

    def _rotations(
        self,
        c: Connection,
        *,
        rotation_id: str | None = None,
        ring_id: str | None = None,
        is_open: bool = False,
    ) -> list[Rotation]:
        query = (
            select(key_rotation, key_ring.c.network_service_id, key_ring.c.purpose)
            .join(key_ring, key_ring.c.id == key_rotation.c.ring_id)
            .order_by(key_rotation.c.created_at_ms, key_rotation.c.id)
        )
        if rotation_id is not None:
            query = query.where(key_rotation.c.id == rotation_id)
        if ring_id is not None:
            query = query.where(key_rotation.c.ring_id == ring_id)
        if is_open:
            query = query.where(key_rotation.c.phase.in_([p for p in RotationPhase if p.is_open]))
        return [rotation_row(row) for row in c.execute(query)]

    def _give_up(self, c: Connection, rotation: Rotation, now_ms: int) -> None:
        """What is open ends: a key that never sealed is destroyed, one that did stays."""
        if rotation.phase is RotationPhase.DISTRIBUTING:
            self._destroy_key(c, str(rotation.new_key), now_ms)
            self._enter_phase(c, rotation, RotationPhase.CANCELLED, now_ms)
        else:
            self._enter_phase(c, rotation, RotationPhase.DONE, now_ms)

    def _enter_phase(
        self, c: Connection, rotation: Rotation, phase: RotationPhase, now_ms: int, **fields: object
    ) -> None:
        if phase not in ROTATION_TRANSITIONS[rotation.phase]:
            raise RefusedChangeError(
                f"the rotation of {rotation.owner} does not go from {rotation.phase} to {phase}",
                "`key-agent status` shows where it is",
            )
        c.execute(
            update(key_rotation)
            .where(key_rotation.c.id == rotation.id)
            .values(phase=phase, phase_since_ms=now_ms, updated_at_ms=now_ms, **fields)
        )

    # Services and proxies.

    def _hosts(self, c: Connection, owner: NetworkService) -> list[str]:
        """The proxies that keys of *owner* go to."""
        return list(
            c.scalars(
                select(service_proxy.c.proxy_id)
                .join(proxy, proxy.c.id == service_proxy.c.proxy_id)
                .where(
                    service_proxy.c.network_service_id == str(owner),
                    service_proxy.c.withdrawn.is_(False),
                    proxy.c.removed.is_(False),
                )
                .order_by(service_proxy.c.proxy_id)
            )
        )

    def _require_service(self, c: Connection, owner: NetworkService) -> None:
        query = select(network_service.c.id).where(
            network_service.c.id == str(owner), network_service.c.removed.is_(False)
        )
        if c.execute(query).first() is None:
            raise RefusedChangeError(f"no network service {owner}", "`key-agent service list` shows them")

    def _highest_sequence(self, c: Connection, owner: NetworkService) -> int:
        """Of all that was ever reserved for *owner*, by whichever agent: later ones are higher."""
        found = c.scalar(
            select(func.max(push_sequence.c.sequence)).where(push_sequence.c.network_service_id == str(owner))
        )
        return int(found or 0)


def hosts_worth_two_phases(patience: Patience) -> int:
    """As many proxies must host a service for its replaced key to come in two phases; no patience: never."""
    return 2 if patience.unserved_ms else _NEVER


def set_key_state(
    c: Connection, key_id: str, old: KeyState, new: KeyState, now_ms: int, **fields: object
) -> None:
    """RefusedChangeError unless the table of states allows it."""
    if new not in TRANSITIONS[old]:
        raise RefusedChangeError(
            f"key {key_id} does not go from {old} to {new}", "`key-agent key list` shows the states"
        )
    c.execute(
        update(dek)
        .where(dek.c.id == key_id)
        .values(state=new, state_since_ms=now_ms, updated_at_ms=now_ms, **fields)
    )


def insert_wrap(
    c: Connection, key: WrappedKey, now_ms: int, *, state: str = VERIFIED, route: str = "kms"
) -> None:
    """*state*: the source opened it again and compared before it returned it, if nothing else is said.

    *route*: `kms` where this environment's HSM made the key or the wrap for itself.
    """
    insert_wraps(c, [key], now_ms, state=state, route=route)


def insert_wraps(
    c: Connection, keys: Iterable[WrappedKey], now_ms: int, *, state: str = VERIFIED, route: str = "kms"
) -> None:
    """As `insert_wrap`, of many at once; one at least."""
    c.execute(
        insert(dek_wrap),
        [
            {
                "dek_id": str(key.key_id),
                "kek_id": key.kek_id,
                "format": EKM_FORMAT,
                "route": route,
                "wrap_alg": key.method,
                "wrapped": key.wrapped,
                "wrapped_sha256": sha256(key.wrapped).digest(),
                "token_serial": key.token_serial,
                "state": state,
                "made_at_ms": key.created_at_ms,
                "verified_at_ms": now_ms if state == VERIFIED else 0,
                "created_at_ms": now_ms,
                "updated_at_ms": now_ms,
            }
            for key in keys
        ],
    )


def all_links() -> Select[Any]:
    return select(service_proxy).order_by(service_proxy.c.network_service_id, service_proxy.c.proxy_id)


def place_of(owner: NetworkService, proxy_id: str) -> Any:
    return and_(service_proxy.c.network_service_id == str(owner), service_proxy.c.proxy_id == proxy_id)
