"""The calls of the KACLS API, as a browser, an admin and another KACLS make them; and each that must fail."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.proxy.encryption_service.dialects.kacls_rig import KaclsRig, new_key, ok, unb64


@pytest.fixture
async def kacls(tmp_path: Path) -> AsyncIterator[KaclsRig]:
    rig = KaclsRig(tmp_path)
    await rig.fetch_keys()
    yield rig
    await rig.issuer_keys.aclose()
    rig.close()


def test_what_was_wrapped_is_unwrapped(kacls: KaclsRig) -> None:
    for size in (1, 16, 32, 128):
        key = new_key()[:1] * size
        wrapped = kacls.wrapped(key)
        assert len(wrapped) <= 1024
        assert unb64(ok(kacls.unwrap(wrapped))["key"]) == key
