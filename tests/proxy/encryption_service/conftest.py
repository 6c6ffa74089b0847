from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.encryption_service.service_rig import ServiceRig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServiceRig]:
    rig = ServiceRig(tmp_path)
    yield rig
    rig.close()
