"""An OpenBao and a KMIP server for each file of tests."""

from collections.abc import Iterator

import pytest

from key_agent.sources.servers.server import KeyServer
from tests.key_agent.sources.servers.subjects import Subject, of_bao, of_kmip
from tests.key_servers import BaoServer, KmipServer, running


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaoServer]:
    with running(BaoServer(tmp_path_factory.mktemp("bao") / "server")) as server:
        yield server


@pytest.fixture(scope="module")
def kmip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmipServer]:
    with running(KmipServer(tmp_path_factory.mktemp("kmip") / "server")) as server:
        yield server


@pytest.fixture(params=["bao", "kmip"])
def subject(request: pytest.FixtureRequest) -> Subject:
    made = request.getfixturevalue(request.param)
    return of_bao(made) if isinstance(made, BaoServer) else of_kmip(made)


@pytest.fixture
def server(subject: Subject) -> Iterator[KeyServer]:
    made = subject.connect()
    yield made
    made.close()
