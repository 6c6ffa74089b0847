"""KEKs in the registry: named before they are made, replaced once they are over, on both databases."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from envelope.errors import MisuseError
from envelope.keys import KeyState
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from tests.key_agent.registry.records import (
    NOW_MS,
    S3,
    add_kek,
    kek_of,
    key_of,
    open_registry,
    reference_of,
    reserve,
    with_services,
)


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


async def test_a_kek_is_named_before_it_is_made(registry: Registry) -> None:
    assert await registry.begin_kek(reference_of("k1"), now_ms=NOW_MS) == (reference_of("k1"), False)
    assert await registry.current_kek() is None
    # After a crash: the same name, and the word that the HSM may hold it half-made.
    assert await registry.begin_kek(reference_of("k2"), now_ms=NOW_MS) == (reference_of("k1"), True)
    await registry.complete_kek(kek_of("k1"), [], now_ms=NOW_MS)
    row = await registry.current_kek()
    assert row is not None
    assert (row.kek, row.state, row.version) == (kek_of("k1"), KekState.ACTIVE, 1)


async def test_a_new_kek_needs_the_old_ones_end(registry: Registry) -> None:
    await with_services(registry, S3)
    await registry.begin_kek(reference_of("k2"), now_ms=NOW_MS)
    with pytest.raises(MisuseError):
        await registry.complete_kek(kek_of("k2"), [], now_ms=NOW_MS)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    new = key_of(S3, "k2")
    await registry.complete_kek(kek_of("k2"), [new], now_ms=NOW_MS)
    assert [row.state for row in await registry.keks()] == [KekState.DEACTIVATED, KekState.ACTIVE]
    old_key, new_key = await registry.data_keys()
    assert (old_key.state, old_key.wrapped_by) == (KeyState.DEACTIVATED, ("k1",))
    assert (new_key.state, new_key.wrapped_by, new_key.version) == (KeyState.ACTIVE, ("k2",), 2)
    _, [reservation] = await reserve(registry, S3)
    assert [key.key_id for key, _ in reservation.keys] == [new.key_id], "old wraps do not travel"
    assert [key.key_id for key in await registry.wrapped_keys("k1")] == [old_key.key_id]


async def test_moved_wraps_make_an_old_key_travel_again(registry: Registry) -> None:
    [old] = await with_services(registry, S3)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    new = key_of(S3, "k2")
    await add_kek(registry, "k2", new)
    moved = replace(old, kek_id="k2", wrapped=os.urandom(60))
    assert await registry.move_wraps("k1", [moved], now_ms=NOW_MS) == 1
    assert await registry.move_wraps("k1", [moved], now_ms=NOW_MS) == 0, "the old wrap is gone: done before"
    assert {key.key_id: key.wrapped_by for key in await registry.data_keys()}[old.key_id] == ("k2",)
    _, [reservation] = await reserve(registry, S3)
    assert {(key.key_id, state) for key, state in reservation.keys} == {
        (old.key_id, KeyState.DEACTIVATED),
        (new.key_id, KeyState.ACTIVE),
    }
