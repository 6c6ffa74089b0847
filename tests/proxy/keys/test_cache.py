"""The key cache on a clock that only the test moves: five minutes pass in a millisecond."""

import asyncio
import os
from typing import override

import pytest

from envelope import derive
from envelope.errors import EnvelopeError, KeyUnavailableError, MisuseError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from envelope.material import Operation
from proxy.keys.cache import KeyCache
from proxy.keys.slot import MAX_KEYS_PER_SERVICE, MAX_MISSES, MAX_TOMBSTONES, MISS_TTL_S
from tests.fakes.clock import ManualClock

DRIVE = NetworkService("tenant-a", "drive")
MAIL = NetworkService("tenant-a", "mail")
FOREIGN = NetworkService("tenant-b", "drive")
VALIDITY_S = 330.0
_VERSIONS: dict[KeyId, int] = {}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def cache(clock: ManualClock) -> KeyCache:
    return KeyCache(clock)


def material(
    key_id: KeyId | None = None,
    state: KeyState = KeyState.ACTIVE,
    *,
    owner: NetworkService = DRIVE,
    secret: bytes | None = None,
    use: KeyUse = KeyUse.DATA,
    version: int | None = None,
) -> KeyMaterial:
    raw = bytearray(os.urandom(32) if secret is None else secret)
    if state is KeyState.DESTROYED:
        raw = bytearray()
    key_id = key_id or KeyId.random()
    return KeyMaterial(
        owner=owner,
        key_id=key_id,
        state=state,
        use=use,
        version=_VERSIONS.setdefault(key_id, len(_VERSIONS) + 1) if version is None else version,
        secret=raw,
    )


def again(key: KeyMaterial, secret: bytes, state: KeyState = KeyState.ACTIVE) -> KeyMaterial:
    """The same key as the next refresh brings it."""
    return material(key.key_id, state, owner=key.owner, secret=secret)


def install(
    cache: KeyCache,
    clock: ManualClock,
    *keys: KeyMaterial,
    owner: NetworkService = DRIVE,
    validity_s: float = VALIDITY_S,
    operation: Operation = Operation.SET,
    sequence: int | None = None,
) -> None:
    deadline = clock.boot_s() + validity_s
    cache.install(owner, keys, deadline_boot_s=deadline, operation=operation, sequence=sequence)


def why_not_seal(cache: KeyCache, owner: NetworkService = DRIVE) -> Unavailable:
    with pytest.raises(KeyUnavailableError) as caught:
        cache.sealing_key(owner)
    return caught.value.reason


def why_not_open(cache: KeyCache, key_id: KeyId, owner: NetworkService = DRIVE) -> Unavailable:
    with pytest.raises(KeyUnavailableError) as caught:
        cache.opening_key(owner, key_id)
    return caught.value.reason


def test_the_deadline_is_exact_and_on_the_boot_clock(cache: KeyCache, clock: ManualClock) -> None:
    key = material()
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    clock.shift(VALIDITY_S - 0.001)
    held.check()
    clock.shift(0.001)
    with pytest.raises(KeyUnavailableError) as caught:
        held.check()
    assert caught.value.reason is Unavailable.EXPIRED
    assert why_not_seal(cache) is Unavailable.EXPIRED
    assert why_not_open(cache, key.key_id) is Unavailable.EXPIRED
    cache.sweep()
    assert why_not_seal(cache) is Unavailable.EXPIRED
    assert why_not_open(cache, key.key_id) is Unavailable.EXPIRED


def test_a_wall_clock_set_back_prolongs_nothing(cache: KeyCache, clock: ManualClock) -> None:
    install(cache, clock, material())
    held = cache.sealing_key(DRIVE)
    clock.set_wall(clock.wall_s() - 86_400)
    clock.shift(VALIDITY_S)
    with pytest.raises(KeyUnavailableError):
        held.check()


async def test_the_sweeper_zeroes_what_expired_though_nobody_asks(
    cache: KeyCache, clock: ManualClock
) -> None:
    key = material()
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    assert any(held.object_key)
    derived = held._object_key
    sweeper = asyncio.create_task(cache.run_sweeper())
    await clock.advance(VALIDITY_S - 1)
    assert any(key.secret), "still valid, so still there"
    await clock.advance(2)
    assert not any(key.secret)
    assert len(key.secret) == 32
    assert derived is not None
    assert not any(derived)
    sweeper.cancel()
    await asyncio.gather(sweeper, return_exceptions=True)


