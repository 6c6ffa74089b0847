"""From shared rows to the registry's own tables: what refresh, push and status read.

1. Written in the transaction that writes the rows. What the tables say beyond them (wraps, proxies, links,
   receipts, the own KEK) is this environment's own and left alone.
2. Of one ring and owner at most one key is active, and the index that says so cannot be deferred: what stops
   being active is written before what becomes it.
3. A destroyed key keeps its row and loses its wraps, if it is one of those that may be erased.
4. `differences` says where the tables do not say what the rows do: somebody has edited one of the two.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from envelope.keys import KeyState, NetworkService
from key_agent.environments.documents import (
    Body,
    DekBody,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
)
from key_agent.registry.access import PURPOSE
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    environment,
    key_ring,
    network_service,
    push_sequence,
    service_proxy,
    tenant,
)

type Rows = Mapping[tuple[Kind, str], Body]

_OVERRULED: Final = 1_000_000_000
_UNSHARED: Final = frozenset({"created_at_ms", "updated_at_ms", "after_sequence"})


def project(c: Connection, changed: Rows, *, tenant_id: str, now_ms: int, may_erase: Collection[str]) -> None:
    """Write what *changed* means. Rows that are referred to come first. *may_erase*: rule 3."""
    by_kind: dict[Kind, dict[str, Any]] = {}
    for (kind, row_id), body in changed.items():
        by_kind.setdefault(kind, {})[row_id] = body
    for row_id, environment_body in by_kind.get(Kind.ENVIRONMENT, {}).items():
        _put(c, environment, row_id, _environment(environment_body), now_ms)
    for row_id, tenant_body in by_kind.get(Kind.TENANT, {}).items():
        if row_id == tenant_id and _exists(c, environment, tenant_body.home_environment):
            _put(c, tenant, row_id, _tenant(tenant_body), now_ms)
    for row_id, service_body in by_kind.get(Kind.SERVICE, {}).items():
        _put(c, network_service, row_id, _service(row_id, service_body), now_ms)
        if service_body.removed:
            # Its places are this environment's own: with the service they end here too.
            place = service_proxy.c.network_service_id == row_id
            c.execute(update(service_proxy).where(place).values(withdrawn=True, updated_at_ms=now_ms))
    for row_id, ring_body in by_kind.get(Kind.RING, {}).items():
        _put(c, key_ring, row_id, _ring(ring_body), now_ms)
    keys: dict[str, DekBody] = by_kind.get(Kind.DEK, {})
    for row_id, key in sorted(keys.items(), key=lambda item: (_is_active(item[1]), item[1].version, item[0])):
        _put_key(c, row_id, key, now_ms)
        if key.state is KeyState.DESTROYED and row_id in may_erase:
            c.execute(delete(dek_wrap).where(dek_wrap.c.dek_id == row_id))


def clear(c: Connection, gone: Iterable[tuple[Kind, str]], *, now_ms: int) -> None:
    """Rows of a history that was overruled: their keys may not be used; nothing that was stored is lost."""
    for kind, row_id in gone:
        if kind is Kind.DEK:
            c.execute(
                update(dek)
                .where(dek.c.id == row_id, dek.c.state.not_in((KeyState.COMPROMISED, KeyState.DESTROYED)))
                .values(
                    state=KeyState.DEACTIVATED,
                    state_reason="made under a manager that another one has overruled",
                    state_since_ms=now_ms,
                    updated_at_ms=now_ms,
                )
            )
            # The other history may have given its number to another key.
            c.execute(
                update(dek)
                .where(dek.c.id == row_id, dek.c.version < _OVERRULED)
                .values(version=dek.c.version + _OVERRULED)
            )
        elif kind is Kind.SERVICE:
            c.execute(
                update(network_service)
                .where(network_service.c.id == row_id)
                .values(removed=True, updated_at_ms=now_ms)
            )


def differences(c: Connection, rows: Rows, *, tenant_id: str) -> list[str]:
    """`table id: column` where the tables do not say what *rows* do."""
    found: list[str] = []
    for table, wanted in _wanted(rows, tenant_id).items():
        stored = {row.id: row._mapping for row in c.execute(select(table))}  # noqa: SLF001 - SQLAlchemy's name
        for row_id, values in wanted.items():
            if (row := stored.get(row_id)) is None:
                found.append(f"{table.name} {row_id}: missing")
                continue
            found += [
                f"{table.name} {row_id}: {column}"
                for column, value in values.items()
                if column not in _UNSHARED and not _same(column, row[column], value, stored)
            ]
    return found


def _wanted(rows: Rows, tenant_id: str) -> dict[Table, dict[str, dict[str, object]]]:
    wanted: dict[Table, dict[str, dict[str, object]]] = {
        environment: {},
        network_service: {},
        key_ring: {},
        dek: {},
    }
    for (_, row_id), body in rows.items():
        match body:
            case EnvironmentBody():
                wanted[environment][row_id] = _environment(body)
            case TenantBody() if row_id == tenant_id:
                wanted[tenant] = {row_id: _tenant(body)}
            case ServiceBody():
                wanted[network_service][row_id] = _service(row_id, body)
            case RingBody():
                wanted[key_ring][row_id] = _ring(body)
            case DekBody():
                wanted[dek][row_id] = _key(body)
            case _:
                pass
    return wanted


def _same(column: str, stored: object, wanted: object, known: Mapping[str, object]) -> bool:
    if column == "predecessor_id" and wanted not in known:
        return stored is None
    return bool(stored == wanted)


def _exists(c: Connection, table: Table, row_id: str) -> bool:
    return c.execute(select(table.c.id).where(table.c.id == row_id)).first() is not None


def _put(c: Connection, table: Table, row_id: str, values: Mapping[str, object], now_ms: int) -> None:
    changed = c.execute(update(table).where(table.c.id == row_id).values(**values, updated_at_ms=now_ms))
    if changed.rowcount == 0:
        c.execute(insert(table).values(id=row_id, **values, created_at_ms=now_ms, updated_at_ms=now_ms))


def _put_key(c: Connection, row_id: str, key: DekBody, now_ms: int) -> None:
    values = _key(key)
    if key.predecessor is not None and not _exists(c, dek, key.predecessor):
        values["predecessor_id"] = None
    # Proxies know of this state once they acknowledge an envelope with a higher sequence than any so far.
    values["after_sequence"] = int(
        c.scalar(
            select(func.max(push_sequence.c.sequence)).where(
                push_sequence.c.network_service_id == key.service
            )
        )
        or 0
    )
    before = c.scalar(select(dek.c.state).where(dek.c.id == row_id))
    if before == key.state:
        del values["after_sequence"]
    if before is None:
        c.execute(
            insert(dek).values(id=row_id, **values, created_at_ms=key.created_at_ms, updated_at_ms=now_ms)
        )
    else:
        c.execute(update(dek).where(dek.c.id == row_id).values(**values, updated_at_ms=now_ms))


def _is_active(key: DekBody) -> bool:
    return key.state is KeyState.ACTIVE


def _environment(body: EnvironmentBody) -> dict[str, object]:
    return {
        "kms_type": (body.kms_type or "unknown")[:32],
        "state": body.state.value,
        "state_reason": body.reason,
        "state_since_ms": body.since_ms,
    }


def _tenant(body: TenantBody) -> dict[str, object]:
    return {"home_environment_id": body.home_environment}


def _service(row_id: str, body: ServiceBody) -> dict[str, object]:
    owner = NetworkService.parse(row_id)
    return {
        "tenant_id": owner.tenant,
        "name": owner.service,
        "removed": body.removed,
        "rotate_after_days": body.rotate_after_days,
    }


def _ring(body: RingBody) -> dict[str, object]:
    owner = NetworkService.parse(body.service)
    return {
        "tenant_id": owner.tenant,
        "name": owner.service,
        "purpose": PURPOSE[body.use],
        "network_service_id": body.service,
    }


def _key(key: DekBody) -> dict[str, object]:
    return {
        "tenant_id": NetworkService.parse(key.service).tenant,
        "ring_id": key.ring,
        "owner_environment_id": key.owner_environment,
        "generator_environment_id": key.generator_environment,
        "key_type": key.use.value,
        "alg": key.algorithm,
        "version": key.version,
        "state": key.state.value,
        "state_reason": key.reason,
        "state_since_ms": key.since_ms,
        "activated_at_ms": key.activated_at_ms,
        "suspended_from": None if key.suspended_from is None else key.suspended_from.value,
        "kcv": bytes.fromhex(key.kcv),
        "predecessor_id": key.predecessor,
    }
