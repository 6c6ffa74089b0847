"""What healing changes in the signed rows: the one road back, rescue of old objects, and the end of keys.

1. The road of an environment is states.py's table; here stands what each step of it demands. That it has
   healed is its operator's statement, and where the incident says so a KEK and certificates that are newer.
2. It is admitted only after the load balancers have confirmed that healing is over (healing.py asks them),
   and active in one epoch with everything proven there; whatever fails on the way is `healing` again.
3. A compromised key opens nothing. For a time two persons may let it open objects by way of a rescue, so that
   they can be read and sealed anew; it never seals. A signing key opens nothing: with it a rescue would bring
   back only trust in signatures that anybody may have made.
4. Its end is destruction, by two persons: when a re-encryption has found nothing left that it sealed, or when
   what is left is given up by its name.
5. While no environment counts no key becomes active, so who is appointed to be the first again (recovery.py)
   comes back without the successors of its keys: its incidents stay as they are until these are made. If it
   is appointed because every KEK is lost, every key is: two persons may end them in whatever state they are.
"""

from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import msgspec
from cryptography.exceptions import InvalidSignature

from envelope.errors import FormatError
from envelope.keys import TRANSITIONS as KEY_TRANSITIONS
from envelope.keys import KeyState, KeyUse
from key_agent.environments.breaches import TRANSITIONS, IncidentEvent, IncidentKind, IncidentState
from key_agent.environments.changes.incident_changes import (
    KEK_COMPROMISED,
    advance,
    has_newer_kek,
    undecided,
    use_approval,
)
from key_agent.environments.shared.approvals import Action, payload_text
from key_agent.environments.shared.documents import (
    EnvironmentBody,
    IncidentBody,
    KekBody,
    Kind,
    read_registry_key,
)
from key_agent.environments.shared.recovery import appointed, none_counts
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.registry.access import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.shared.draft import Draft
    from key_agent.environments.shared.shared_view import Shared

MAX_RESCUE_S: Final = 30 * 86_400
LIVE: Final = (KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.SUSPENDED, KeyState.DEACTIVATED)
"""What an environment has to be able to open before it serves."""
_KEK_ACTIVE: Final = "active"
_PAST_HEALING: Final = (EnvironmentState.HEALED, EnvironmentState.REJOINING)


_SOUND: Final = (EnvironmentState.JOINING, EnvironmentState.ACTIVE, EnvironmentState.DRAINING)
"""Environments whose KEK is believed by the key that administrators have compared when they joined."""
_ANNOUNCED: Final = b"sealgate/v1 kek announcement\0"


