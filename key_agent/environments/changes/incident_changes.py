"""What an incident's steps change in the signed rows: functions of a draft, each a whole step or an error.

1. A step is one transaction: incident, keys, environment and KEK change in the same epoch, or nothing does.
2. Each step can be repeated: where everything is as it would leave it, it changes nothing. So a command that
   was killed is run again, and of a thousand callers with one idempotency key one opens the incident.
3. Opening only restricts. What gives something back (cancel, rescue, retire) takes two persons, and their
   approval is used up in the same transaction (approvals.py).
4. A key whose state is already more restrictive than the incident asks for stays as it is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from envelope.errors import MisuseError
from envelope.keys import TRANSITIONS as KEY_TRANSITIONS
from envelope.keys import KeyState
from key_agent.environments.breaches import (
    TRANSITIONS,
    Declaration,
    Disposition,
    IncidentEvent,
    IncidentKind,
    IncidentState,
    follow,
    scope,
)
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    EnvironmentBody,
    IncidentBody,
    IncidentKeyBody,
    Kind,
)
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.registry.access import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.shared.draft import Draft
    from key_agent.environments.shared.shared_view import Shared

MAX_REASON: Final = 500
KEK_COMPROMISED: Final = "compromised"
"""State of a KEK's row: never to be trusted again. In the registry's own table it is `revoked`."""
_WORKING_KEKS: Final = ("active", "staged", "deactivated", "suspended")
_ENDED: Final = (KeyState.COMPROMISED, KeyState.DESTROYED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Who opens an incident, why, and what is known."""

    declared: Declaration
    reason: str
    since_ms: int
    """From when on the environment is not to be trusted: the breach, not its discovery."""
    opened_by: str
    idempotency_key: str


def incident_name(number: int) -> str:
    return f"inc-{number}"


def find(shared: "Shared", name: str) -> tuple[str, IncidentBody]:
    """The incident called *name*, in any case. RefusedChangeError if there is none."""
    incident_id = name.lower()
    if (body := shared.incidents.get(incident_id)) is None:
        raise RefusedChangeError(f"there is no incident {name}", "`key-agent incident list`")
    return incident_id, body


def keys_of(shared: "Shared", incident_id: str) -> dict[str, IncidentKeyBody]:
    """By key id: what the incident means for it."""
    return {body.dek_id: body for body in shared.incident_keys.values() if body.incident_id == incident_id}


def open_incident(
    draft: "Draft", opening: Opening, *, exposed: Collection[str], now_ms: int
) -> tuple[str, bool]:
    """The incident's id, and whether this call opened it.

    RefusedChangeError: the idempotency key was used for another incident, or what is declared does not fit.
    """
    declared, shared = opening.declared, draft.shared
    environment = _environment(shared, declared.environment)
    for incident_id, body in shared.incidents.items():
        if body.idempotency_key == opening.idempotency_key:
            if not _is_same(body, declared):
                raise RefusedChangeError(
                    f"that idempotency key opened {incident_id}, another incident",
                    "use a key of its own for each incident",
                )
            return incident_id, False
    for incident_id, body in sorted(shared.incidents.items(), key=lambda one: -one[1].number):
        if body.state.is_over or not _is_same(body, declared):
            continue
        if not _is_behind(shared, environment, body):
            return incident_id, False
    if environment.state is EnvironmentState.RETIRED:
        raise RefusedChangeError(f"environment {declared.environment} is retired", "nothing is served there")
    try:
        dispositions = scope(declared, shared.deks, exposed=exposed)
    except MisuseError as error:
        raise RefusedChangeError(str(error), "`key-agent key list SERVICE` shows the keys") from None
    if declared.service is not None and not dispositions:
        raise RefusedChangeError(
            f"{declared.environment} holds no keys of {declared.service}", "`key-agent service list`"
        )
    number = 1 + max((body.number for body in shared.incidents.values()), default=0)
    incident_id = incident_name(number)
    draft.put(
        Kind.INCIDENT,
        incident_id,
        IncidentBody(
            number=number,
            environment=declared.environment,
            kind=declared.kind,
            state=IncidentState.OPEN,
            reason=opening.reason[:MAX_REASON],
            since_ms=opening.since_ms,
            opened_at_ms=now_ms,
            opened_by=opening.opened_by,
            opened_epoch=draft.epoch,
            idempotency_key=opening.idempotency_key,
            keep_keys=declared.keep_keys,
            declared_keys=tuple(sorted(declared.keys)),
            declared_service=declared.service,
            generator=None,
            attestation=None,
            new_kek_id=None,
            steps={IncidentState.OPEN: now_ms},
        ),
    )
    for key_id, disposition in dispositions.items():
        _dispose(draft, incident_id, key_id, disposition, decided_by=opening.opened_by, now_ms=now_ms)
    if declared.kind.heals:
        _withdraw(draft, incident_id, declared.environment, f"{incident_id}: {declared.kind}", now_ms)
    if declared.kind.exposes_agent:
        current = draft.shared.environments[declared.environment]
        draft.put(
            Kind.ENVIRONMENT,
            declared.environment,
            msgspec.structs.replace(current, registry_key_exposed=True),
        )
    if declared.kind.ends_kek:
        _end_kek(draft, environment, now_ms)
    return incident_id, True