@pytest.mark.parametrize(
    "how", ["withdraw", "empty set", "replaced", "suspended", "compromised", "forgotten", "close"]
)
def test_what_is_taken_back_is_zeroed_at_once(cache: KeyCache, clock: ManualClock, how: str) -> None:
    key = material()
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    lent = held.object_key
    assert any(lent)
    assert lent.readonly
    derived = held._object_key
    match how:
        case "withdraw":
            cache.withdraw(DRIVE)
        case "empty set":
            install(cache, clock)
        case "replaced":
            install(cache, clock, material())
        case "forgotten":
            cache.forget(DRIVE)
        case "close":
            cache.close()
        case state:
            install(cache, clock, again(key, bytes(key.secret), KeyState(state)))
    assert not any(key.secret)
    assert derived is not None
    assert not any(derived)
    assert not any(lent), "no copy stays with whoever asked for it"
    with pytest.raises(KeyUnavailableError):
        held.check()
    with pytest.raises(KeyUnavailableError):
        _ = held.object_key


def test_a_refresh_prolongs_the_key_a_body_holds(cache: KeyCache, clock: ManualClock) -> None:
    secret = os.urandom(32)
    key = material(secret=secret)
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    before = held.object_key
    for _ in range(5):
        clock.shift(300)
        held.check()
        repeated = again(key, secret)
        install(cache, clock, repeated)
        assert not any(repeated.secret), "the second copy of the material is wiped"
    assert cache.sealing_key(DRIVE) is held
    assert held.object_key == before
    clock.shift(VALIDITY_S)
    with pytest.raises(KeyUnavailableError):
        held.check()


def test_a_refresh_may_shorten_too(cache: KeyCache, clock: ManualClock) -> None:
    key = material(secret=bytes(range(32)))
    install(cache, clock, key)
    install(cache, clock, again(key, bytes(range(32))), validity_s=10)
    clock.shift(10)
    cache.sweep()
    assert not any(key.secret)
    assert why_not_seal(cache) is Unavailable.EXPIRED


def test_a_key_that_ended_stays_ended_when_pushed_again(cache: KeyCache, clock: ManualClock) -> None:
    secret = os.urandom(32)
    key = material(secret=secret)
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    clock.shift(VALIDITY_S)
    with pytest.raises(KeyUnavailableError):
        held.check()
    install(cache, clock, again(key, secret))
    assert cache.sealing_key(DRIVE).object_key == derive.object_key(secret, DRIVE, key.key_id)
    with pytest.raises(KeyUnavailableError) as caught:
        held.check()
    assert caught.value.reason is Unavailable.EXPIRED
    with pytest.raises(MisuseError):
        held.prolong(KeyState.ACTIVE, clock.boot_s() + 1)


def test_rotation_keeps_the_old_key_for_bodies_in_flight(cache: KeyCache, clock: ManualClock) -> None:
    secret, new_secret = os.urandom(32), os.urandom(32)
    old, new = material(secret=secret), material(secret=new_secret, state=KeyState.PRE_ACTIVE)
    install(cache, clock, old, new)
    in_flight = cache.sealing_key(DRIVE)
    assert in_flight.key_id == old.key_id
    cache.opening_key(DRIVE, new.key_id)  # pre-active opens: another proxy may seal with it already
    install(cache, clock, again(old, secret, KeyState.DEACTIVATED), again(new, new_secret))
    in_flight.check()
    assert cache.sealing_key(DRIVE).key_id == new.key_id
    assert cache.opening_key(DRIVE, old.key_id) is in_flight


def test_reasons_tell_apart_what_happened(cache: KeyCache, clock: ManualClock) -> None:
    key_id = KeyId.random()
    assert why_not_seal(cache) is Unavailable.UNKNOWN
    assert why_not_open(cache, key_id) is Unavailable.UNKNOWN
    install(cache, clock, material(state=KeyState.DEACTIVATED))
    assert why_not_seal(cache) is Unavailable.NOT_ACTIVE
    for state, reason in [
        (KeyState.SUSPENDED, Unavailable.SUSPENDED),
        (KeyState.COMPROMISED, Unavailable.COMPROMISED),
        (KeyState.DESTROYED, Unavailable.DESTROYED),
    ]:
        install(cache, clock, material(key_id, state))
        assert why_not_open(cache, key_id) is reason
        assert why_not_seal(cache) is reason
    install(cache, clock)
    assert why_not_seal(cache) is Unavailable.WITHDRAWN
    assert why_not_open(cache, KeyId.random()) is Unavailable.WITHDRAWN
    install(cache, clock, material())
    cache.sealing_key(DRIVE)
    assert why_not_open(cache, KeyId.random()) is Unavailable.UNKNOWN