class KekAnnouncement(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The KEK that an environment has now, in its agent's word."""

    environment: str
    kek_id: str
    kek: KekBody
    signature: str = ""
    """Hex, by the environment's registry key; of one that heals nobody asks for it."""

    def signed_bytes(self, tenant: str) -> bytes:
        unsigned = msgspec.structs.replace(self, signature="")
        return _ANNOUNCED + msgspec.json.encode([tenant, unsigned], order="sorted")

    def is_signed(self, tenant: str, registry_key: str) -> bool:
        try:
            key = read_registry_key(registry_key)
            key.verify(bytes.fromhex(self.signature), self.signed_bytes(tenant))
        except (FormatError, ValueError, InvalidSignature):
            return False
        return True


def kek_fingerprint(kek_id: str, body: KekBody) -> str:
    """What administrators compare: 128 bits in hex, over all that does not change in a KEK's life."""
    facts = {
        "id": kek_id,
        "environment": body.environment,
        "method": body.method,
        "type": body.kek_type,
        "public_key": body.public_key,
        "created_at_ms": body.created_at_ms,
    }
    text = sha256(b"sealgate kek v1\n" + payload_text(facts).encode("ascii")).hexdigest()[:32]
    return "-".join(text[at : at + 4] for at in range(0, len(text), 4))


def announces_kek(body: EnvironmentBody) -> bool:
    """Whether that environment may have another KEK than its row names: made to heal, or rotated to."""
    return body.state is EnvironmentState.HEALING or body.state in _SOUND


def take_kek(draft: "Draft", told: KekAnnouncement, *, tenant: str, now_ms: int) -> bool:
    """The KEK that an environment has made to heal, or has rotated to; False if the rows name it already.

    The one before it is not trusted again. A sound environment has signed it, by the key that administrators
    have compared; of one that heals they compare the KEK itself, and until then its state lets it have no
    keys. One that was there unseen when an incident ended its environment's KEK ends with it: it was rotated
    to, and not announced yet. RefusedChangeError: neither of both.
    """
    body = _environment(draft.shared, told.environment)
    if body.kek_id == told.kek_id:
        return False
    if not announces_kek(body) or told.kek.environment != told.environment:
        raise RefusedChangeError(
            f"{told.environment} is {body.state}: it announces no KEK",
            f"`key-agent env status {told.environment}`",
        )
    is_healing = body.state is EnvironmentState.HEALING
    if not is_healing and (body.registry_key_exposed or not told.is_signed(tenant, body.registry_key)):
        raise RefusedChangeError(
            f"nobody whom the rows name has signed that KEK {told.kek_id} is {told.environment}'s",
            f"find out who speaks for {told.environment}; `key-agent incident open` if nobody should",
        )
    if told.kek_id in draft.shared.keks:
        raise RefusedChangeError(
            f"KEK {told.kek_id} is an old one", f"`key-agent env new-kek` at {told.environment}"
        )
    incidents = open_incidents(draft.shared, told.environment).values()
    exposed = any(one.kind.needs_new_kek for one in incidents)
    is_over = any(one.kind.ends_kek and told.kek.created_at_ms <= one.opened_at_ms for one in incidents)
    for kek_id, kek in draft.shared.keks.items():
        if kek.environment == told.environment and kek.state != KEK_COMPROMISED:
            state = KEK_COMPROMISED if exposed else "deactivated"
            draft.put(Kind.KEK, kek_id, msgspec.structs.replace(kek, state=state, since_ms=now_ms))
    announced = msgspec.structs.replace(told.kek, since_ms=now_ms)
    if is_over:
        announced = msgspec.structs.replace(announced, state=KEK_COMPROMISED)
    draft.put(Kind.KEK, told.kek_id, announced)
    draft.put(
        Kind.ENVIRONMENT,
        told.environment,
        msgspec.structs.replace(body, kek_id=told.kek_id, kms_type=told.kek.method),
    )
    return True


def recover(draft: "Draft", name: str, *, registry_key: str, kek_id: str, kek: KekBody, now_ms: int) -> None:
    """*name* is appointed to be the first that comes back (recovery.py): with these keys, and it heals.

    One that has come back by its own word alone goes on.
    """
    body = _environment(draft.shared, name)
    changed = msgspec.structs.replace(
        body,
        registry_key=registry_key,
        registry_key_exposed=body.registry_key_exposed and body.registry_key == registry_key,
        state=body.state if body.state.counts else EnvironmentState.HEALING,
    )
    draft.put(Kind.ENVIRONMENT, name, changed)
    announced = KekAnnouncement(environment=name, kek_id=kek_id, kek=kek)
    take_kek(
        draft, announced, tenant="", now_ms=now_ms
    )  # of one that counts: unsigned, so only the known one


def open_incidents(shared: "Shared", environment: str) -> dict[str, IncidentBody]:
    """Those that an environment heals because of, oldest first; it has returned after all others."""
    mine = {
        incident_id: body
        for incident_id, body in shared.incidents.items()
        if body.environment == environment
        and body.kind.heals
        and not (body.state.is_over or body.state is IncidentState.REENCRYPTING)
    }
    return dict(sorted(mine.items(), key=lambda one: one[1].number))


def heal_complete(
    draft: "Draft",
    name: str,
    *,
    attestation: str,
    new_certificates: bool,
    fingerprint: str | None,
    now_ms: int,
) -> bool:
    """The environment's operator says that it is sound again; False if that was said.

    *fingerprint*: of its KEK, as its own console shows it; whoever took the agent over could announce another
    one. RefusedChangeError: what its incidents demand is not there.
    """
    shared = draft.shared
    body = _environment(shared, name)
    if body.state in _PAST_HEALING:
        return False
    if body.state is not EnvironmentState.HEALING:
        raise RefusedChangeError(
            f"{name} is {body.state}, it does not heal", f"`key-agent env status {name}`"
        )
    incidents = open_incidents(shared, name)
    for incident_id, incident in incidents.items():
        _check_healed(shared, body, incident_id, incident, new_certificates=new_certificates)
    needs_new_kek = any(incident.kind.needs_new_kek for incident in incidents.values())
    if needs_new_kek or _has_announced(shared, body) or fingerprint is not None:
        _check_fingerprint(shared, body, fingerprint)
    _follow(draft, name, EnvironmentEvent.ATTESTED, f"healed: {attestation}", now_ms)
    for incident_id, incident in incidents.items():
        healed = msgspec.structs.replace(
            incident,
            attestation=attestation,
            new_kek_id=body.kek_id if incident.kind.needs_new_kek else None,
            steps=incident.steps | {"healed": now_ms},
        )
        draft.put(Kind.INCIDENT, incident_id, healed)
    return True


def _check_healed(
    shared: "Shared",
    body: EnvironmentBody,
    incident_id: str,
    incident: IncidentBody,
    *,
    new_certificates: bool,
) -> None:
    if incident.kind.needs_new_kek and not has_newer_kek(shared, body, incident):
        raise RefusedChangeError(
            f"{incident_id} ({incident.kind}): the KEK of {body.name} is not newer than the incident",
            f"make a new KEK there: `key-agent env new-kek` at the agent of {body.name}",
        )
    if incident.kind is not IncidentKind.SUSPECTED and not new_certificates:
        raise RefusedChangeError(
            f"{incident_id} ({incident.kind}): certificates and keys of {body.name} were exposed",
            "exchange them (docs/runbooks.md), then repeat with --new-certs",
        )


def _has_announced(shared: "Shared", body: EnvironmentBody) -> bool:
    """Whether the KEK came while the environment healed: by its agent's word alone, whatever the incident is.

    Known by the end of the one before it, which the manager has dated; the announcement dates itself.
    """
    before = [kek for kek_id, kek in shared.keks.items() if kek_id != body.kek_id]
    return any(kek.environment == body.name and kek.since_ms >= body.since_ms for kek in before)


def _check_fingerprint(shared: "Shared", body: EnvironmentBody, fingerprint: str | None) -> None:
    kek = None if body.kek_id is None else shared.keks.get(body.kek_id)
    if fingerprint is None:
        raise RefusedChangeError(
            f"the new KEK of {body.name} is to be compared",
            f"--kek FINGERPRINT, as `key-agent env new-kek` printed it at {body.name}; lost: give that again",
        )
    if body.kek_id is None or kek is None or fingerprint != kek_fingerprint(body.kek_id, kek):
        raise RefusedChangeError(
            f"the KEK that {body.name} has announced has another fingerprint",
            "compare it at that environment's own console; if it differs, its agent is not yours",
        )


def may_rejoin(shared: "Shared", name: str) -> None:
    """RefusedChangeError unless the environment has healed and its incidents are ready for its return."""
    body = _environment(shared, name)
    if body.state not in _PAST_HEALING:
        raise RefusedChangeError(
            f"{name} is {body.state}",
            f"`key-agent env heal-complete {name}` first"
            if body.state is EnvironmentState.HEALING
            else f"`key-agent env status {name}` shows its state",
        )
    for incident_id, incident in open_incidents(shared, name).items():
        if waiting := undecided(shared, incident_id):
            raise RefusedChangeError(
                f"{len(waiting)} keys of {incident_id} are suspended: nobody has decided about them",
                f"`key-agent incident cancel {incident_id}` or `key-agent incident compromise {incident_id}`",
            )
        if IncidentEvent.REJOIN_BEGUN not in _roads(incident.state) and not _is_first(shared, name):
            raise RefusedChangeError(
                f"{incident_id} is {incident.state}: keys that were taken away have no successors yet",
                f"no environment counts, so none becomes active: `key-agent env recovery` at {name}"
                if none_counts(shared)
                else f"`key-agent incident rekey {incident_id}`",
            )


def admit(draft: "Draft", name: str, *, load_balancers: Collection[str], now_ms: int) -> bool:
    """The load balancers know that healing is over: its wraps may be stored. False if it is admitted.

    *load_balancers*: who has confirmed, at least one. RefusedChangeError.
    """
    may_rejoin(draft.shared, name)
    if draft.shared.environments[name].state is EnvironmentState.REJOINING:
        return False
    if not load_balancers:
        raise RefusedChangeError(
            f"no load balancer has confirmed that {name} has healed",
            "start `key-agent lb-agent` beside each one",
        )
    confirmed = f"confirmed by {', '.join(sorted(load_balancers))}"
    _follow(draft, name, EnvironmentEvent.ADMITTED, confirmed, now_ms)
    for incident_id, incident in open_incidents(draft.shared, name).items():
        if IncidentEvent.REJOIN_BEGUN in _roads(incident.state):
            advance(draft, incident_id, IncidentEvent.REJOIN_BEGUN, now_ms=now_ms)
    return True


def readmit(draft: "Draft", name: str, *, now_ms: int) -> bool:
    """Everything is proven there: active, in this epoch. False if it is."""
    body = _environment(draft.shared, name)
    if body.state is EnvironmentState.ACTIVE:
        return False
    incidents = open_incidents(draft.shared, name)
    _follow(draft, name, EnvironmentEvent.KEYS_PROVEN, None, now_ms, ends_incident=True)
    for incident_id, incident in incidents.items():
        if IncidentEvent.REJOINED in _roads(incident.state):
            advance(draft, incident_id, IncidentEvent.REJOINED, now_ms=now_ms)
    return True


def refuse(draft: "Draft", name: str, *, reason: str, now_ms: int) -> bool:
    """Something could not be proven there: it heals again. False if it does not rejoin (any more)."""
    body = _environment(draft.shared, name)
    if body.state is not EnvironmentState.REJOINING:
        return False
    _follow(draft, name, EnvironmentEvent.WITHDRAWN, reason, now_ms)
    for incident_id, incident in open_incidents(draft.shared, name).items():
        if IncidentEvent.REJOIN_FAILED in _roads(incident.state):
            advance(draft, incident_id, IncidentEvent.REJOIN_FAILED, now_ms=now_ms)
    return True


# Old keys.


def rescue_payload(key_ids: Collection[str], until_ms: int) -> dict[str, object]:
    """What two persons sign for a rescue."""
    return {"keys": sorted(key_ids), "until_ms": until_ms}


def rescue(
    draft: "Draft",
    incident_id: str,
    key_ids: Collection[str],
    *,
    tenant: str,
    approval_id: str,
    until_ms: int,
    now_ms: int,
) -> bool:
    """Compromised keys open objects, for every caller, until *until_ms*. False if they do.

    RefusedChangeError, ApprovalError.
    """
    shared = draft.shared
    if incident_id not in shared.incidents:
        raise RefusedChangeError(f"there is no incident {incident_id}", "`key-agent incident list`")
    if not now_ms < until_ms <= now_ms + MAX_RESCUE_S * 1000:
        raise RefusedChangeError(
            "a rescue ends in the future, within 30 days", "give another time, in an approval of its own"
        )
    for key_id in key_ids:
        dek = shared.deks.get(key_id)
        if dek is None or dek.incident_id != incident_id or dek.state is not KeyState.COMPROMISED:
            raise RefusedChangeError(
                f"key {key_id} is none that {incident_id} has compromised",
                f"`key-agent incident scope {incident_id}`",
            )
        if dek.use is not KeyUse.DATA:
            raise RefusedChangeError(
                f"key {key_id} signs: nothing tells its owner's signatures from those of whoever took it",
                "leave it out, in an approval of its own",
            )
    if all(shared.deks[key_id].rescue_approval == approval_id for key_id in key_ids):
        return False
    use_approval(
        draft,
        approval_id,
        tenant=tenant,
        action=Action.KEY_RESCUE,
        subject=incident_id,
        payload=rescue_payload(key_ids, until_ms),
        now_ms=now_ms,
    )
    for key_id in key_ids:
        rescued = msgspec.structs.replace(
            shared.deks[key_id], rescue_until_ms=until_ms, rescue_approval=approval_id
        )
        draft.put(Kind.DEK, key_id, rescued)
    return True


def retire_payload(key_ids: Collection[str], *, accept_loss: bool) -> dict[str, object]:
    """What two persons sign for the end of keys."""
    return {"accept_loss": accept_loss, "keys": sorted(key_ids)}


def retire_keys(
    draft: "Draft",
    key_ids: Collection[str],
    *,
    tenant: str,
    approval_id: str,
    accept_loss: bool,
    rewritten: Collection[str],
    unfinished: Mapping[str, Collection[str]],
    now_ms: int,
) -> bool:
    """Compromised or deactivated keys are destroyed: rows stay, wraps are erased. False if they are.

    *rewritten*: keys of which a re-encryption has found nothing left; *unfinished*: key -> re-encryptions
    that know of its objects and may go on. RefusedChangeError, ApprovalError.
    """
    shared = draft.shared
    are_lost = accept_loss and are_given_up(shared)
    for key_id in key_ids:
        if (dek := shared.deks.get(key_id)) is None:
            raise RefusedChangeError(f"there is no key {key_id}", "`key-agent key list SERVICE`")
        may_end = are_lost or KeyState.DESTROYED in _ends(dek.state)
        if dek.state is not KeyState.DESTROYED and not may_end:
            raise RefusedChangeError(
                f"key {key_id} is {dek.state}: only a deactivated or compromised one is destroyed",
                "`key-agent key list SERVICE`",
            )
    wanted = [key_id for key_id in sorted(key_ids) if shared.deks[key_id].state is not KeyState.DESTROYED]
    if not wanted:
        return False
    if jobs := sorted({job for key_id in wanted for job in unfinished.get(key_id, ())}):
        # An accepted loss too: it is of what nobody can rewrite, not of what nobody has waited for.
        raise RefusedChangeError(
            f"not finished, and knows of objects of these keys: re-encryption {', '.join(jobs)}",
            "`key-agent keys reencrypt resume JOB` each; one that nobody can finish, as its store is gone: "
            "`key-agent keys reencrypt drop JOB`, then --accept-loss, in an approval that says so",
        )
    left = [key_id for key_id in wanted if key_id not in rewritten]
    if left and not accept_loss:
        raise RefusedChangeError(
            f"nothing shows that no object of {', '.join(left)} is left",
            "`key-agent keys reencrypt start`, to its end; what is lost, as with a job that was dropped: "
            "--accept-loss, in an approval that says so",
        )
    use_approval(
        draft,
        approval_id,
        tenant=tenant,
        action=Action.KEYS_RETIRE,
        subject=tenant,
        payload=retire_payload(key_ids, accept_loss=accept_loss),
        now_ms=now_ms,
    )
    for key_id in wanted:
        ended = msgspec.structs.replace(
            shared.deks[key_id],
            state=KeyState.DESTROYED,
            reason=f"retired under {approval_id}",
            since_ms=now_ms,
            rescue_until_ms=None,
            rescue_approval=None,
        )
        draft.put(Kind.DEK, key_id, ended)
    return True


def are_given_up(shared: "Shared") -> bool:
    """Whether two persons have appointed who is first because no KEK opens any key."""
    recovery = appointed(shared)
    return recovery is not None and recovery.succession.lost


def _ends(state: KeyState) -> Collection[KeyState]:
    """Where a key that has sealed may go; one that is on its way ends with its rotation."""
    return () if state is KeyState.PRE_ACTIVE else KEY_TRANSITIONS[state]


def _roads(state: IncidentState) -> Collection[IncidentEvent]:
    return TRANSITIONS[state]


def _is_first(shared: "Shared", name: str) -> bool:
    """Whether no environment counts and *name* is appointed to be the first again (rule 5)."""
    recovery = appointed(shared)
    return recovery is not None and recovery.environment == name


def _environment(shared: "Shared", name: str) -> EnvironmentBody:
    if (body := shared.environments.get(name)) is None:
        raise RefusedChangeError(f"there is no environment {name}", "`key-agent env list`")
    return body


def _follow(
    draft: "Draft",
    name: str,
    event: EnvironmentEvent,
    reason: str | None,
    now_ms: int,
    *,
    ends_incident: bool = False,
) -> None:
    body = draft.shared.environments[name]
    draft.put(
        Kind.ENVIRONMENT,
        name,
        msgspec.structs.replace(
            body,
            state=follow_environment(body.state, event),
            reason=None if reason is None else reason[:500],
            since_ms=now_ms,
            incident_id=None if ends_incident else body.incident_id,
        ),
    )
