"""States of keys by command, and rotations in two phases, on both databases."""

import itertools
from collections.abc import AsyncIterator

import pytest

from envelope.keys import TRANSITIONS, KeyId, KeyState, KeyUse
from key_agent.registry.model import UNSERVED_MS, DataKeyRow, Patience, RotationCause
from key_agent.registry.pushes import MAX_TOMBSTONES
from key_agent.registry.states import ROTATION_TRANSITIONS, KekState, RotationPhase
from key_agent.registry.store import RefusedChangeError, Registry
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
)

DAY_MS = 86_400_000
PATIENCE = Patience(usual_ms=600_000)


@pytest.fixture
async def registry(url: str) -> AsyncIterator[Registry]:
    opened = await open_registry(url)
    yield opened
    await opened.close()


async def _key(registry: Registry, key_id: KeyId) -> DataKeyRow:
    return {key.key_id: key for key in await registry.data_keys()}[key_id]


async def _pushed(registry: Registry, *proxies: str) -> dict[KeyId, KeyState]:
    _, made = await registry.reserve([S3], proxies or ("p1",), now_ms=NOW_MS, until_ms=NOW_MS + 1)
    return {key.key_id: state for item in made for key, state in item.keys}


async def _begin(registry: Registry, cause: RotationCause = RotationCause.COMMAND) -> tuple[KeyId, str]:
    key = key_of(S3)
    [rotation_id] = await registry.begin_rotations([key], cause, PATIENCE, now_ms=NOW_MS)
    return key.key_id, rotation_id


def test_a_rotation_ends_in_two_ways_and_only_the_first_phase_can_be_cancelled() -> None:
    ends = {phase for phase, after in ROTATION_TRANSITIONS.items() if not after}
    assert ends == {RotationPhase.DONE, RotationPhase.CANCELLED}
    before_cancelled = {
        phase for phase, after in ROTATION_TRANSITIONS.items() if RotationPhase.CANCELLED in after
    }
    assert before_cancelled == {RotationPhase.DISTRIBUTING}
    assert {phase for phase in RotationPhase if phase.is_open} == ROTATION_TRANSITIONS.keys() - ends


async def test_the_new_key_opens_first_and_seals_later(registry: Registry) -> None:
    old = (await add_service(registry, S3, "p1", "p2")).key_id
    before = (await registry.reserve([S3], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1))[1][0].sequence
    new, rotation_id = await _begin(registry)
    assert await _pushed(registry) == {old: KeyState.ACTIVE, new: KeyState.PRE_ACTIVE}
    [rotation] = await registry.open_rotations()
    assert (rotation.phase, rotation.new_key, rotation.old_key) == (RotationPhase.DISTRIBUTING, new, old)
    assert rotation.until_ms == NOW_MS + PATIENCE.usual_ms, "the old key seals meanwhile"
    assert rotation.after_sequence == before == (await _key(registry, new)).after_sequence
    with pytest.raises(RefusedChangeError, match="under way"):
        await _begin(registry)
    assert len(await registry.data_keys()) == 2, "what was refused left nothing behind"

    activated = await registry.activate_rotation(rotation_id, ["p2"], PATIENCE, now_ms=NOW_MS + 5)
    assert (activated.phase, activated.late) == (RotationPhase.ACTIVATED, ("p2",))
    assert activated.after_sequence > rotation.after_sequence
    assert await _pushed(registry) == {old: KeyState.DEACTIVATED, new: KeyState.ACTIVE}
    assert (await _key(registry, new)).activated_at_ms == NOW_MS + 5
    with pytest.raises(RefusedChangeError, match="from activated to activated"):
        await registry.activate_rotation(rotation_id, [], PATIENCE, now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="past the point"):
        await registry.cancel_rotations(S3, now_ms=NOW_MS)
    await registry.finish_rotation(rotation_id, now_ms=NOW_MS)
    assert await registry.open_rotations() == []
    [kept] = await registry.rotations()
    assert kept.phase is RotationPhase.DONE


async def test_a_cancelled_one_leaves_a_tombstone_that_does_not_travel(registry: Registry) -> None:
    old = (await add_service(registry, S3)).key_id
    new, rotation_id = await _begin(registry)
    [given_up] = await registry.cancel_rotations(S3, now_ms=NOW_MS)
    assert given_up.id == rotation_id
    key = await _key(registry, new)
    assert (key.state, key.wrapped_by) == (KeyState.DESTROYED, ())
    assert await _pushed(registry) == {old: KeyState.ACTIVE}, "no object names a key that never sealed"
    with pytest.raises(RefusedChangeError, match="cannot be cancelled"):
        await registry.cancel_rotations(S3, now_ms=NOW_MS)
    await _begin(registry)


