"""Keys that change their KEK in the registry: in one transaction, only to the KEK of today, only to open."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from envelope.errors import MisuseError
from envelope.keys import KeyId, KeyState, NetworkService
from key_agent.registry.model import Proxy
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError, Registry
from key_agent.sources.source import Kek, KekReference, WrapMethod, WrappedKey

NOW_MS = 1_800_000_000_000
S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await Registry.open(
        url,
        tenant_id="acme",
        environment_id="main",
        agent_id="hq",
        now_ms=NOW_MS,
    )
    yield opened
    await opened.close()


def _reference(kek_id: str) -> KekReference:
    return KekReference(
        kek_id=kek_id, label=f"sealgate-{kek_id}", object_id=kek_id.encode(), environment_id="main"
    )


def _key(owner: NetworkService, kek_id: str) -> WrappedKey:
    return WrappedKey(
        owner=owner,
        key_id=KeyId.random(),
        kek_id=kek_id,
        environment_id="main",
        method=WrapMethod.GCM,
        wrapped=os.urandom(60),
        kcv=os.urandom(16),
        token_serial="serial",
        created_at_ms=NOW_MS,
    )


def _under(key: WrappedKey, kek_id: str) -> WrappedKey:
    return replace(key, kek_id=kek_id, wrapped=os.urandom(60))


async def _next_kek(registry: Registry, kek_id: str, *keys: WrappedKey) -> None:
    current = await registry.current_kek()
    if current is not None:
        await registry.set_kek_state(current.reference.kek_id, KekState.REVOKED, "why", now_ms=NOW_MS)
    await registry.begin_kek(_reference(kek_id), now_ms=NOW_MS)
    made = Kek(
        reference=_reference(kek_id),
        method=WrapMethod.GCM,
        token_serial="serial",
        canary_ciphertext=b"canary",
        canary_sha256=b"sha",
        created_at_ms=NOW_MS,
    )
    await registry.complete_kek(made, keys, now_ms=NOW_MS)


async def _two_keks(registry: Registry) -> tuple[list[WrappedKey], list[WrappedKey]]:
    """S3 and BOX with a key each under k1, and, since that was revoked, one each under k2."""
    old = [_key(S3, "k1"), _key(BOX, "k1")]
    await _next_kek(registry, "k1")
    await registry.add_proxy(Proxy(id="p1", url="https://p.example", ca_pem="CA"), now_ms=NOW_MS)
    for key in old:
        await registry.add_service(key.owner, proxy_id="p1", certificate_pem="PEM", key=key, now_ms=NOW_MS)
    new = [_key(S3, "k2"), _key(BOX, "k2")]
    await _next_kek(registry, "k2", *new)
    return old, new


async def test_a_moved_key_opens_and_seals_nothing(registry: Registry) -> None:
    old, new = await _two_keks(registry)
    assert await registry.move_wraps("k1", [_under(old[0], "k2")], now_ms=NOW_MS) == 1
    _, made = await registry.reserve([S3, BOX], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1)
    pushed = {item.owner: {key.key_id: state for key, state in item.keys} for item in made}
    assert pushed[S3] == {old[0].key_id: KeyState.DEACTIVATED, new[0].key_id: KeyState.ACTIVE}
    assert pushed[BOX] == {new[1].key_id: KeyState.ACTIVE}, "not yet moved"
    assert [key.key_id for key in await registry.wrapped_keys("k1")] == [old[1].key_id]
    assert await registry.wraps_under("k1") == 1


async def test_only_to_the_active_kek_of_today(registry: Registry) -> None:
    old, _ = await _two_keks(registry)
    for wrong in ("k1", "k3"):
        with pytest.raises(RefusedChangeError, match="another one"):
            await registry.move_wraps("k1", [_under(old[0], wrong)], now_ms=NOW_MS)
    await registry.set_kek_state("k2", KekState.REVOKED, "why", now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="revoked"):
        await registry.move_wraps("k1", [_under(old[0], "k2")], now_ms=NOW_MS)
    assert await registry.wraps_under("k1") == 2


async def test_an_erased_key_does_not_come_back(registry: Registry) -> None:
    old, _ = await _two_keks(registry)
    await registry.remove_service(S3, now_ms=NOW_MS)
    moved = [_under(key, "k2") for key in old]
    assert await registry.move_wraps("k1", moved, now_ms=NOW_MS) == 1
    found = {key.key_id: (key.state, key.wrapped_by) for key in await registry.data_keys()}
    assert found[old[0].key_id] == (KeyState.DESTROYED, ())
    assert found[old[1].key_id] == (KeyState.DEACTIVATED, ("k2",))


async def test_a_retired_kek_stands_beside_the_current_one_and_never_returns(registry: Registry) -> None:
    old, _ = await _two_keks(registry)
    with pytest.raises(RefusedChangeError, match="2 keys are still wrapped"):
        await registry.retire_kek("k1", "why", now_ms=NOW_MS)
    await registry.move_wraps("k1", [_under(key, "k2") for key in old], now_ms=NOW_MS)
    await registry.retire_kek("k1", "its keys moved", now_ms=NOW_MS)
    await registry.retire_kek("k1", "again", now_ms=NOW_MS)
    states = [(row.reference.kek_id, row.state, row.reason) for row in await registry.keks()]
    assert states == [("k1", KekState.RETIRED, "its keys moved"), ("k2", KekState.ACTIVE, None)]
    for state in KekState:
        if state is not KekState.RETIRED:
            with pytest.raises(MisuseError):
                await registry.set_kek_state("k1", state, "why", now_ms=NOW_MS)
    # Another revocation, another KEK: three rows, one of them current.
    await _next_kek(registry, "k3")
    current = await registry.current_kek()
    assert current is not None
    assert current.reference.kek_id == "k3"
    with pytest.raises(MisuseError):
        await registry.retire_kek("k3", "in use", now_ms=NOW_MS)
