"""From shared rows to the registry's own tables: what refresh, push and status read.

1. Written in the transaction that writes the rows. What the tables say beyond them (wraps, proxies, links,
   receipts, the own KEK) is this environment's own and left alone.
2. Of one ring and owner at most one key is active, and the index that says so cannot be deferred: what stops
   being active is written before what becomes it.
3. A destroyed key keeps its row and loses its wraps, if it is one of those that may be erased.
4. `differences` says where the tables do not say what the rows do: somebody has edited one of the two.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import batched
from typing import Any, Final

from sqlalchemy import Column, Connection, Row, Table, bindparam, delete, insert, select, update

from envelope.keys import KeyState, NetworkService
from key_agent.environments.shared.documents import (
    Body,
    DekBody,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
)
from key_agent.registry.rows import PURPOSE
from key_agent.registry.tables import (
    dek,
    dek_wrap,
    environment,
    key_ring,
    network_service,
    service_proxy,
    tenant,
)
from key_agent.registry.wrap_rows import highest_sequences

type Rows = Mapping[tuple[Kind, str], Body]

_AT_ONCE: Final = 500
_OVERRULED: Final = 1_000_000_000
_UNSHARED: Final = frozenset({"created_at_ms", "updated_at_ms", "after_sequence"})


def project(c: Connection, changed: Rows, *, tenant_id: str, now_ms: int, may_erase: Collection[str]) -> None:
    """Write what *changed* means. Rows that are referred to come first. *may_erase*: rule 3."""
    by_kind: dict[Kind, dict[str, Any]] = {}
    for (kind, row_id), body in changed.items():
        by_kind.setdefault(kind, {})[row_id] = body
    environments: dict[str, EnvironmentBody] = by_kind.get(Kind.ENVIRONMENT, {})
    _put(c, environment, {row_id: _environment(body) for row_id, body in environments.items()}, now_ms)
    for row_id, tenant_body in by_kind.get(Kind.TENANT, {}).items():
        if row_id == tenant_id and _exists(c, environment, tenant_body.home_environment):
            _put(c, tenant, {row_id: _tenant(tenant_body)}, now_ms)
    services: dict[str, ServiceBody] = by_kind.get(Kind.SERVICE, {})
    _put(c, network_service, {row_id: _service(row_id, body) for row_id, body in services.items()}, now_ms)
    for row_id, service_body in services.items():
        if service_body.removed:
            # Its places are this environment's own: with the service they end here too.
            place = service_proxy.c.network_service_id == row_id
            c.execute(update(service_proxy).where(place).values(withdrawn=True, updated_at_ms=now_ms))
    rings: dict[str, RingBody] = by_kind.get(Kind.RING, {})
    _put(c, key_ring, {row_id: _ring(body) for row_id, body in rings.items()}, now_ms)
    keys: dict[str, DekBody] = by_kind.get(Kind.DEK, {})
    _put_keys(c, keys, now_ms)
    for row_id, key in keys.items():
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


def _put(c: Connection, table: Table, rows: Mapping[str, Mapping[str, object]], now_ms: int) -> None:
    """By id; all of *rows* have the same columns."""
    there = {row_id for (row_id,) in _select(c, rows, table.c.id, table.c.id)}
    known = {row_id: values for row_id, values in rows.items() if row_id in there}
    _update(c, table, known, now_ms)
    _insert(
        c,
        table,
        {
            row_id: {**values, "created_at_ms": now_ms}
            for row_id, values in rows.items()
            if row_id not in there
        },
        now_ms,
    )


def _put_keys(c: Connection, keys: Mapping[str, DekBody], now_ms: int) -> None:
    """Rule 2: keys that are active come after all that are not."""
    states = {row.id: row.state for row in _select(c, keys, dek.c.id, dek.c.id, dek.c.state)}
    predecessors = {key.predecessor for key in keys.values() if key.predecessor is not None}
    there = {row_id for (row_id,) in _select(c, predecessors, dek.c.id, dek.c.id)}
    # Proxies know of this state once they acknowledge an envelope with a higher sequence than any so far.
    sequences = highest_sequences(c, {key.service for key in keys.values()})
    for is_active in (False, True):
        some = {row_id: key for row_id, key in _by_version(keys) if _is_active(key) is is_active}
        values = {row_id: _key(key) for row_id, key in some.items()}
        for row_id, key in some.items():
            if key.predecessor not in there:
                values[row_id]["predecessor_id"] = None  # below, if it comes with these
            if states.get(row_id) != key.state:
                values[row_id]["after_sequence"] = sequences[key.service]
        same = {row_id: values[row_id] for row_id, key in some.items() if states.get(row_id) == key.state}
        changed = {row_id: values[row_id] for row_id in some if row_id in states and row_id not in same}
        new = {
            row_id: values[row_id] | {"created_at_ms": key.created_at_ms}
            for row_id, key in some.items()
            if row_id not in states
        }
        _update(c, dek, same, now_ms)
        _update(c, dek, changed, now_ms)
        _insert(c, dek, new, now_ms)
    late = {
        row_id: {"predecessor_id": key.predecessor}
        for row_id, key in keys.items()
        if key.predecessor not in there and key.predecessor in keys
    }
    _update(c, dek, late, now_ms)


def _by_version(keys: Mapping[str, DekBody]) -> list[tuple[str, DekBody]]:
    return sorted(keys.items(), key=lambda item: (item[1].version, item[0]))


def _select(c: Connection, wanted: Iterable[str], at: Column[Any], *columns: Column[Any]) -> list[Row[Any]]:
    """*columns* where *at* is one of *wanted*."""
    return [
        row
        for some in batched(sorted(wanted), _AT_ONCE)
        for row in c.execute(select(*columns).where(at.in_(some)))
    ]


def _update(c: Connection, table: Table, rows: Mapping[str, Mapping[str, object]], now_ms: int) -> None:
    """All of *rows* have the same columns."""
    if not rows:
        return
    columns = [*next(iter(rows.values())), "updated_at_ms"]
    statement = (
        update(table)
        .where(table.c.id == bindparam("b_id"))
        .values({column: bindparam(f"b_{column}") for column in columns})
    )
    c.execute(
        statement,
        [
            {"b_id": row_id, "b_updated_at_ms": now_ms}
            | {f"b_{name}": value for name, value in values.items()}
            for row_id, values in rows.items()
        ],
    )


def _insert(c: Connection, table: Table, rows: Mapping[str, Mapping[str, object]], now_ms: int) -> None:
    """All of *rows* have the same columns."""
    if rows:
        c.execute(
            insert(table),
            [{"id": row_id, "updated_at_ms": now_ms, **values} for row_id, values in rows.items()],
        )


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