async def test_a_service_without_proxies_needs_no_phases(registry: Registry) -> None:
    await add_service(registry, S3)
    await registry.remove_service(S3, proxy_id="p1", now_ms=NOW_MS)
    key = key_of(S3)
    assert await registry.begin_rotations([key], RotationCause.COMMAND, PATIENCE, now_ms=NOW_MS) == []
    assert (await _key(registry, key.key_id)).state is KeyState.ACTIVE


async def test_nothing_begins_for_unknown_services_or_under_another_kek(registry: Registry) -> None:
    await add_service(registry, S3)
    for wrong, match in ((key_of(BOX), "no network service"), (key_of(S3, "k9"), "another one")):
        with pytest.raises(RefusedChangeError, match=match):
            await registry.begin_rotations(
                [key_of(S3), wrong], RotationCause.COMMAND, PATIENCE, now_ms=NOW_MS
            )
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="revoked"):
        await _begin(registry)
    assert len(await registry.data_keys()) == 1


async def test_data_and_signing_keys_rotate_apart(registry: Registry) -> None:
    data = (await add_service(registry, S3)).key_id
    sign = key_of(S3, use=KeyUse.SIGN, algorithm="ES256")
    assert not await registry.has_active_key(S3, KeyUse.SIGN)
    await registry.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=sign, now_ms=NOW_MS)
    assert await registry.has_active_key(S3, KeyUse.SIGN)
    new, rotation_id = await _begin(registry)
    await registry.activate_rotation(rotation_id, [], PATIENCE, now_ms=NOW_MS)
    assert await _pushed(registry) == {
        data: KeyState.DEACTIVATED,
        new: KeyState.ACTIVE,
        sign.key_id: KeyState.ACTIVE,
    }
    found = {key.key_id: (key.use, key.algorithm, key.version) for key in await registry.data_keys()}
    assert found[sign.key_id] == (KeyUse.SIGN, "ES256", 1)
    assert found[new] == (KeyUse.DATA, None, 2)
    _, [item] = await registry.reserve([S3], ["p1"], now_ms=NOW_MS, until_ms=NOW_MS + 1)
    assert {(key.use, key.algorithm, key.version) for key, _ in item.keys} == set(found.values())


async def test_a_replaced_kek_ends_what_was_under_way(registry: Registry) -> None:
    await add_service(registry, S3, "p1", "p2")
    new, _ = await _begin(registry)
    await registry.set_kek_state("k1", KekState.REVOKED, "why", now_ms=NOW_MS)
    await registry.begin_kek(reference_of("k2"), now_ms=NOW_MS)
    later = key_of(S3, "k2")
    await registry.complete_kek(kek_of("k2"), [later], now_ms=NOW_MS, patience=PATIENCE)
    assert (await _key(registry, new)).state is KeyState.DESTROYED
    [rotation] = await registry.open_rotations()
    assert (rotation.new_key, rotation.cause) == (later.key_id, RotationCause.LOST)
    assert rotation.until_ms == NOW_MS + UNSERVED_MS, "nothing seals meanwhile"


async def test_a_removed_service_takes_its_rotation_along(registry: Registry) -> None:
    await add_service(registry, S3)
    await _begin(registry)
    await registry.remove_service(S3, now_ms=NOW_MS)
    assert await registry.open_rotations() == []
    assert {key.state for key in await registry.data_keys()} == {KeyState.DESTROYED}


# States by command.


async def test_suspension_is_taken_back_and_the_rest_is_not(registry: Registry) -> None:
    key_id = (await add_service(registry, S3)).key_id
    await registry.change_key(S3, key_id, KeyState.SUSPENDED, "looked at", now_ms=NOW_MS)
    assert await _pushed(registry) == {key_id: KeyState.SUSPENDED}
    assert (await _key(registry, key_id)).reason == "looked at"
    assert await registry.resume_key(S3, key_id, now_ms=NOW_MS) is KeyState.ACTIVE
    with pytest.raises(RefusedChangeError, match="not suspended"):
        await registry.resume_key(S3, key_id, now_ms=NOW_MS)
    await registry.change_key(S3, key_id, KeyState.DEACTIVATED, None, now_ms=NOW_MS)
    await registry.change_key(S3, key_id, KeyState.SUSPENDED, None, now_ms=NOW_MS)
    assert await registry.resume_key(S3, key_id, now_ms=NOW_MS) is KeyState.DEACTIVATED
    await registry.change_key(S3, key_id, KeyState.COMPROMISED, "leaked", now_ms=NOW_MS)
    for state in set(KeyState) - {KeyState.COMPROMISED, KeyState.DESTROYED}:
        with pytest.raises(RefusedChangeError):
            await registry.change_key(S3, key_id, state, None, now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="not suspended"):
        await registry.resume_key(S3, key_id, now_ms=NOW_MS)