def compromise_more(
    draft: "Draft", incident_id: str, key_ids: Collection[str], *, tenant: str, approval_id: str, now_ms: int
) -> bool:
    """Further keys of the incident are compromised; False if all of them are already.

    RefusedChangeError: over, or a key that it does not concern. ApprovalError.
    """
    body = draft.shared.incidents[incident_id]
    concerned = keys_of(draft.shared, incident_id)
    for key_id in key_ids:
        if key_id not in concerned:
            raise RefusedChangeError(
                f"{incident_id} does not concern key {key_id}",
                f"`key-agent incident scope {incident_id}`; another incident, of kind dek, for other keys",
            )
    wanted = [key_id for key_id in sorted(key_ids) if draft.shared.deks[key_id].state not in _ENDED]
    if not wanted:
        return False
    event = IncidentEvent.COMPROMISED_MORE
    if event not in TRANSITIONS[body.state]:
        raise _over(incident_id, body)
    use_approval(
        draft,
        approval_id,
        tenant=tenant,
        action=Action.INCIDENT_COMPROMISE,
        subject=incident_id,
        payload=compromise_payload(key_ids),
        now_ms=now_ms,
    )
    for key_id in wanted:
        _dispose(draft, incident_id, key_id, Disposition.COMPROMISED, decided_by=approval_id, now_ms=now_ms)
    if body.state is IncidentState.REJOINING:
        # Its environment does not come back on the strength of keys that have just been lost.
        _withdraw(draft, incident_id, body.environment, "further keys are compromised", now_ms)
    advance(draft, incident_id, event, now_ms=now_ms)
    return True


def compromise_payload(key_ids: Collection[str]) -> dict[str, object]:
    """What two persons sign for `incident compromise`."""
    return {"keys": sorted(key_ids)}


def cancel(draft: "Draft", incident_id: str, *, tenant: str, approval_id: str, now_ms: int) -> bool:
    """A false alarm: suspended keys are what they were; False if it was cancelled before.

    The environment heals all the same, and returns by its one road. RefusedChangeError once a key is
    compromised, or replaced. ApprovalError.
    """
    body = draft.shared.incidents[incident_id]
    if body.state is IncidentState.FALSE_ALARM:
        return False
    concerned = keys_of(draft.shared, incident_id)
    lost = sum(key.disposition is Disposition.COMPROMISED for key in concerned.values())
    if lost:
        raise RefusedChangeError(
            f"{lost} keys of {incident_id} are compromised: that is not taken back",
            f"`key-agent incident rekey {incident_id}`",
        )
    if IncidentEvent.CANCELLED not in TRANSITIONS[body.state]:
        raise _over(incident_id, body)
    use_approval(
        draft,
        approval_id,
        tenant=tenant,
        action=Action.INCIDENT_CANCEL,
        subject=incident_id,
        payload={},
        now_ms=now_ms,
    )
    for key_id, key in concerned.items():
        if key.disposition is Disposition.SUSPENDED:
            resume(draft, key_id, now_ms=now_ms)
    advance(draft, incident_id, IncidentEvent.CANCELLED, now_ms=now_ms)
    return True


