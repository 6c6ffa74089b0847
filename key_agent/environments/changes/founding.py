"""The first shared rows: what one environment has so far, written down for several.

1. Nothing changes but where it stands: the same services, rings, keys and states. Its keys belong to it.
2. Only what has a place among several is taken: a rotation that is under way ends first.
3. Every live key can be had by the others: one under a lost KEK would keep each of them `joining` for ever.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from envelope.base64url import b64u_encode
from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.environments.changes.key_changes import LIVE
from key_agent.environments.peers.peers import JoinRequest
from key_agent.environments.shared.documents import (
    Body,
    DekBody,
    KekBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
    TermBody,
)
from key_agent.environments.shared.terms import term_id
from key_agent.environments.states import EnvironmentState
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import KekRow
from key_agent.registry.rows import PURPOSE
from key_agent.registry.states import RotationPhase
from key_agent.registry.tables import dek, key_ring, key_rotation, network_service
from key_agent.registry.wrap_rows import sound_wraps

_USES = {purpose: use for use, purpose in PURPOSE.items()}
FIRST_TERM = 1


def kek_body(row: KekRow, environment: str) -> KekBody:
    """What the others may know of a KEK that has been made."""
    assert row.kek is not None, "only a KEK that was made is shown to others"  # noqa: S101 - for the types
    return KekBody(
        environment=environment,
        version=row.version,
        method=row.kek.method,
        kek_type=row.kek.kek_type,
        public_key=b64u_encode(row.kek.public_key_der) if row.kek.public_key_der else None,
        state=row.state,
        since_ms=row.since_ms,
        created_at_ms=row.kek.created_at_ms,
    )


def founding_rows(
    c: Connection, *, request: JoinRequest, lease_s: int, now_ms: int
) -> list[tuple[Kind, str, Body]]:
    """All rows of the first epoch. RefusedChangeError: a rotation is under way; rule 3."""
    told = request.introduction
    name = told.environment
    is_open = key_rotation.c.phase.in_((RotationPhase.DISTRIBUTING, RotationPhase.ACTIVATED))
    if c.execute(select(key_rotation.c.id).where(is_open)).first() is not None:
        raise RefusedChangeError(
            "a rotation of keys is under way",
            "`key-agent status` shows it; repeat the command when it has ended",
        )
    rows: list[tuple[Kind, str, Body]] = [
        (Kind.TENANT, told.tenant, TenantBody(home_environment=name, registry_lease_s=lease_s)),
        (
            Kind.TERM,
            term_id(FIRST_TERM),
            TermBody(
                agent=told.agent,
                environment=name,
                registry_key=told.registry_key,
                since_ms=now_ms,
                cause="env init",
            ),
        ),
        (Kind.ENVIRONMENT, name, request.environment_body(EnvironmentState.ACTIVE, now_ms=now_ms)),
        (Kind.KEK, request.kek_id, msgspec.structs.replace(request.kek, since_ms=now_ms)),
    ]
    rows += [(Kind.SERVICE, row.id, _service(row)) for row in c.execute(select(network_service))]
    rings = {row.id: row for row in c.execute(select(key_ring))}
    keys = list(c.execute(select(dek).order_by(dek.c.ring_id, dek.c.version)))
    _check_wraps(c, keys, rings, request.kek_id)
    algorithms = {row.ring_id: row.alg for row in keys if row.alg is not None}
    rows += [
        (
            Kind.RING,
            row.id,
            RingBody(
                service=row.network_service_id, use=_USES[row.purpose], algorithm=algorithms.get(row.id)
            ),
        )
        for row in rings.values()
    ]
    rows += [(Kind.DEK, row.id, _dek(row, rings[row.ring_id], name)) for row in keys]
    return rows


def _check_wraps(c: Connection, keys: Iterable[Any], rings: Mapping[str, Any], kek_id: str) -> None:
    sound = sound_wraps(c, kek_id)
    lost = [row for row in keys if KeyState(row.state) in LIVE and row.id not in sound]
    if lost:
        first = NetworkService.parse(rings[lost[0].ring_id].network_service_id)
        raise RefusedChangeError(
            f"{len(lost)} keys have no sound wrap under today's KEK, so no other environment could have "
            f"them: {lost[0].id} of {first} is the first",
            "if their KEK can come back into the HSM: `key-agent reinstate --restore`; else give up each: "
            f"`key-agent key destroy {first.service} {lost[0].id}`; then repeat the command",
        )


def _service(row: Any) -> ServiceBody:
    return ServiceBody(removed=row.removed, rotate_after_days=row.rotate_after_days)


def _dek(row: Any, ring: Any, environment: str) -> DekBody:
    return DekBody(
        ring=row.ring_id,
        service=ring.network_service_id,
        owner_environment=environment,
        generator_environment=environment,
        use=KeyUse(row.key_type),
        algorithm=row.alg,
        version=row.version,
        kcv=row.kcv.hex(),
        state=KeyState(row.state),
        reason=row.state_reason,
        since_ms=row.state_since_ms,
        created_at_ms=row.created_at_ms,
        activated_at_ms=row.activated_at_ms,
        predecessor=row.predecessor_id,
        suspended_from=None if row.suspended_from is None else KeyState(row.suspended_from),
    )
