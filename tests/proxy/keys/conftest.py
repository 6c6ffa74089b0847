"""Two tenants, and a proxy that hosts both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.keys.hosting import HostedTenant, directory_of, host_tenant
from tests.proxy.keys.receiving import Proxy


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
def rival(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path, "rival")


@pytest.fixture
def proxy(acme: HostedTenant, rival: HostedTenant, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(directory_of(acme, rival), tmp_path)
    yield proxy
    proxy.audit.close()