def without_successor(shared: "Shared", incident_id: str) -> list[str]:
    """Keys that sealed before they were taken away, in whose place none seals yet."""
    active = {
        (dek.ring, dek.owner_environment) for dek in shared.deks.values() if dek.state is KeyState.ACTIVE
    }
    found = []
    for key_id, key in sorted(keys_of(shared, incident_id).items()):
        dek = shared.deks[key_id]
        sealed = KeyState.ACTIVE in (key.previous_state, dek.suspended_from)
        service = shared.services.get(dek.service)
        is_wanted = service is not None and not service.removed
        if sealed and is_wanted and dek.state in _ENDED and (dek.ring, dek.owner_environment) not in active:
            found.append(key_id)
    return found


def undecided(shared: "Shared", incident_id: str) -> list[str]:
    """Keys that are suspended by the incident: they come back with it, or are compromised."""
    return [
        key_id
        for key_id, key in sorted(keys_of(shared, incident_id).items())
        if key.disposition is Disposition.SUSPENDED and shared.deks[key_id].state is KeyState.SUSPENDED
    ]


def succeed(draft: "Draft", incident_id: str, *, now_ms: int) -> bool:
    """Every key that was taken away has its successor; False if that was known.

    RefusedChangeError: some have none, or wait for a decision.
    """
    shared, body = draft.shared, draft.shared.incidents[incident_id]
    if body.state not in (IncidentState.OPEN, IncidentState.CONTAINED):
        if body.state.is_over:
            raise _over(incident_id, body)
        return False
    if waiting := undecided(shared, incident_id):
        raise RefusedChangeError(
            f"{len(waiting)} keys of {incident_id} are suspended: nobody has decided about them",
            f"`key-agent incident compromise {incident_id}` or `key-agent incident cancel {incident_id}`",
        )
    if missing := without_successor(shared, incident_id):
        raise RefusedChangeError(
            f"{len(missing)} keys of {incident_id} have no active successor yet",
            f"`key-agent incident rekey {incident_id}` again, once every environment has the new keys",
        )
    newest = {
        (dek.ring, dek.owner_environment): key_id
        for key_id, dek in shared.deks.items()
        if dek.state is KeyState.ACTIVE
    }
    for key_id, key in keys_of(shared, incident_id).items():
        dek = shared.deks[key_id]
        successor = newest.get((dek.ring, dek.owner_environment))
        if dek.state in _ENDED and successor is not None and key.replaced_by != successor:
            draft.put(
                Kind.INCIDENT_KEY,
                _key_row(incident_id, key_id),
                msgspec.structs.replace(key, replaced_by=successor),
            )
    advance(draft, incident_id, IncidentEvent.SUCCEEDED, now_ms=now_ms)
    return True


def has_newer_kek(shared: "Shared", body: EnvironmentBody, incident: IncidentBody) -> bool:
    """Whether the environment's KEK was made after the incident was opened, and no older one works there.

    When it was made is its agent's word, which may be a breached one: the rows did not have it before either.
    """
    kek = None if body.kek_id is None else shared.keks.get(body.kek_id)
    return (
        kek is not None
        and kek.state == "active"
        and min(kek.created_at_ms, kek.since_ms) > incident.opened_at_ms
    )


