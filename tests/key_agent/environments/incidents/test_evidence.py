"""Evidence verifies with the root alone; whatever is changed, left out or contradicts itself is found."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from certs.pki import Credential
from envelope import audit
from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.breaches import Declaration, IncidentKind
from key_agent.environments.changes import incident_changes as changes
from key_agent.environments.changes.incident_changes import Opening
from key_agent.environments.incidents.evidence import Account, audit_extract, verify_bundle, write_bundle
from key_agent.environments.shared.approvals import Action, payload_text
from key_agent.environments.shared.documents import (
    Body,
    Kind,
    SharedRow,
    TermBody,
    digest_of,
    read_body,
    row_digest,
    sign_head,
    sign_row,
)
from key_agent.environments.shared.registry_key import fingerprint_of, public_text
from key_agent.environments.shared.terms import term_id
from tests.key_agent.environments.rows import NOW_MS, TABLES, TENANT, World
from tests.pki import Tenant, make_tenant


class Case:
    """A breached environment, three agents that have signed its rows, and an audit log."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        found = tenant.agent_signing("agent-b")
        self.signing = Credential(found.key, found.certificate)
        self.registry_keys = {f"agent-{name}": Ed25519PrivateKey.generate() for name in "abc"}
        self.world = world = World()
        for name, body in world.rows.environments.items():
            key = public_text(self.registry_keys[body.agent_id])
            world.rows.environments[name] = msgspec.structs.replace(body, registry_key=key)
        opening = Opening(
            declared=Declaration(kind=IncidentKind.RUNTIME, environment="a"),
            reason="IR-2214",
            since_ms=NOW_MS,
            opened_by="ada",
            idempotency_key="k",
        )
        world.change(
            lambda draft: changes.open_incident(
                draft, opening, exposed=frozenset(world.rows.deks), now_ms=NOW_MS
            )
        )
        self.further = [world.dek["s3-b"]]
        self.approval = world.approve(
            Action.INCIDENT_COMPROMISE, "inc-1", changes.compromise_payload(self.further)
        )
        world.change(
            lambda draft: changes.compromise_more(
                draft,
                "inc-1",
                self.further,
                tenant=TENANT,
                approval_id=self.approval,
                now_ms=NOW_MS,
            )
        )
        self.lines: list[bytes] = []
        head = audit.EMPTY
        for number in range(40):
            line, head = audit.encode_event(
                head, wall_s=NOW_MS / 1000 - 20 + number, action="event", fields={"number": number}
            )
            self.lines.append(line)

    def rows(self) -> list[SharedRow]:
        """All rows, signed by the manager, which is b's agent."""
        term = TermBody(
            agent="agent-b",
            environment="b",
            registry_key=public_text(self.registry_keys["agent-b"]),
            since_ms=NOW_MS,
            cause="test",
        )
        return [
            self.row(Kind.TERM, term_id(1), term),
            *(
                self.row(kind, row_id, body)
                for kind, table in TABLES.items()
                for row_id, body in getattr(self.world.rows, table).items()
            ),
        ]

    def row(self, kind: Kind, row_id: str, body: Body, *, by: str = "agent-b", term: int = 1) -> SharedRow:
        return sign_row(
            self.registry_keys[by],
            tenant=TENANT,
            kind=kind,
            row_id=row_id,
            body=body,
            term=term,
            epoch=self.world.rows.epoch,
            signer=by,
        )

    def head(self, digest: str, *, by: str = "agent-b", term: int = 1) -> str:
        epoch = self.world.rows.epoch
        key = self.registry_keys[by]
        return sign_head(key, tenant=TENANT, term=term, epoch=epoch, digest=digest).signature

    def write(self, rows: list[SharedRow] | None = None, **more: Any) -> bytes:
        rows = self.rows() if rows is None else rows
        more.setdefault("digest", digest_of((row.key, row_digest(row)) for row in rows))
        found: dict[str, Any] = {
            "tenant": TENANT,
            "incident_id": "inc-1",
            "rows": rows,
            "term": 1,
            "epoch": self.world.rows.epoch,
            "head_signature": self.head(more["digest"]),
            "audit_lines": b"".join(self.lines[10:]),
            "acknowledgements": [{"environment": "b", "clear": True}],
            "made_at_ms": NOW_MS,
            "key": self.signing.key,
            "chain": [self.signing.certificate],
        }
        return write_bundle(**(found | more))

    def verify(self, content: bytes) -> Account:
        return verify_bundle(content, root=self.tenant.root.certificate, tenant=TENANT)


@pytest.fixture(scope="module")
def acme() -> Tenant:
    return make_tenant(TENANT)


@pytest.fixture
def case(acme: Tenant) -> Case:
    return Case(acme)


def test_a_stranger_reads_what_happened(case: Case) -> None:
    found = case.verify(case.write())
    assert found.incident.reason == "IR-2214"
    assert found.evidence.made_by == "agent-b"
    assert found.approved_by == {case.approval: ("ada", "bob")}
    states = {key_id: found.key_states[key_id] for key_id in found.keys}
    assert states[case.world.dek["s3-a"]] is KeyState.COMPROMISED
    assert states[case.further[0]] is KeyState.COMPROMISED
    assert states[case.world.dek["box-c"]] is KeyState.ACTIVE
    assert (found.audit_from.seq, found.audit_to.seq) == (10, 40)
    assert set(found.environments) == {"a", "b", "c"}
    assert found.rows == len(case.rows())


