"""Services at proxies in the registry: what is added, removed, and added again, on both databases."""

from collections.abc import AsyncIterator

import pytest

from envelope.keys import KeyState
from key_agent.registry.store import RefusedChangeError, Registry
from tests.key_agent.registry.records import BOX, NOW_MS, S3, key_of, open_registry, with_services


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


async def test_what_raises_leaves_nothing_behind(registry: Registry) -> None:
    await with_services(registry, S3)
    key = key_of(BOX)
    with pytest.raises(RefusedChangeError):
        await registry.add_service(BOX, proxy_id="p9", certificate_pem="PEM", key=key, now_ms=NOW_MS)
    assert (await registry.book()).services == (S3,)


async def test_a_removed_service_comes_back_with_a_new_key(registry: Registry) -> None:
    [old] = await with_services(registry, S3)
    assert await registry.remove_service(S3, now_ms=NOW_MS) == ["p1"]
    assert not await registry.has_active_key(S3)
    [new] = await with_services(registry, S3)
    states = {key.key_id: key.state for key in await registry.data_keys()}
    assert states == {old.key_id: KeyState.DESTROYED, new.key_id: KeyState.ACTIVE}
    with pytest.raises(RefusedChangeError, match="no network service"):
        await registry.remove_service(BOX, now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="at proxy"):
        await registry.remove_service(S3, proxy_id="p7", now_ms=NOW_MS)


async def test_a_second_key_never_is_active_beside_the_first(registry: Registry) -> None:
    await with_services(registry, S3)
    await registry.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=key_of(S3), now_ms=NOW_MS)
    states = [key.state for key in await registry.data_keys()]
    assert states == [KeyState.DEACTIVATED, KeyState.ACTIVE]