async def test_a_resumed_key_is_never_a_second_active_one(registry: Registry) -> None:
    first = (await add_service(registry, S3)).key_id
    await registry.change_key(S3, first, KeyState.SUSPENDED, None, now_ms=NOW_MS)
    second, rotation_id = await _begin(registry)
    [rotation] = await registry.open_rotations()
    assert rotation.until_ms == NOW_MS + UNSERVED_MS
    await registry.activate_rotation(rotation_id, [], PATIENCE, now_ms=NOW_MS)
    assert await _pushed(registry) == {first: KeyState.SUSPENDED, second: KeyState.ACTIVE}
    assert await registry.resume_key(S3, first, now_ms=NOW_MS) is KeyState.DEACTIVATED


async def test_only_an_ended_key_is_destroyed_and_its_name_still_travels(registry: Registry) -> None:
    key_id = (await add_service(registry, S3)).key_id
    for state in (None, KeyState.SUSPENDED):
        if state is not None:
            await registry.change_key(S3, key_id, state, None, now_ms=NOW_MS)
        with pytest.raises(RefusedChangeError, match="only a deactivated or compromised one"):
            await registry.change_key(S3, key_id, KeyState.DESTROYED, None, now_ms=NOW_MS)
    await registry.change_key(S3, key_id, KeyState.DEACTIVATED, None, now_ms=NOW_MS)
    assert await registry.change_key(S3, key_id, KeyState.DESTROYED, "law", now_ms=NOW_MS) is (
        KeyState.DEACTIVATED
    )
    assert (await _key(registry, key_id)).wrapped_by == ()
    assert await _pushed(registry) == {key_id: KeyState.DESTROYED}
    await registry.change_key(S3, key_id, KeyState.DESTROYED, None, now_ms=NOW_MS)


async def test_of_many_destroyed_keys_the_newest_travel(registry: Registry) -> None:
    key_ids = [(await add_service(registry, S3)).key_id]
    for number in range(MAX_TOMBSTONES + 3):
        key = key_of(S3)
        await registry.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=key, now_ms=NOW_MS)
        key_ids.append(key.key_id)
        await registry.change_key(S3, key_ids[-2], KeyState.DESTROYED, None, now_ms=NOW_MS + number)
    pushed = await _pushed(registry)
    assert set(pushed) == set(key_ids[-MAX_TOMBSTONES - 1 :])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(KeyState, KeyState)))
async def test_the_table_decides(registry: Registry, old: KeyState, new: KeyState) -> None:
    """By the shortest road to *old*, then to *new*: as `envelope.keys.TRANSITIONS` says, or refused."""
    key_id = (await add_service(registry, S3)).key_id
    if old is KeyState.PRE_ACTIVE:
        key_id, _ = await _begin(registry)
    roads = {
        KeyState.SUSPENDED: [KeyState.SUSPENDED],
        KeyState.DEACTIVATED: [KeyState.DEACTIVATED],
        KeyState.COMPROMISED: [KeyState.COMPROMISED],
        KeyState.DESTROYED: [KeyState.DEACTIVATED, KeyState.DESTROYED],
    }
    for state in roads.get(old, []):
        await registry.change_key(S3, key_id, state, None, now_ms=NOW_MS)
    # A key on its way is given up, not compromised: nothing was sealed by it.
    wanted = KeyState.DESTROYED if old is KeyState.PRE_ACTIVE else new
    may = old is new or new in TRANSITIONS[old]
    if old is KeyState.PRE_ACTIVE and new is KeyState.ACTIVE:
        may = False  # by its rotation alone
    if may:
        await registry.change_key(S3, key_id, new, None, now_ms=NOW_MS)
        assert (await _key(registry, key_id)).state is (old if old is new else wanted)
    else:
        with pytest.raises(RefusedChangeError):
            await registry.change_key(S3, key_id, new, None, now_ms=NOW_MS)
        assert (await _key(registry, key_id)).state is old


