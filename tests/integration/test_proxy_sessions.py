"""TLS sessions with a service, counted by the service: taken up by the tenant that made them, by no other."""

import ssl
from pathlib import Path

import pytest

from proxy.tenants.model import ServiceEntry
from tests import pki
from tests.fakes.origin import RecordingOrigin
from tests.integration.proxy_rig import proxy


@pytest.mark.parametrize("mode", ["forward", "reverse"])
async def test_a_tenants_next_connection_resumes_and_another_tenants_does_not(
    tmp_path: Path, mode: str
) -> None:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server"))
    async with RecordingOrigin(tls).listening() as origin, proxy(tmp_path, ca_file) as rig:
        services = []
        for tenant in ("acme", "beta"):
            rig.tenant(tenant)
            services.append(rig.service(f"{tenant}/files", f"https://localhost:{origin.port}"))
            rig.push(services[-1].owner)
        acme, beta = services
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())

        async def resumed_by(service: ServiceEntry) -> int:
            before = tls.session_stats()["hits"]
            answer = await rig.ask(service, "/x", "-X", "DELETE", mode=mode)
            assert answer.exit_code == 0, answer.error
            return tls.session_stats()["hits"] - before

        assert await resumed_by(acme) == 0
        assert await resumed_by(acme) == 1
        assert await resumed_by(acme) == 1
        assert await resumed_by(beta) == 0
        assert await resumed_by(beta) == 1