def test_an_old_compromised_key_does_not_hide_that_the_active_one_expired(
    cache: KeyCache, clock: ManualClock
) -> None:
    install(cache, clock, material(state=KeyState.COMPROMISED), material())
    cache.sealing_key(DRIVE)
    clock.shift(VALIDITY_S)
    cache.sweep()
    assert why_not_seal(cache) is Unavailable.EXPIRED


def test_add_leaves_what_is_there(cache: KeyCache, clock: ManualClock) -> None:
    active, old = material(), material(state=KeyState.DEACTIVATED)
    install(cache, clock, active)
    install(cache, clock, old, operation=Operation.ADD)
    assert cache.sealing_key(DRIVE).key_id == active.key_id
    cache.opening_key(DRIVE, old.key_id)
    install(cache, clock, operation=Operation.ADD)  # adds nothing, withdraws nothing
    cache.sealing_key(DRIVE)


def test_two_services_and_two_tenants_share_nothing(cache: KeyCache, clock: ManualClock) -> None:
    shared_id, secret = KeyId.random(), os.urandom(32)
    for owner in (DRIVE, MAIL, FOREIGN):
        install(cache, clock, material(shared_id, owner=owner, secret=secret), owner=owner)
    keys = {bytes(cache.opening_key(owner, shared_id).object_key) for owner in (DRIVE, MAIL, FOREIGN)}
    assert len(keys) == 3, "the same id and material derive three keys"
    only_drive = material()
    install(cache, clock, only_drive)
    assert why_not_open(cache, only_drive.key_id, MAIL) is Unavailable.UNKNOWN
    assert why_not_open(cache, only_drive.key_id, FOREIGN) is Unavailable.UNKNOWN
    cache.withdraw(DRIVE)
    cache.sealing_key(MAIL)
    cache.sealing_key(FOREIGN)


def test_a_withdrawal_beats_a_push_that_was_issued_before(cache: KeyCache, clock: ManualClock) -> None:
    install(cache, clock, material(), sequence=10)
    cache.withdraw(DRIVE, sequence=12)
    for late in (11, 12):
        key = material()
        with pytest.raises(EnvelopeError) as caught:
            install(cache, clock, key, sequence=late)
        assert caught.value.code == "sequence"
        assert not any(key.secret), "refused material is wiped"
    assert why_not_seal(cache) is Unavailable.WITHDRAWN
    install(cache, clock, material(), sequence=13)
    cache.sealing_key(DRIVE)


def test_a_late_withdrawal_does_not_lower_the_guard(cache: KeyCache, clock: ManualClock) -> None:
    cache.withdraw(DRIVE, sequence=20)
    cache.withdraw(DRIVE, sequence=5)
    with pytest.raises(EnvelopeError):
        install(cache, clock, material(), sequence=20)


@pytest.mark.parametrize("fault", ["foreign owner", "other material", "twice", "too many", "too late"])
def test_installation_is_all_or_nothing(cache: KeyCache, clock: ManualClock, fault: str) -> None:
    held = material()
    install(cache, clock, held)
    good = material(state=KeyState.DEACTIVATED)
    keys, validity_s = [good], VALIDITY_S
    match fault:
        case "foreign owner":
            keys.append(material(owner=FOREIGN))
        case "other material":
            keys.append(material(held.key_id))
        case "twice":
            keys += [material(good.key_id)]
        case "too many":
            keys += [material(state=KeyState.DEACTIVATED) for _ in range(MAX_KEYS_PER_SERVICE)]
        case _:
            validity_s = 0
    with pytest.raises(EnvelopeError):
        install(cache, clock, *keys, validity_s=validity_s)
    assert cache.sealing_key(DRIVE).key_id == held.key_id
    assert any(held.secret)
    assert why_not_open(cache, good.key_id) is Unavailable.UNKNOWN
    assert not any(any(key.secret) for key in keys)


