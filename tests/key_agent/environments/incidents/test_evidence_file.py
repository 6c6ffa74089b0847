"""Evidence proves itself under the root alone, and no bit of it can be another one."""

import io
import zipfile
from datetime import UTC, datetime

import pytest
from cryptography import x509

from certs.pki import Credential
from envelope.certificates import CertificateError
from envelope.errors import FormatError, IntegrityError, SealgateError
from key_agent.environments.incidents import evidence_file
from key_agent.environments.incidents.evidence_file import read_evidence, write_evidence
from tests.pki import Tenant, make_tenant

MADE_AT_MS = 1_800_000_000_000
PARTS = {"rows.jsonl": b'{"kind":"incident"}\n', "audit/hq.jsonl": b"line\n", "empty": b""}


@pytest.fixture(scope="module")
def signing(acme: Tenant) -> Credential:
    found = acme.agent_signing("hq")
    return Credential(found.key, found.certificate)


@pytest.fixture(scope="module")
def acme() -> Tenant:
    return make_tenant("acme")


def write(signing: Credential, *, made_at_ms: int = MADE_AT_MS, tenant: str = "acme") -> bytes:
    return write_evidence(
        PARTS,
        tenant=tenant,
        subject="inc-7",
        made_at_ms=made_at_ms,
        key=signing.key,
        chain=[signing.certificate],
    )


def test_what_was_written_is_read_and_by_whom(acme: Tenant, signing: Credential) -> None:
    found = read_evidence(write(signing), root=acme.root.certificate)
    assert (found.tenant, found.subject, found.made_at_ms, found.made_by) == (
        "acme",
        "inc-7",
        MADE_AT_MS,
        "hq",
    )
    assert found.parts == PARTS


def test_any_program_opens_it(signing: Credential) -> None:
    with zipfile.ZipFile(io.BytesIO(write(signing))) as archive:
        assert archive.testzip() is None
        assert archive.read("rows.jsonl") == PARTS["rows.jsonl"]


def test_every_flipped_bit_is_found(acme: Tenant, signing: Credential) -> None:
    content = write(signing)
    for position in range(len(content)):
        for bit in range(8):
            spoiled = bytearray(content)
            spoiled[position] ^= 1 << bit
            with pytest.raises(SealgateError):
                read_evidence(bytes(spoiled), root=acme.root.certificate)


def test_every_cut_and_every_addition_is_found(acme: Tenant, signing: Credential) -> None:
    content = write(signing)
    for length in range(len(content)):
        with pytest.raises(SealgateError):
            read_evidence(content[:length], root=acme.root.certificate)
    for other in (content + b"\0", b"\0" + content, content + content):
        with pytest.raises(SealgateError):
            read_evidence(other, root=acme.root.certificate)


@pytest.mark.parametrize("change", ["left out", "added", "exchanged", "twice"])
def test_parts_that_the_manifest_does_not_list_are_refused(
    change: str, acme: Tenant, signing: Credential
) -> None:
    with zipfile.ZipFile(io.BytesIO(write(signing))) as archive:
        files = {one.filename: archive.read(one) for one in archive.infolist()}
    match change:
        case "left out":
            del files["empty"]
        case "added":
            files["more"] = b""
        case "exchanged":
            files["rows.jsonl"], files["audit/hq.jsonl"] = files["audit/hq.jsonl"], files["rows.jsonl"]
    content = evidence_file._pack(files)
    if change == "twice":
        stream = io.BytesIO(content)
        with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("empty", b"")
        content = stream.getvalue()
    with pytest.raises(IntegrityError):
        read_evidence(content, root=acme.root.certificate)


def test_only_an_agents_signing_key_of_that_tenant_counts(acme: Tenant, signing: Credential) -> None:
    other = make_tenant("acme")
    with pytest.raises(CertificateError, match="root"):
        read_evidence(write(signing), root=other.root.certificate)
    with pytest.raises(CertificateError):
        read_evidence(write(signing), root=acme.root.certificate, tenant="globex")
    with pytest.raises(CertificateError):  # it says it is another tenant's
        read_evidence(write(signing, tenant="globex"), root=acme.root.certificate)
    tls = acme.agent_tls("hq")
    with pytest.raises(CertificateError, match="role"):
        read_evidence(write(Credential(tls.key, tls.certificate)), root=acme.root.certificate)
    stranger = acme.agent_signing("other")
    with pytest.raises(IntegrityError):  # another's certificate beside the own signature
        read_evidence(write(Credential(signing.key, stranger.certificate)), root=acme.root.certificate)


def test_certificates_are_judged_at_the_moment_it_was_made(acme: Tenant, signing: Credential) -> None:
    late = int(datetime(2060, 1, 1, tzinfo=UTC).timestamp() * 1000)
    assert isinstance(signing.certificate, x509.Certificate)
    with pytest.raises(CertificateError):
        read_evidence(write(signing, made_at_ms=late), root=acme.root.certificate)


@pytest.mark.parametrize("content", [b"", b"PK\5\6" + bytes(18), b"\0" * 100, b"{}"])
def test_what_is_no_evidence_is_told_apart(content: bytes, acme: Tenant) -> None:
    with pytest.raises(FormatError):
        read_evidence(content, root=acme.root.certificate)


def test_an_archive_that_unpacks_to_more_than_it_is_long_is_not_read(acme: Tenant) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", bytes(50 << 20))
    with pytest.raises(FormatError, match="no archive"):
        read_evidence(stream.getvalue(), root=acme.root.certificate)