CHANGES: dict[str, Callable[[list[SharedRow]], object]] = {
    "a row left out": lambda rows: rows.pop(),
    "a row twice": lambda rows: rows.append(rows[0]),
    "a newer row": lambda rows: rows.__setitem__(0, msgspec.structs.replace(rows[0], epoch=99)),
    "an edited row": lambda rows: rows.__setitem__(
        0, msgspec.structs.replace(rows[0], body=rows[0].body.replace('"', "'", 1))
    ),
    "another signer": lambda rows: rows.__setitem__(0, msgspec.structs.replace(rows[0], signer="agent-c")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_the_registry_did_not_hold_are_found(case: Case, change: str) -> None:
    """Though whoever put the file together signs it with its own key, and knows the right digest."""
    rows = case.rows()
    digest = digest_of((row.key, row_digest(row)) for row in rows)
    CHANGES[change](rows)
    with pytest.raises((IntegrityError, FormatError)):
        case.verify(case.write(rows, digest=digest))


def test_a_row_of_nobody_is_found(case: Case) -> None:
    rows = case.rows()
    case.registry_keys["agent-b"] = Ed25519PrivateKey.generate()
    rows[-1] = case.row(rows[-1].kind, rows[-1].id, read_body(rows[-1].kind, rows[-1].body))
    with pytest.raises(IntegrityError, match="signature"):
        case.verify(case.write(rows))


def test_a_row_of_an_agent_that_was_never_the_manager_is_found(case: Case) -> None:
    """The breached environment has a registry key, which stands in the rows; it signs nothing."""
    rows = case.rows()
    (at,) = (at for at, row in enumerate(rows) if row.kind is Kind.INCIDENT)
    body = msgspec.structs.replace(read_body(Kind.INCIDENT, rows[at].body), reason="nothing happened")
    for forged in (
        case.row(Kind.INCIDENT, rows[at].id, body, by="agent-a"),
        case.row(Kind.INCIDENT, rows[at].id, body, by="agent-a", term=2),
    ):
        rows[at] = forged
        with pytest.raises(IntegrityError):
            case.verify(case.write(rows))


def test_a_term_that_nobody_has_approved_is_found(case: Case) -> None:
    rows = case.rows()
    body = TermBody(
        agent="agent-a",
        environment="a",
        registry_key=public_text(case.registry_keys["agent-a"]),
        since_ms=NOW_MS,
        cause="by myself",
        previous=row_digest(rows[0]).hex(),
    )
    rows.append(case.row(Kind.TERM, term_id(2), body, by="agent-a", term=2))
    digest = digest_of((row.key, row_digest(row)) for row in rows)
    head = case.head(digest, by="agent-a", term=2)
    with pytest.raises(IntegrityError, match="why it may begin"):
        case.verify(case.write(rows, digest=digest, term=2, head_signature=head))


def test_the_digest_has_to_be_the_managers_word(case: Case) -> None:
    digest = digest_of((row.key, row_digest(row)) for row in case.rows())
    with pytest.raises(IntegrityError, match="who holds that term"):
        case.verify(case.write(head_signature=case.head(digest, by="agent-a")))


def test_who_the_managers_were_is_said(case: Case) -> None:
    found = case.verify(case.write())
    key = public_text(case.registry_keys["agent-b"])
    assert found.managers == ((1, "agent-b", fingerprint_of(key)),)


def test_a_key_that_is_freer_than_the_incident_left_it_is_found(case: Case) -> None:
    deks = case.world.rows.deks
    for key_id in (case.world.dek["s3-a"], case.further[0]):
        kept = deks[key_id]
        deks[key_id] = msgspec.structs.replace(kept, state=KeyState.ACTIVE)
        with pytest.raises(IntegrityError, match="the incident has made it"):
            case.verify(case.write())
        deks[key_id] = kept


def test_a_key_that_is_missing_is_found(case: Case) -> None:
    del case.world.rows.deks[case.world.dek["s3-a"]]
    with pytest.raises(IntegrityError, match="do not hold key"):
        case.verify(case.write())


def test_an_approval_that_was_none_is_found(case: Case) -> None:
    rows = case.world.rows.approvals
    kept = rows[case.approval]
    one = {"ada": kept.signatures["ada"]}
    for spoiled in (
        msgspec.structs.replace(kept, signatures=one),
        msgspec.structs.replace(kept, used_at_ms=kept.expires_at_ms),
        msgspec.structs.replace(kept, payload=payload_text({"keys": []})),
        msgspec.structs.replace(kept, used_at_ms=None),
    ):
        rows[case.approval] = spoiled
        with pytest.raises(IntegrityError):
            case.verify(case.write())


@pytest.mark.parametrize("change", ["cut out", "edited", "torn", "exchanged", "empty", "no event"])
def test_an_audit_log_that_is_not_one_piece_is_found(case: Case, change: str) -> None:
    lines = case.lines[10:]
    match change:
        case "cut out":
            del lines[5]
        case "edited":
            lines[5] = lines[5].replace(b"event", b"never")
        case "torn":
            lines[-1] = lines[-1][:-1]
        case "exchanged":
            lines[3], lines[4] = lines[4], lines[3]
        case "empty":
            lines = []
        case "no event":
            lines = [b"hello\n", *lines]
    with pytest.raises((IntegrityError, FormatError)):
        case.verify(case.write(audit_lines=b"".join(lines)))


def test_an_incident_that_the_rows_do_not_know_is_none(case: Case) -> None:
    with pytest.raises(IntegrityError, match="no incident inc-9"):
        case.verify(case.write(incident_id="inc-9"))


def test_an_extract_begins_just_before_the_moment(case: Case) -> None:
    since_ms = NOW_MS - 5_000
    extract = audit_extract(case.lines, since_ms=since_ms)
    lines = extract.splitlines(keepends=True)
    assert lines == case.lines[14:], "the last one before it, and everything after"
    assert audit_extract(case.lines, since_ms=0) == b"".join(case.lines)
    assert audit_extract(case.lines, since_ms=NOW_MS * 2) == case.lines[-1]