def close(draft: "Draft", incident_id: str, *, now_ms: int) -> bool:
    """Nothing is left to do; False if it was closed. RefusedChangeError says what is left."""
    shared, body = draft.shared, draft.shared.incidents[incident_id]
    if body.state is IncidentState.CLOSED:
        return False
    environment = _environment(shared, body.environment)
    heals = environment.incident_id == incident_id and environment.state not in (
        EnvironmentState.ACTIVE,
        EnvironmentState.DRAINING,
        EnvironmentState.RETIRED,
    )
    if heals:
        raise RefusedChangeError(
            f"{body.environment} is {environment.state}",
            f"`key-agent env heal-complete {body.environment}`, then `env rejoin`",
        )
    if IncidentEvent.CLOSED not in TRANSITIONS[body.state]:
        raise RefusedChangeError(
            f"{incident_id} is {body.state}", f"`key-agent incident status {incident_id}` shows what is left"
        )
    if body.kind is IncidentKind.DB and not has_newer_kek(shared, environment, body):
        raise RefusedChangeError(
            f"the KEK of {body.environment} is not newer than {incident_id}",
            f"`key-agent kek rotate` at the agent of {body.environment}",
        )
    advance(draft, incident_id, IncidentEvent.CLOSED, now_ms=now_ms)
    return True


# Parts of the above, and of healing.


def advance(draft: "Draft", incident_id: str, event: IncidentEvent, *, now_ms: int, **more: object) -> None:
    """The incident's next state, with the time of the first step into it. MisuseError: there is no road."""
    body = draft.shared.incidents[incident_id]
    state = follow(body.state, event)
    steps = {event: now_ms, state: now_ms} | body.steps
    steps[event] = max(now_ms, steps[event])  # the last time; states keep their first
    draft.put(Kind.INCIDENT, incident_id, msgspec.structs.replace(body, state=state, steps=steps, **more))


def note_step(draft: "Draft", incident_id: str, step: str, *, now_ms: int) -> None:
    """When *step* was taken last."""
    body = draft.shared.incidents[incident_id]
    draft.put(Kind.INCIDENT, incident_id, msgspec.structs.replace(body, steps=body.steps | {step: now_ms}))


def use_approval(
    draft: "Draft",
    approval_id: str,
    *,
    tenant: str,
    action: Action,
    subject: str,
    payload: Mapping[str, object],
    now_ms: int,
) -> tuple[str, ...]:
    """The administrators who allow it; their approval is used up with this draft. ApprovalError."""
    granted = approvals.check_granted(
        tenant,
        approval_id,
        draft.shared.approvals.get(approval_id),
        draft.shared.admins,
        action=action,
        subject=subject,
        payload=payload,
        now_ms=now_ms,
    )
    asked = draft.shared.approvals[approval_id]
    used = msgspec.structs.replace(asked, used_at_ms=now_ms, used_for=f"{action} {subject}")
    draft.put(Kind.APPROVAL, approval_id, used)
    return granted


def suspended(shared: "Shared", key_ids: Collection[str]) -> list[str]:
    """Those of *key_ids* that are suspended. RefusedChangeError: an open incident holds one."""
    found = []
    for key_id in sorted(key_ids):
        if (dek := shared.deks.get(key_id)) is None:
            raise RefusedChangeError(f"there is no key {key_id}", "`key-agent key list SERVICE`")
        if dek.state is not KeyState.SUSPENDED:
            continue
        incident = None if dek.incident_id is None else shared.incidents.get(dek.incident_id)
        if incident is not None and not incident.state.is_over:
            raise RefusedChangeError(
                f"key {key_id} is suspended by {dek.incident_id}",
                f"`key-agent incident cancel {dek.incident_id}`",
            )
        found.append(key_id)
    return found


def resume(draft: "Draft", key_id: str, *, now_ms: int) -> KeyState:
    """A suspended key is what it was: active only if no other one has become that meanwhile."""
    dek = draft.shared.deks[key_id]
    if dek.state is not KeyState.SUSPENDED:
        return dek.state
    state = dek.suspended_from or KeyState.DEACTIVATED
    if state is KeyState.ACTIVE and any(
        other.ring == dek.ring
        and other.owner_environment == dek.owner_environment
        and other.state is KeyState.ACTIVE
        for other in draft.shared.deks.values()
    ):
        state = KeyState.DEACTIVATED
    draft.put(
        Kind.DEK,
        key_id,
        msgspec.structs.replace(
            dek, state=state, suspended_from=None, reason=None, incident_id=None, since_ms=now_ms
        ),
    )
    return state


