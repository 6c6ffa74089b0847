"""Fixtures of the gate's tests on real sockets; `tests/proxy/gate/harness.py` has the rest."""

from collections.abc import Iterator

import pytest

from proxy import gate
from tests.proxy.gate.harness import IS_STOCK, Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("gate"))


@pytest.fixture
def guarded() -> Iterator[None]:
    """The gate, for the time of one test. Not where the tests prove that they need it."""
    if IS_STOCK:
        yield
        return
    gate.install()
    yield
    gate.uninstall()
