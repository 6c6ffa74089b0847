"""Who speaks is what the tenant's own root says, at any time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs import pki
from envelope.certificates import Role
from proxy.api.authentication import authenticate
from proxy.tenants.model import Directory
from runtime.serve import ProblemError
from tests.proxy.keys.hosting import HostedTenant, agent_certified_by, directory_of, host_tenant

NOW_S = 1_800_000_000.0


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
def rival(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path, "rival")


def test_an_agent_is_told_by_its_certificate(acme: HostedTenant) -> None:
    peer = authenticate(acme.tls.certificate, directory_of(acme), now_s=NOW_S)
    assert (peer.tenant, peer.role, peer.name) == ("acme", Role.AGENT_TLS, acme.agent_id)


def test_whoever_else_is_refused_and_told_why(
    acme: HostedTenant, rival: HostedTenant, tmp_path: Path
) -> None:
    stranger = host_tenant(tmp_path, "stranger")
    for certificate, now_s, code in (
        (None, NOW_S, "no-certificate"),
        (stranger.tls.certificate, NOW_S, "tenant"),
        (agent_certified_by(rival, "acme").certificate, NOW_S, "certificate-chain"),
        (acme.signing.certificate, NOW_S, "certificate-role"),
        (acme.tls.certificate, 3e9, "certificate-expired"),
    ):
        with pytest.raises(ProblemError) as refused:
            authenticate(certificate, directory_of(acme, rival), now_s=now_s)
        assert (refused.value.status, refused.value.code) == (403, code)


def test_what_two_certificates_prove_is_worked_out_once(acme: HostedTenant) -> None:
    first = authenticate(acme.tls.certificate, directory_of(acme), now_s=NOW_S)
    der = acme.tls.certificate.public_bytes(Encoding.DER)
    # Another connection has parsed it anew, and the directory was read again.
    again = authenticate(x509.load_der_x509_certificate(der), directory_of(acme), now_s=NOW_S + 60)
    assert again is first


def test_who_was_let_in_is_let_in_by_today_s_directory_and_clock_alone(
    acme: HostedTenant, rival: HostedTenant, tmp_path: Path
) -> None:
    begin = datetime.fromtimestamp(NOW_S, UTC)
    hour, day = timedelta(hours=1), timedelta(days=1)

    def certified(root: pki.Credential, valid_from: datetime, validity: timedelta) -> x509.Certificate:
        made = pki.issue_agent_tls(root, "acme", "hq", valid_from=valid_from, validity=validity)
        return made.certificate

    def under(root: x509.Certificate) -> Directory:
        return Directory.of(1, [replace(acme.entry(), root_certificate=root)], [])

    mine = acme.pki.root
    brief_root = pki.make_root("acme", valid_from=begin - hour, validity=day)
    usual, brief_leaf = certified(mine, begin - day, 9 * day), certified(mine, begin - hour, day)
    long_leaf = certified(brief_root, begin - 2 * day, 9 * day)
    # The same names, and a key of its own.
    other_root = pki.make_root("acme", valid_from=begin - day, validity=9 * day).certificate
    for certificate, good, changed, now_s, code in (
        (usual, directory_of(acme), directory_of(rival), NOW_S, "tenant"),
        (usual, directory_of(acme), under(other_root), NOW_S, "certificate-chain"),
        (brief_leaf, directory_of(acme), directory_of(acme), NOW_S + 86_400, "certificate-expired"),
        (brief_leaf, directory_of(acme), directory_of(acme), NOW_S - 3_601, "certificate-not-yet-valid"),
        (long_leaf, under(brief_root.certificate), None, NOW_S + 86_400, "certificate-chain"),
        (long_leaf, under(brief_root.certificate), None, NOW_S - 3_601, "certificate-chain"),
    ):
        assert authenticate(certificate, good, now_s=NOW_S).name == "hq"
        with pytest.raises(ProblemError) as refused:
            authenticate(certificate, changed or good, now_s=now_s)
        assert refused.value.code == code
        assert authenticate(certificate, good, now_s=NOW_S).name == "hq"
