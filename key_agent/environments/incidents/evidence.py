"""The evidence of an incident: what is in the file, and what a stranger can conclude from it offline.

1. All signed rows travel, so their digest can be worked out again and nothing can be left out unseen; with
   them the audit log of the agent from before the breach to the moment of writing, and the acknowledgements.
2. The verifier believes the tenant's root. By it the file's signer; by the file who was the first manager,
   whose key's fingerprint the account shows: administrators have compared it when environments joined. By
   that key the terms after it (terms.py), by the newest one's the digest of all rows, by each one's its rows.
   An agent that never was the manager signs none. The audit lines are a part of one unbroken chain.
3. What the rows say has to hold together: each key of the incident is as restricted as the incident says,
   each approval has two administrators' signatures under exactly what was done.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, cast

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from envelope import audit
from envelope.audit import Head
from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.breaches import Disposition
from key_agent.environments.incidents.evidence_file import Evidence, read_evidence, write_evidence
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError, payload_text
from key_agent.environments.shared.documents import (
    AdminBody,
    ApprovalBody,
    Body,
    DekBody,
    EnvironmentBody,
    IncidentBody,
    IncidentKeyBody,
    Kind,
    SharedRow,
    check_head,
    digest_of,
    read_body,
    row_digest,
)
from key_agent.environments.shared.documents import (
    Head as RegistryHead,
)
from key_agent.environments.shared.registry_key import fingerprint_of
from key_agent.environments.shared.terms import Known, Terms, judge
from key_agent.environments.states import restrictiveness

ROWS: Final = "rows.jsonl"
AUDIT: Final = "audit.jsonl"
ACKNOWLEDGEMENTS: Final = "acknowledgements.json"
REGISTRY: Final = "registry.json"
MAX_AUDIT_BYTES: Final = 256 << 20
_HEAD_FIELDS: Final = ("seq", "prev")


class _Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the rows stand."""

    term: int
    epoch: int
    digest: str
    signature: str
    """Of who holds the term, under the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a file proves."""

    evidence: Evidence
    incident_id: str
    incident: IncidentBody
    keys: Mapping[str, IncidentKeyBody]
    key_states: Mapping[str, KeyState]
    environments: Mapping[str, EnvironmentBody]
    approved_by: Mapping[str, tuple[str, ...]]
    """Approval used for the incident -> who signed it."""
    rows: int
    term: int
    epoch: int
    digest: str
    managers: tuple[tuple[int, str, str], ...]
    """Who held which term: number, agent, fingerprint of its registry key. The first is the file's word."""
    audit_from: Head
    audit_to: Head
    acknowledgements: object


def write_bundle(
    *,
    tenant: str,
    incident_id: str,
    rows: Sequence[SharedRow],
    term: int,
    epoch: int,
    digest: str,
    head_signature: str,
    audit_lines: bytes,
    acknowledgements: object,
    made_at_ms: int,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate],
) -> bytes:
    """The file. *audit_lines*: whole lines, one unbroken part of the log."""
    parts = {
        ROWS: b"".join(msgspec.json.encode(row) + b"\n" for row in sorted(rows, key=lambda row: row.key)),
        AUDIT: audit_lines,
        ACKNOWLEDGEMENTS: msgspec.json.encode(acknowledgements),
        REGISTRY: payload_text(
            {"term": term, "epoch": epoch, "digest": digest, "signature": head_signature}
        ).encode("ascii"),
    }
    return write_evidence(
        parts, tenant=tenant, subject=incident_id, made_at_ms=made_at_ms, key=key, chain=chain
    )


def verify_bundle(content: bytes, *, root: x509.Certificate, tenant: str | None = None) -> Account:
    """What *content* proves under the tenant's *root*.

    FormatError: no such file. IntegrityError: something in it was changed, left out, or contradicts the rest.
    CertificateError: its signer does not speak for the tenant.
    """
    evidence = read_evidence(content, root=root, tenant=tenant)
    if set(evidence.parts) != {ROWS, AUDIT, ACKNOWLEDGEMENTS, REGISTRY}:
        raise FormatError("evidence with other parts than an incident has")
    try:
        registry = msgspec.json.decode(evidence.parts[REGISTRY], type=_Registry)
        acknowledgements = msgspec.json.decode(evidence.parts[ACKNOWLEDGEMENTS])
        rows = [msgspec.json.decode(line, type=SharedRow) for line in evidence.parts[ROWS].splitlines()]
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FormatError(f"evidence that cannot be read: {error}") from None
    bodies, terms = _check_rows(evidence.tenant, rows, registry)
    start, end = _check_audit(evidence.parts[AUDIT])
    incident_id = evidence.subject
    incident = bodies.get((Kind.INCIDENT, incident_id))
    if not isinstance(incident, IncidentBody):
        raise IntegrityError(f"the rows know of no incident {incident_id}")
    keys, states = _check_keys(incident_id, bodies)
    return Account(
        evidence=evidence,
        incident_id=incident_id,
        incident=incident,
        keys=keys,
        key_states=states,
        environments={name: cast("EnvironmentBody", body) for name, body in _of(Kind.ENVIRONMENT, bodies)},
        approved_by=_check_approvals(evidence.tenant, incident_id, bodies),
        rows=len(rows),
        term=registry.term,
        epoch=registry.epoch,
        digest=registry.digest,
        managers=tuple(
            (held.term, held.agent, fingerprint_of(held.registry_key)) for held in terms.holders()
        ),
        audit_from=start,
        audit_to=end,
        acknowledgements=acknowledgements,
    )


type _Bodies = Mapping[tuple[Kind, str], Body]