def test_added_keys_are_bounded(cache: KeyCache, clock: ManualClock) -> None:
    install(cache, clock, *[material() for _ in range(MAX_KEYS_PER_SERVICE)])
    with pytest.raises(EnvelopeError) as caught:
        install(cache, clock, material(), operation=Operation.ADD)
    assert caught.value.code == "too-many"


def test_unknown_key_ids_leave_bounded_traces(cache: KeyCache, clock: ManualClock) -> None:
    install(cache, clock, material())
    strangers = [NetworkService("tenant-z", f"s{number}") for number in range(50)]
    for _ in range(200):
        for stranger in strangers:
            why_not_open(cache, KeyId.random(), stranger)
            why_not_seal(cache, stranger)
        why_not_open(cache, KeyId.random())
        why_not_open(cache, KeyId.random())
    assert set(cache._slots) == {DRIVE}, "a look-up makes no entry"
    (status,) = cache.status()
    assert len(status.missed) == MAX_MISSES
    clock.shift(MISS_TTL_S)
    assert cache.status()[0].missed == ()


def test_tombstones_are_bounded(cache: KeyCache, clock: ManualClock) -> None:
    for _ in range(3):
        install(cache, clock, *[material(state=KeyState.DEACTIVATED) for _ in range(MAX_KEYS_PER_SERVICE)])
    assert len(cache._slots[DRIVE].tombstones) <= MAX_TOMBSTONES


def test_the_heap_of_deadlines_does_not_grow_with_refreshes(cache: KeyCache, clock: ManualClock) -> None:
    secret = os.urandom(32)
    key = material(secret=secret)
    for _ in range(1000):
        install(cache, clock, again(key, secret))
        clock.shift(1)
    heap = getattr(cache._deadlines, "_TLRUCache__order")  # noqa: B009 - its bound is what we lean on
    assert len(heap) <= 4


def test_signing_keys_neither_seal_nor_open(cache: KeyCache, clock: ManualClock) -> None:
    key = material(use=KeyUse.SIGN)
    install(cache, clock, key)
    assert why_not_seal(cache) is Unavailable.NOT_ACTIVE
    assert why_not_open(cache, key.key_id) is Unavailable.UNKNOWN


def test_no_secret_is_printed(cache: KeyCache, clock: ManualClock) -> None:
    secret = bytes(range(32))
    key = material(secret=secret)
    install(cache, clock, key)
    held = cache.sealing_key(DRIVE)
    derived = held.object_key
    with pytest.raises(EnvelopeError) as conflict:
        install(cache, clock, material(key.key_id))
    texts = [repr(held), repr(cache), repr(cache.status()), repr(cache.__dict__), str(conflict.value)]
    for hidden in (secret, derived):
        for text in texts:
            assert hidden.hex() not in text
            assert repr(hidden)[2:-1] not in text


# Waiting for a push.


async def test_a_waiter_gets_the_key_the_push_brings(cache: KeyCache, clock: ManualClock) -> None:
    waiter = asyncio.create_task(cache.wait_for_sealing_key(DRIVE, timeout_s=5))
    await clock.wait_for_sleepers()
    key = material()
    install(cache, clock, key)
    assert (await waiter).key_id == key.key_id
    assert clock.sleepers == 0, "the timer of a finished waiter is gone"


async def test_a_waiter_gives_up_after_its_time(cache: KeyCache, clock: ManualClock) -> None:
    waiter = asyncio.create_task(cache.wait_for_sealing_key(DRIVE, timeout_s=5))
    await clock.wait_for_sleepers()
    install(cache, clock, material(state=KeyState.PRE_ACTIVE))  # a push, but nothing to seal with: waits on
    await clock.advance(4.9)
    assert not waiter.done()
    await clock.advance(0.2)
    with pytest.raises(KeyUnavailableError) as caught:
        await waiter
    assert caught.value.reason is Unavailable.NOT_ACTIVE


async def test_a_waiter_is_refused_at_once_when_the_keys_are_withdrawn(
    cache: KeyCache, clock: ManualClock
) -> None:
    waiter = asyncio.create_task(cache.wait_for_sealing_key(DRIVE, timeout_s=5))
    await clock.wait_for_sleepers()
    cache.withdraw(DRIVE)
    with pytest.raises(KeyUnavailableError) as caught:
        await waiter
    assert caught.value.reason is Unavailable.WITHDRAWN
    with pytest.raises(KeyUnavailableError):
        await cache.wait_for_sealing_key(DRIVE, timeout_s=5)