async def test_the_end_of_the_old_key_hurries_the_new_one(registry: Registry) -> None:
    old = (await add_service(registry, S3)).key_id
    await _begin(registry)
    await registry.change_key(S3, old, KeyState.COMPROMISED, None, now_ms=NOW_MS)
    [rotation] = await registry.open_rotations()
    assert rotation.until_ms == NOW_MS + UNSERVED_MS


async def test_another_services_key_is_not_this_ones(registry: Registry) -> None:
    await add_service(registry, S3)
    other = (await add_service(registry, BOX)).key_id
    with pytest.raises(RefusedChangeError, match="has no key"):
        await registry.change_key(S3, other, KeyState.COMPROMISED, None, now_ms=NOW_MS)
    with pytest.raises(RefusedChangeError, match="has no key"):
        await registry.resume_key(S3, KeyId.random(), now_ms=NOW_MS)


async def test_tombstones_alone_never_take_back_a_key_that_is_merely_damaged(registry: Registry) -> None:
    first = (await add_service(registry, S3)).key_id
    await registry.add_service(S3, proxy_id="p1", certificate_pem="PEM", key=key_of(S3), now_ms=NOW_MS)
    await registry.change_key(S3, first, KeyState.DESTROYED, None, now_ms=NOW_MS)
    await registry._database.transact(
        lambda c: c.exec_driver_sql("UPDATE dek_wrap SET wrapped = wrapped_sha256")
    )
    assert await _pushed(registry) == {}


# When.


async def test_a_ring_is_due_by_age_by_its_services_own_age_and_not_twice(registry: Registry) -> None:
    await add_service(registry, S3)
    await add_service(registry, BOX)

    async def due(days: int, default: int = 90) -> list[str]:
        found = await registry.due_rings(default, now_ms=NOW_MS + days * DAY_MS, limit=10)
        return [ring.owner.service for ring in found]

    assert await due(89) == []
    assert sorted(await due(90)) == ["box", "s3"]
    assert await due(1000, default=0) == [], "0 is never"
    await registry.set_rotate_after(S3, 30, now_ms=NOW_MS)
    assert await due(30) == ["s3"]
    assert await due(30, default=0) == ["s3"]
    await registry.set_rotate_after(BOX, 0, now_ms=NOW_MS)
    assert await due(1000) == ["s3"]
    _, rotation_id = await _begin(registry)
    assert await due(1000) == []
    await registry.activate_rotation(rotation_id, [], PATIENCE, now_ms=NOW_MS + 40 * DAY_MS)
    await registry.finish_rotation(rotation_id, now_ms=NOW_MS)
    assert await due(69) == []
    assert await due(70) == ["s3"]
    assert await registry.rotate_after() == {S3: 30, BOX: 0}
    await registry.set_rotate_after(S3, None, now_ms=NOW_MS)
    assert (await registry.rotate_after())[S3] is None
    with pytest.raises(RefusedChangeError, match="no age"):
        await registry.set_rotate_after(S3, -1, now_ms=NOW_MS)


async def test_of_many_due_rings_the_oldest_come_first(registry: Registry) -> None:
    await add_service(registry, BOX)
    await add_service(registry, S3)
    await registry.add_service(
        BOX, proxy_id="p1", certificate_pem="PEM", key=key_of(BOX), now_ms=NOW_MS + DAY_MS
    )
    found = await registry.due_rings(1, now_ms=NOW_MS + 9 * DAY_MS, limit=1)
    assert [ring.owner for ring in found] == [S3]


async def test_a_key_on_its_way_counts_as_one_for_a_further_proxy(registry: Registry) -> None:
    await add_kek(registry)
    await add_service(registry, S3, "p1", "p2")
    key = key_of(S3)
    [active] = [key for key in await registry.data_keys() if key.state is KeyState.ACTIVE]
    await registry.change_key(S3, active.key_id, KeyState.COMPROMISED, None, now_ms=NOW_MS)
    assert not await registry.has_active_key(S3)
    rotation_id = await registry.add_service(
        S3, proxy_id="p1", certificate_pem="PEM", key=key, now_ms=NOW_MS, patience=PATIENCE
    )
    assert rotation_id is not None
    assert await registry.has_active_key(S3)