def _of(kind: Kind, bodies: _Bodies) -> Iterator[tuple[str, Body]]:
    for (found, row_id), body in bodies.items():
        if found is kind:
            yield row_id, body


def _check_rows(tenant: str, rows: Sequence[SharedRow], registry: _Registry) -> tuple[_Bodies, Terms]:
    bodies = {row.key: read_body(row.kind, row.body) for row in rows}
    if len(bodies) != len(rows):
        raise IntegrityError("a row stands there twice")
    first = next(iter(Terms.of(rows).holders()))
    # Whoever knows nothing but the first manager; an election cannot be asked offline.
    terms = judge(tenant, Known(pins={first.agent: first.registry_key}), rows).terms
    holder = terms.newest
    if holder is None or holder.term != registry.term:
        raise IntegrityError(f"nobody held term {registry.term}")
    head = RegistryHead(
        term=registry.term, epoch=registry.epoch, digest=registry.digest, signature=registry.signature
    )
    check_head(tenant, head, holder.key)
    for row in rows:
        terms.check(tenant, row)
    newest = max(((row.term, row.epoch) for row in rows), default=(0, 0))
    if newest > (registry.term, registry.epoch):
        raise IntegrityError("a row is newer than the registry it is from")
    if digest_of((row.key, row_digest(row)) for row in rows) != registry.digest:
        raise IntegrityError("the rows are not all that the registry held")
    return bodies, terms


def _check_audit(lines: bytes) -> tuple[Head, Head]:
    """The heads before the first line and after the last one."""
    pieces = lines.splitlines(keepends=True)
    if not pieces:
        raise IntegrityError("there is no audit log in it")
    try:
        first = msgspec.json.decode(pieces[0], type=dict[str, object])
        seq, prev = (first[name] for name in _HEAD_FIELDS)
        if not isinstance(seq, int) or not isinstance(prev, str):
            raise FormatError("not an audit event")
    except (msgspec.MsgspecError, UnicodeError, RecursionError, KeyError):
        raise FormatError("the audit log does not begin with an event") from None
    start = Head(seq - 1, prev)
    return start, audit.verify(pieces, start=start)


def _check_keys(
    incident_id: str, bodies: _Bodies
) -> tuple[Mapping[str, IncidentKeyBody], Mapping[str, KeyState]]:
    keys: dict[str, IncidentKeyBody] = {}
    states: dict[str, KeyState] = {}
    for _, body in _of(Kind.INCIDENT_KEY, bodies):
        if not isinstance(body, IncidentKeyBody) or body.incident_id != incident_id:
            continue
        dek = bodies.get((Kind.DEK, body.dek_id))
        if not isinstance(dek, DekBody):
            raise IntegrityError(f"the rows do not hold key {body.dek_id} of the incident")
        is_lasting = body.disposition in (Disposition.COMPROMISED, Disposition.CANCELLED)
        wanted = body.disposition.state
        if is_lasting and wanted is not None and restrictiveness(dek.state) < restrictiveness(wanted):
            raise IntegrityError(f"key {body.dek_id} is {dek.state}, the incident has made it {wanted}")
        keys[body.dek_id], states[body.dek_id] = body, dek.state
    return keys, states


def _check_approvals(tenant: str, incident_id: str, bodies: _Bodies) -> Mapping[str, tuple[str, ...]]:
    """Every approval that was used for the incident, judged as at the moment of its use."""
    admins = {name: cast("AdminBody", body) for name, body in _of(Kind.ADMIN, bodies)}
    found: dict[str, tuple[str, ...]] = {}
    for approval_id, body in _of(Kind.APPROVAL, bodies):
        if not isinstance(body, ApprovalBody) or body.subject != incident_id or body.used_at_ms is None:
            continue
        unused = msgspec.structs.replace(body, used_at_ms=None, used_for=None)
        try:
            found[approval_id] = approvals.check_granted(
                tenant,
                approval_id,
                unused,
                admins,
                action=Action(body.action),
                subject=body.subject,
                payload=msgspec.json.decode(body.payload, type=dict[str, object]),
                now_ms=body.used_at_ms,
            )
        except (ApprovalError, ValueError, RecursionError) as error:
            raise IntegrityError(f"approval {approval_id} was used without being one: {error}") from None
    for _, body in _of(Kind.INCIDENT_KEY, bodies):
        if isinstance(body, IncidentKeyBody) and body.incident_id == incident_id:
            is_approval = body.decided_by.startswith("a-") and (Kind.APPROVAL, body.decided_by) in bodies
            if is_approval and body.decided_by not in found:
                raise IntegrityError(f"key {body.dek_id} was decided by {body.decided_by}, which nobody used")
    return found


def audit_extract(lines: Sequence[bytes], *, since_ms: int) -> bytes:
    """The lines from the last one before *since_ms* on; all of them if that is the beginning.

    *lines*: of a log that was verified. IntegrityError: more than MAX_AUDIT_BYTES.
    """
    first = 0
    for number, line in enumerate(lines):
        if _at_ms(line) >= since_ms:
            break
        first = number
    extract = b"".join(lines[first:])
    if len(extract) > MAX_AUDIT_BYTES:
        raise IntegrityError(f"the audit log of that time is larger than {MAX_AUDIT_BYTES} bytes")
    return extract


class _Timed(msgspec.Struct):
    time: datetime


def _at_ms(line: bytes) -> int:
    """When an event was written; a line that is none is of no time, and stays in."""
    try:
        found = msgspec.json.decode(line, type=_Timed)
    except (msgspec.MsgspecError, UnicodeError):
        return 2**63
    return int(found.time.timestamp() * 1000)
