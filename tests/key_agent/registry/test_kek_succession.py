"""One KEK follows another in the registry: never a moment without a current one, no wrap erased too early."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sqlalchemy import update

from envelope.errors import MisuseError
from envelope.keys import KeyState
from key_agent.registry.access import insert_wrap
from key_agent.registry.database import RegistryError
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError, Registry
from key_agent.registry.tables import dek_wrap, kek
from key_agent.sources.source import WrapMethod
from tests.key_agent.registry.records import (
    BOX,
    NOW_MS,
    S3,
    add_kek,
    add_service,
    kek_of,
    key_of,
    open_registry,
    reference_of,
    under,
)


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


async def _stage(registry: Registry, kek_id: str = "k2") -> None:
    await registry.begin_kek(reference_of(kek_id), now_ms=NOW_MS)
    await registry.stage_kek(kek_of(kek_id), now_ms=NOW_MS)


async def _states(registry: Registry) -> dict[str, KekState]:
    return {row.reference.kek_id: row.state for row in await registry.keks()}


async def test_keys_are_wrapped_by_both_until_the_new_one_takes_over(registry: Registry) -> None:
    one, two = await add_service(registry, S3), await add_service(registry, BOX)
    await _stage(registry)
    assert await _states(registry) == {"k1": KekState.ACTIVE, "k2": KekState.STAGED}
    keys, damaged = await registry.keys_to_wrap("k1", "k2")
    assert ({key.key_id for key in keys}, damaged) == ({one.key_id, two.key_id}, [])
    assert await registry.add_wraps([under(one, "k2")], now_ms=NOW_MS) == 1
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 1, "one key is not there yet"
    assert (await _states(registry))["k1"] is KekState.ACTIVE
    kek_now, made = await registry.reserve([S3, BOX], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1)
    assert kek_now.reference.kek_id == "k1"
    assert {key.kek_id for item in made for key, _ in item.keys} == {"k1"}, "pushes come from one KEK"
    with pytest.raises(RefusedChangeError, match="its wraps are needed"):
        await registry.erase_old_wraps("k1")
    await registry.add_wraps([under(one, "k2"), under(two, "k2")], now_ms=NOW_MS)
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 0
    found = await registry.succession()
    assert found.current is not None
    assert found.leaving is not None
    assert (found.current.reference.kek_id, found.coming) == ("k2", None)
    assert (found.leaving.reference.kek_id, found.leaving.rotated_to) == ("k1", "k2")
    with pytest.raises(RefusedChangeError, match="2 keys are still wrapped"):
        await registry.retire_kek("k1", "why", now_ms=NOW_MS)
    assert await registry.erase_old_wraps("k1") == 0
    await registry.retire_kek("k1", "why", now_ms=NOW_MS)
    assert {key.wrapped_by for key in await registry.data_keys()} == {("k2",)}
    assert {key.state for key in await registry.data_keys()} == {KeyState.ACTIVE}
    assert (await registry.succession()).leaving is None


async def test_a_damaged_new_wrap_does_not_count(registry: Registry) -> None:
    key = await add_service(registry, S3)
    await _stage(registry)
    await registry.add_wraps([under(key, "k2")], now_ms=NOW_MS)
    await registry._database.transact(
        lambda c: c.execute(update(dek_wrap).where(dek_wrap.c.kek_id == "k2").values(wrapped=b"rot"))
    )
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 1
    keys, _ = await registry.keys_to_wrap("k1", "k2")
    assert [found.key_id for found in keys] == [key.key_id]
    await registry.add_wraps([under(key, "k2")], now_ms=NOW_MS)
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 0
    await registry._database.transact(
        lambda c: c.execute(update(dek_wrap).where(dek_wrap.c.kek_id == "k2").values(wrapped=b"rot"))
    )
    assert await registry.erase_old_wraps("k1") == 1, "the old wrap is the only sound one"
    with pytest.raises(RefusedChangeError):
        await registry.retire_kek("k1", "why", now_ms=NOW_MS)


async def test_damaged_old_wraps_are_told_apart(registry: Registry) -> None:
    key = await add_service(registry, S3)
    await _stage(registry)
    await registry._database.transact(lambda c: c.execute(update(dek_wrap).values(wrapped=b"rot")))
    assert await registry.keys_to_wrap("k1", "k2") == ([], [key.key_id])
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 1


async def test_a_key_destroyed_meanwhile_does_not_come_back(registry: Registry) -> None:
    key = await add_service(registry, S3)
    await _stage(registry)
    await registry.change_key(S3, key.key_id, KeyState.DEACTIVATED, None, now_ms=NOW_MS)
    await registry.change_key(S3, key.key_id, KeyState.DESTROYED, None, now_ms=NOW_MS)
    assert await registry.add_wraps([under(key, "k2")], now_ms=NOW_MS) == 0
    assert await registry.succeed_kek("k2", now_ms=NOW_MS) == 0
    assert [found.wrapped_by for found in await registry.data_keys()] == [()]


async def test_only_the_staged_kek_takes_over_and_only_from_an_active_one(registry: Registry) -> None:
    key = await add_service(registry, S3)
    with pytest.raises(RefusedChangeError, match="not staged"):
        await registry.add_wraps([under(key, "k2")], now_ms=NOW_MS)
    await registry.begin_kek(reference_of("k2"), now_ms=NOW_MS)
    with pytest.raises(MisuseError):
        await registry.complete_kek(kek_of("k2"), [], now_ms=NOW_MS)
    await registry.stage_kek(kek_of("k2"), now_ms=NOW_MS)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    for work in (
        registry.add_wraps([under(key, "k2")], now_ms=NOW_MS),
        registry.succeed_kek("k2", now_ms=NOW_MS),
    ):
        with pytest.raises(RefusedChangeError, match="revoked"):
            await work
    await registry.abandon_kek("k2", "revoked", now_ms=NOW_MS)
    assert (await _states(registry))["k2"] is KekState.RETIRED
    await registry.abandon_kek("k2", "again", now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError):
        await registry.abandon_kek("k1", "why", now_ms=NOW_MS)


async def test_a_kek_that_gave_way_to_a_lost_one_keeps_its_wraps(registry: Registry) -> None:
    """They may be the last that open: k1 was rotated to k2, and k2 destroyed before k1 was gone."""
    key = await add_service(registry, S3)
    await _stage(registry)
    await registry.add_wraps([under(key, "k2")], now_ms=NOW_MS)
    await registry.succeed_kek("k2", now_ms=NOW_MS)
    await registry.set_kek_state("k2", KekState.REVOKED, "destroyed by others", now_ms=NOW_MS)
    await registry.begin_kek(reference_of("k3"), now_ms=NOW_MS)
    await registry.complete_kek(kek_of("k3"), [key_of(S3, "k3")], now_ms=NOW_MS)
    assert (await registry.succession()).leaving is None
    with pytest.raises(RefusedChangeError, match="needed"):
        await registry.erase_old_wraps("k1")
    assert await registry.wraps_under("k1") == 1


async def test_what_is_known_of_a_kek_is_kept_and_guarded(registry: Registry) -> None:
    made = replace(
        kek_of("k1"),
        method=WrapMethod.RSA_OAEP_256,
        public_key_der=b"0\x82public",
        valid_from_s=1_700_000_000,
        valid_until_s=1_900_000_000,
        is_adopted=True,
    )
    await registry.begin_kek(reference_of("k1"), now_ms=NOW_MS, adopts=True)
    await registry.complete_kek(made, [], now_ms=NOW_MS)
    row = await registry.current_kek()
    assert row is not None
    assert row.kek == made
    for damage in ('{"valid_until_s": 1}', "{", "[]", None):
        await registry._database.transact(
            lambda c: c.execute(update(kek).values(attributes=damage))  # noqa: B023 - awaited here
        )
        with pytest.raises(RegistryError, match="damaged"):
            await registry.current_kek()


async def test_a_key_of_the_hsms_owner_is_never_taken_for_a_half_made_one(registry: Registry) -> None:
    theirs = replace(reference_of("k1"), label="bank-kek")
    assert await registry.begin_kek(theirs, now_ms=NOW_MS, adopts=True) == (theirs, False)
    again = replace(theirs, kek_id="k2")
    assert await registry.begin_kek(again, now_ms=NOW_MS, adopts=True) == (theirs, False)
    # Another wish: nothing of theirs is touched, the row ends.
    ours = reference_of("k3")
    assert await registry.begin_kek(ours, now_ms=NOW_MS) == (ours, False)
    assert await _states(registry) == {"k1": KekState.RETIRED, "k3": KekState.PRE_ACTIVE}
    with pytest.raises(RefusedChangeError, match="half-made"):
        await registry.begin_kek(replace(theirs, kek_id="k4"), now_ms=NOW_MS, adopts=True)
    await registry.complete_kek(kek_of("k3"), [], now_ms=NOW_MS)


async def test_one_at_a_time(registry: Registry) -> None:
    await add_kek(registry)
    await _stage(registry)
    with pytest.raises(RegistryError, match=r"IntegrityError|one_unfinished"):
        await registry.begin_kek(reference_of("k3"), now_ms=NOW_MS)


async def test_wraps_of_an_ended_kek_go_where_the_kek_of_today_has_the_key(registry: Registry) -> None:
    one, two = await add_service(registry, S3), await add_service(registry, BOX)
    with pytest.raises(RefusedChangeError, match="its wraps are needed"):
        await registry.erase_wraps_of_ended("k1")
    await registry.set_kek_state("k1", KekState.REVOKED, "an incident", now_ms=NOW_MS)
    await registry.begin_kek(reference_of("k2"), now_ms=NOW_MS)
    await registry.complete_kek(kek_of("k2"), (), now_ms=NOW_MS)
    assert await registry.erase_wraps_of_ended("k1") == (0, 2), "they are the only ones"
    await registry._database.transact(lambda c: insert_wrap(c, under(one, "k2"), NOW_MS))
    assert await registry.erase_wraps_of_ended("k1") == (1, 1)
    assert await registry.erase_wraps_of_ended("k1") == (0, 1)
    wrapped = {key.key_id: key.wrapped_by for key in await registry.data_keys()}
    assert wrapped == {one.key_id: ("k2",), two.key_id: ("k1",)}
    with pytest.raises(RefusedChangeError, match="its wraps are needed"):
        await registry.erase_wraps_of_ended("k2")