def _dispose(
    draft: "Draft", incident_id: str, key_id: str, disposition: Disposition, *, decided_by: str, now_ms: int
) -> None:
    dek = draft.shared.deks[key_id]
    row_id = _key_row(incident_id, key_id)
    known = draft.shared.incident_keys.get(row_id)
    draft.put(
        Kind.INCIDENT_KEY,
        row_id,
        IncidentKeyBody(
            incident_id=incident_id,
            dek_id=key_id,
            previous_state=dek.state if known is None else known.previous_state,
            disposition=disposition,
            decided_by=decided_by,
            at_ms=now_ms,
        ),
    )
    state = disposition.state
    if state is None or state is dek.state or state not in KEY_TRANSITIONS[dek.state]:
        return  # rule 4
    suspends = state is KeyState.SUSPENDED
    draft.put(
        Kind.DEK,
        key_id,
        msgspec.structs.replace(
            dek,
            state=state,
            suspended_from=dek.state if suspends else dek.suspended_from,
            reason=f"{incident_id}: {disposition}",
            incident_id=incident_id,
            since_ms=now_ms,
        ),
    )


def _withdraw(draft: "Draft", incident_id: str, name: str, reason: str, now_ms: int) -> None:
    """The environment heals; one that does already belongs to the newest incident."""
    body = _environment(draft.shared, name)
    draft.put(
        Kind.ENVIRONMENT,
        name,
        msgspec.structs.replace(
            body,
            state=follow_environment(body.state, EnvironmentEvent.WITHDRAWN),
            reason=reason[:MAX_REASON],
            incident_id=incident_id,
            since_ms=body.since_ms if body.state is EnvironmentState.HEALING else now_ms,
        ),
    )


def _end_kek(draft: "Draft", environment: EnvironmentBody, now_ms: int) -> None:
    """Its agent disables it in the HSM and erases what it wraps, as soon as it reads this (reaction.py)."""
    for kek_id, kek in draft.shared.keks.items():
        if kek.environment == environment.name and kek.state in _WORKING_KEKS:
            draft.put(Kind.KEK, kek_id, msgspec.structs.replace(kek, state=KEK_COMPROMISED, since_ms=now_ms))


def _is_same(body: IncidentBody, declared: Declaration) -> bool:
    return (
        body.environment == declared.environment
        and body.kind is declared.kind
        and frozenset(body.declared_keys) == declared.keys
        and body.declared_service == declared.service
        and body.keep_keys == declared.keep_keys
    )


def _is_behind(shared: "Shared", environment: EnvironmentBody, body: IncidentBody) -> bool:
    """Whether something of what it took away has been replaced, or its environment is on its way back, or was
    back: who is breached in the same way now is breached anew.
    """
    if body.kind.needs_new_kek and has_newer_kek(shared, environment, body):
        return True
    if body.kind.heals:
        return IncidentEvent.REJOINED in body.steps or environment.state is not EnvironmentState.HEALING
    return body.kind is IncidentKind.SERVICE_CERT and IncidentEvent.SUCCEEDED in body.steps


def _environment(shared: "Shared", name: str) -> EnvironmentBody:
    if (body := shared.environments.get(name)) is None:
        raise RefusedChangeError(f"there is no environment {name}", "`key-agent env list`")
    return body


def _over(incident_id: str, body: IncidentBody) -> RefusedChangeError:
    return RefusedChangeError(
        f"{incident_id} is {body.state}: it is past the point where that can be done",
        f"`key-agent incident status {incident_id}` shows it",
    )


def _key_row(incident_id: str, key_id: str) -> str:
    return f"{incident_id}/{key_id}"