async def test_a_cancelled_waiter_leaves_no_task(cache: KeyCache, clock: ManualClock) -> None:
    before = asyncio.all_tasks()
    waiter = asyncio.create_task(cache.wait_for_sealing_key(DRIVE, timeout_s=5))
    await clock.wait_for_sleepers()
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert asyncio.all_tasks() == before


async def test_time_that_the_boot_clock_did_not_see_counts_too(cache: KeyCache, clock: ManualClock) -> None:
    """A virtual machine that was paused, or restored from an image of its memory: its boot clock stood still.

    Its wall clock is set right afterwards. Keys whose end has passed meanwhile end now; nobody can withdraw
    them, for the agent has seen their end.
    """
    key = material()
    install(cache, clock, key)
    sweeper = asyncio.create_task(cache.run_sweeper())
    try:
        await clock.advance(2)
        held = cache.sealing_key(DRIVE)
        clock.set_wall(clock.wall_s() + VALIDITY_S / 2)
        await clock.advance(2)
        held.check()
        assert held.valid_for_s == pytest.approx(VALIDITY_S / 2 - 4, abs=1.5)
        clock.set_wall(clock.wall_s() + VALIDITY_S / 2)
        await clock.advance(1)
        with pytest.raises(KeyUnavailableError) as caught:
            held.check()
        assert caught.value.reason is Unavailable.EXPIRED
        assert not any(key.secret)
    finally:
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)


async def test_keys_that_arrive_right_after_the_jump_keep_their_time(
    cache: KeyCache, clock: ManualClock
) -> None:
    clock.set_wall(clock.wall_s() + 3600)
    install(cache, clock, material())
    sweeper = asyncio.create_task(cache.run_sweeper())
    await clock.advance(2)
    assert cache.sealing_key(DRIVE).valid_for_s == pytest.approx(VALIDITY_S - 2)
    clock.set_wall(clock.wall_s() - 3600)
    await clock.advance(2)
    assert cache.sealing_key(DRIVE).valid_for_s == pytest.approx(VALIDITY_S - 4), "set back: nothing was lost"
    sweeper.cancel()
    await asyncio.gather(sweeper, return_exceptions=True)


async def test_a_clock_that_is_set_back_hides_no_time_that_is_lost_after_it(clock: ManualClock) -> None:
    """Set back by an hour, by a correction or on purpose; then the machine is paused for as long. That the
    clock is where it was does not show that no time has passed.
    """
    heard: list[float] = []
    cache = KeyCache(clock, on_clock_set=heard.append)
    sweeper = asyncio.create_task(cache.run_sweeper())
    try:
        install(cache, clock, material())
        held = cache.sealing_key(DRIVE)
        await clock.advance(2)
        assert heard == []
        clock.set_wall(clock.wall_s() - 3600)
        await clock.advance(2)
        held.check()
        clock.set_wall(clock.wall_s() + 3600)
        await clock.advance(2)
        assert why_not_seal(cache) is Unavailable.EXPIRED
        assert heard == pytest.approx([-3600, 3600])
    finally:
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)


def test_small_steps_of_the_wall_clock_count_together(clock: ManualClock) -> None:
    heard: list[float] = []
    cache = KeyCache(clock, on_clock_set=heard.append)
    install(cache, clock, material())
    for _ in range(20):
        clock.set_wall(clock.wall_s() + 0.3)
        cache.take_off_lost_time()
    assert sum(heard) == pytest.approx(6.0, abs=1.0)
    assert cache.sealing_key(DRIVE).valid_for_s == pytest.approx(VALIDITY_S - 6, abs=1.0)


class HeldUpClock(ManualClock):
    """Whoever reads the wall clock for the first time after `hold_up` is not run again for *seconds*."""

    held_up_s = 0.0

    @override
    def wall_s(self) -> float:
        found = super().wall_s()
        if self.held_up_s:
            lost, self.held_up_s = self.held_up_s, 0.0
            self.shift(lost)
        return found


def test_a_process_that_is_held_up_between_two_readings_has_no_clock_that_was_set() -> None:
    clock = HeldUpClock()
    heard: list[float] = []
    cache = KeyCache(clock, on_clock_set=heard.append)
    install(cache, clock, material())
    for _ in range(3):
        clock.held_up_s = 5.0
        cache.take_off_lost_time()
    assert heard == []
    assert cache.sealing_key(DRIVE).valid_for_s == pytest.approx(VALIDITY_S - 15)
