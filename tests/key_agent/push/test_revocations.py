"""Revocation lists: what is in one, what has to be, and what a new file cannot do."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import certs.pki
from envelope.certificates import CertificateError
from key_agent.push.revocations import Revocations
from tests.key_agent.push.revocation_lists import LAST_UPDATE, make_list, write_lists
from tests.pki import Tenant, make_tenant

NOW_S = (LAST_UPDATE + timedelta(days=1)).timestamp()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "revoked.crl"


def _code(revocations: Revocations, acme: Tenant, leaf: x509.Certificate, now_s: float = NOW_S) -> str:
    try:
        revocations.check((leaf, acme.root.certificate), now_s=now_s)
    except CertificateError as error:
        return error.code
    return "good"


def test_what_is_in_the_list_is_refused_and_nothing_else(acme: Tenant, path: Path) -> None:
    bad, good = acme.service("s3").certificate, acme.service("s3").certificate
    write_lists(path, make_list(acme.root, [bad]))
    revocations = Revocations(path, acme.root.certificate)
    assert revocations.problem is None
    assert _code(revocations, acme, bad) == "revoked"
    assert _code(revocations, acme, good) == "good"
    assert revocations.next_update() == LAST_UPDATE + timedelta(days=3650)


def test_der_is_read_too(acme: Tenant, path: Path) -> None:
    leaf = acme.service("s3").certificate
    path.write_bytes(make_list(acme.root, [leaf]).public_bytes(Encoding.DER))
    assert _code(Revocations(path, acme.root.certificate), acme, leaf) == "revoked"


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"-----BEGIN X509 CRL-----\nxx\n"])
def test_without_a_list_nobody_is_believed(acme: Tenant, path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    revocations = Revocations(path, acme.root.certificate)
    assert revocations.problem is not None
    assert str(path) in revocations.problem
    assert _code(revocations, acme, acme.service("s3").certificate) == "revocation-list"


def test_a_list_that_has_ended_or_not_begun_refuses_everybody(acme: Tenant, path: Path) -> None:
    leaf = acme.service("s3").certificate
    write_lists(path, make_list(acme.root, days=7))
    revocations = Revocations(path, acme.root.certificate)
    end_s = (LAST_UPDATE + timedelta(days=7)).timestamp()
    assert _code(revocations, acme, leaf, end_s) == "good"
    assert _code(revocations, acme, leaf, end_s + 1) == "revocation-list"
    assert _code(revocations, acme, leaf, LAST_UPDATE.timestamp() - 31) == "revocation-list"


def test_anothers_list_under_the_roots_name_is_refused(acme: Tenant, path: Path) -> None:
    leaf = acme.service("s3").certificate
    impostor = make_tenant("acme")
    assert impostor.root.certificate.subject == acme.root.certificate.subject
    write_lists(path, make_list(impostor.root))
    revocations = Revocations(path, acme.root.certificate)
    assert _code(revocations, acme, leaf) == "revocation-list"
    assert "not signed" in str(revocations.problem)


def test_a_new_file_replaces_the_list_only_if_it_is_good_and_newer(acme: Tenant, path: Path) -> None:
    leaf = acme.service("s3").certificate
    write_lists(path, make_list(acme.root, last_update=LAST_UPDATE))
    revocations = Revocations(path, acme.root.certificate)
    assert not revocations.refresh(), "it has not changed"
    for worse in (
        [make_list(acme.root, [leaf], last_update=LAST_UPDATE - timedelta(days=1))],
        [make_list(make_tenant("acme").root, [leaf])],
        [],
    ):
        write_lists(path, *worse)
        assert not revocations.refresh()
        assert revocations.problem is not None
        assert _code(revocations, acme, leaf) == "good", "the one before counts"
    write_lists(path, make_list(acme.root, [leaf], last_update=LAST_UPDATE + timedelta(hours=1)))
    assert revocations.refresh()
    assert revocations.problem is None
    assert _code(revocations, acme, leaf) == "revoked"


def test_a_list_about_a_part_and_two_lists_of_one_issuer_are_refused(acme: Tenant, path: Path) -> None:
    partial = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=False,
        only_contains_ca_certs=True,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    write_lists(path, make_list(acme.root, extension=partial))
    assert "part" in str(Revocations(path, acme.root.certificate).problem)
    write_lists(path, make_list(acme.root), make_list(acme.root))
    assert "two" in str(Revocations(path, acme.root.certificate).problem)


def test_a_chain_whose_authority_has_no_list_is_refused(acme: Tenant, path: Path) -> None:
    write_lists(path, make_list(acme.root))
    revocations = Revocations(path, acme.root.certificate)
    other = make_tenant("globex")
    with pytest.raises(CertificateError, match="no revocation list of its issuer"):
        revocations.check(
            (other.service("s3").certificate, other.root.certificate, acme.root.certificate), now_s=NOW_S
        )


def test_the_list_of_an_authority_below_the_root_is_its_own_word(acme: Tenant, path: Path) -> None:
    """Whoever writes the file could else take back what it has revoked, under its name."""
    subject = certs.pki.name("acme agents", "acme")
    below, impostor = (certs.pki.make_ca(subject, issuer=acme.root) for _ in range(2))
    leaf = certs.pki.make_ca(certs.pki.name("leaf"), issuer=below).certificate
    chain = (leaf, below.certificate, acme.root.certificate)

    def code(*lists: x509.CertificateRevocationList) -> str:
        write_lists(path, make_list(acme.root), *lists)
        try:
            Revocations(path, acme.root.certificate).check(chain, now_s=NOW_S)
        except CertificateError as error:
            return error.code
        return "good"

    assert code(make_list(below)) == "good"
    assert code(make_list(impostor)) == "revocation-list"
    assert code() == "revocation-list"
    assert code(make_list(below, [leaf])) == "revoked"


def test_the_standing_changes_with_each_of_several_lists(acme: Tenant, path: Path) -> None:
    """Whoever keeps a connection open judges it anew when this differs: also by the list that ends second."""
    other = make_tenant("globex")
    write_lists(path, make_list(acme.root, days=7), make_list(other.root, days=3))
    revocations = Revocations(path, acme.root.certificate)

    def at(days: float) -> object:
        return revocations.standing(now_s=(LAST_UPDATE + timedelta(days=days)).timestamp())

    several = [at(1), at(4), at(8)]
    assert [several.index(one) for one in several] == [0, 1, 2]
    assert (at(1), at(4)) == (at(2), at(6)), "nothing ends in between"
    assert at(-1) != at(1), "nor had they begun"


def test_a_file_that_is_damaged_anywhere_ends_nothing(acme: Tenant, path: Path) -> None:
    """Lists are fetched from anywhere, unauthenticated: what is no good is told, the good one stays."""
    leaf = acme.service("s3").certificate
    write_lists(path, make_list(acme.root, [leaf]))
    revocations = Revocations(path, acme.root.certificate)
    good = make_list(acme.root, [leaf]).public_bytes(Encoding.DER)
    told = 0
    for at in range(len(good)):
        for value in (7, good[at] ^ 0x80):
            damaged = bytearray(good)
            damaged[at] = value
            path.write_bytes(damaged)
            revocations.refresh()
            told += revocations.problem is not None
            assert _code(revocations, acme, leaf) in ("revoked", "revocation-list")
    assert told > len(good)
