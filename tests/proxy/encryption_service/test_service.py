"""The service of one process over real listeners: dialects as named, pictures taken over, calls counted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from proxy.encryption_service.model import DialectName, Op
from proxy.encryption_service.service import EncryptionService
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings, QuotaSettings
from tests.proxy.encryption_service.service_rig import ServiceRig

PLAINTEXT = {"plaintext": "aGVsbG8="}


def plain(*names: DialectName) -> ListenSettings:
    return ListenSettings(host="127.0.0.1", port=0, plain=True, dialects=names)


@asynccontextmanager
async def running(
    rig: ServiceRig, settings: EncryptionServiceSettings, *, processes: int = 1
) -> AsyncIterator[EncryptionService]:
    service = EncryptionService(
        settings,
        state_dir=rig.audit_file.parent,
        keys=rig.keys,
        audit=rig.audit,
        clock=rig.clock,
        directory=rig.directory,
        processes=processes,
    )
    service.start()
    try:
        yield service
    finally:
        await service.stop(grace_s=0)


@pytest.fixture
def rig(tmp_path: Path) -> ServiceRig:
    rig = ServiceRig(tmp_path)
    rig.add_dialect(DialectName.TRANSIT)
    rig.push(rig.add_key("orders"))
    return rig


async def encrypt(port: int, token: str, key: str = "orders") -> tuple[int, dict[str, object]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"http://127.0.0.1:{port}/v1/transit/encrypt/{key}",
            json=PLAINTEXT,
            headers={"X-Vault-Token": token},
        ) as answer,
    ):
        document: dict[str, object] = await answer.json()
        return answer.status, document


async def test_each_listener_speaks_the_dialects_it_names(rig: ServiceRig) -> None:
    token = rig.add_bearer(DialectName.TRANSIT)
    settings = EncryptionServiceSettings(listen=(plain(DialectName.TRANSIT), plain(DialectName.XKS)))
    async with running(rig, settings) as service:
        transit, xks = service.ports
        assert (await encrypt(transit, token))[0] == 200
        status, document = await encrypt(xks, token)
        assert status == 404
        assert "errorName" in document  # XKS does not talk transit, and says so in its own words
        assert service.problems == []
        registry = CollectorRegistry()
        registry.register(service.metrics)
        text = generate_latest(registry).decode()
        assert (
            'sealgate_service_requests_total{dialect="transit",operation="encrypt",outcome="ok"} 1.0' in text
        )
        assert 'sealgate_service_answers_total{dialect="xks",status="404"} 1.0' in text
    assert [record["operation"] for record in rig.records()][:1] == ["encrypt"]


async def test_a_change_of_the_directory_counts_from_the_next_call(rig: ServiceRig) -> None:
    settings = EncryptionServiceSettings(listen=(plain(DialectName.TRANSIT),))
    async with running(rig, settings) as service:
        (port,) = service.ports
        token = rig.add_bearer(DialectName.TRANSIT, operations=frozenset({Op.ENCRYPT}))
        assert (await encrypt(port, token))[0] == 403  # issued, not yet in the picture
        service.apply(rig.directory)
        assert (await encrypt(port, token))[0] == 200
        rig.revoke(token.split(".")[1])
        service.apply(rig.directory)
        assert (await encrypt(port, token))[0] == 403


async def test_quotas_are_the_settings_and_shared_among_processes(rig: ServiceRig) -> None:
    token = rig.add_bearer(DialectName.TRANSIT)
    settings = EncryptionServiceSettings(
        listen=(plain(DialectName.TRANSIT),),
        quota=QuotaSettings(tenant_requests_per_s=1, tenant_burst=8),
    )
    for processes, admitted in ((1, 8), (4, 2)):
        async with running(rig, settings, processes=processes) as service:
            service.apply(rig.directory)
            statuses = [(await encrypt(service.ports[0], token))[0] for _ in range(admitted + 1)]
            assert statuses == [200] * admitted + [429]
