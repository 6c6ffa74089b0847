"""Who speaks is what the tenant's own root says, at any time."""

from pathlib import Path

import pytest

from envelope.certificates import Role
from proxy.api.authentication import authenticate
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
