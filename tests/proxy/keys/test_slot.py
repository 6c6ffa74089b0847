"""One service's keys, seen through the cache: by version, to sign with, and what is told of them."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from envelope.errors import EnvelopeError, KeyUnavailableError, MisuseError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService, SigningAlgorithm
from envelope.material import Operation
from proxy.keys.cache import KeyCache
from proxy.keys.slot import MAX_TOMBSTONES
from tests.fakes.clock import ManualClock
from tests.proxy.encryption_service.service_rig import signing_material

OWNER = NetworkService("acme", "orders")
VALIDITY_S = 330.0
S = KeyState


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def cache(clock: ManualClock) -> KeyCache:
    return KeyCache(clock)


class Made:
    """A key as an agent has it, pushed again with the same id and secret."""

    def __init__(self, version: int, use: KeyUse = KeyUse.DATA) -> None:
        self.key_id, self.version, self.use = KeyId.random(), version, use
        self.secret = os.urandom(32) if use is KeyUse.DATA else signing_material(SigningAlgorithm.ES256)

    def __call__(self, state: KeyState = S.ACTIVE, *, version: int | None = None) -> KeyMaterial:
        return KeyMaterial(
            owner=OWNER,
            key_id=self.key_id,
            state=state,
            use=self.use,
            algorithm="ES256" if self.use is KeyUse.SIGN else None,
            version=version or self.version,
            secret=bytearray(b"" if state is S.DESTROYED else self.secret),
        )


def install(
    cache: KeyCache,
    clock: ManualClock,
    *keys: KeyMaterial,
    operation: Operation = Operation.SET,
    validity_s: float = VALIDITY_S,
) -> None:
    cache.install(OWNER, keys, deadline_boot_s=clock.boot_s() + validity_s, operation=operation)


def why(cache: KeyCache, version: int, use: KeyUse = KeyUse.DATA) -> Unavailable:
    with pytest.raises(KeyUnavailableError) as caught:
        cache.key_of_version(OWNER, use, version)
    return caught.value.reason


def refused(cache: KeyCache, clock: ManualClock, *keys: KeyMaterial, operation: Operation) -> None:
    """One that refuses changes nothing and wipes what it was given."""
    before = cache.versions(OWNER, KeyUse.DATA)
    with pytest.raises(EnvelopeError) as caught:
        install(cache, clock, *keys, operation=operation)
    assert caught.value.code == "key-conflict"
    assert cache.versions(OWNER, KeyUse.DATA) == before
    assert not any(any(key.secret) for key in keys)


def test_a_version_finds_its_key(cache: KeyCache, clock: ManualClock) -> None:
    one, two = Made(1), Made(2)
    assert why(cache, 1) is Unavailable.UNKNOWN
    install(cache, clock, one(S.DEACTIVATED), two())
    assert cache.key_of_version(OWNER, KeyUse.DATA, 1).key_id == one.key_id
    assert cache.key_of_version(OWNER, KeyUse.DATA, 2).key_id == two.key_id
    assert cache.sealing_key(OWNER).version == 2
    for version in (0, 3, -1):
        assert why(cache, version) is Unavailable.UNKNOWN
    assert why(cache, 1, KeyUse.SIGN) is Unavailable.UNKNOWN


def test_a_version_that_ended_says_why(cache: KeyCache, clock: ManualClock) -> None:
    made = [Made(number) for number in range(1, 6)]
    install(cache, clock, *(key(S.ACTIVE if key.version == 1 else S.DEACTIVATED) for key in made))
    states = [S.ACTIVE, S.SUSPENDED, S.COMPROMISED, S.DESTROYED]
    install(cache, clock, *(key(state) for key, state in zip(made, states, strict=False)))
    assert [why(cache, version) for version in (2, 3, 4, 5)] == [
        Unavailable.SUSPENDED,
        Unavailable.COMPROMISED,
        Unavailable.DESTROYED,
        Unavailable.WITHDRAWN,
    ]
    listed = cache.versions(OWNER, KeyUse.DATA)
    assert [(holding.version, holding.reason) for holding in listed] == [
        (1, None),
        (2, Unavailable.SUSPENDED),
        (3, Unavailable.COMPROMISED),
        (4, Unavailable.DESTROYED),
        (5, Unavailable.WITHDRAWN),
    ]
    assert all(holding.seen_at_s == int(clock.wall_s()) for holding in listed)
    clock.shift(VALIDITY_S)
    assert why(cache, 1) is Unavailable.EXPIRED
    cache.withdraw(OWNER)
    assert {why(cache, version) for version in range(7)} == {Unavailable.WITHDRAWN}
    cache.forget(OWNER)
    assert why(cache, 1) is Unavailable.UNKNOWN


@pytest.mark.parametrize("operation", Operation)
def test_a_version_never_gets_another_key(cache: KeyCache, clock: ManualClock, operation: Operation) -> None:
    one, impostor = Made(1), Made(1)
    install(cache, clock, one())
    refused(cache, clock, impostor(), operation=operation)
    refused(cache, clock, impostor(S.DESTROYED), operation=operation)
    refused(cache, clock, one(), impostor(S.DEACTIVATED), operation=operation)
    assert cache.sealing_key(OWNER).key_id == one.key_id
    for state in (S.SUSPENDED, S.COMPROMISED, S.DESTROYED):
        install(cache, clock, one(state))
        refused(cache, clock, impostor(), operation=operation)


@pytest.mark.parametrize("operation", Operation)
def test_a_key_never_gets_another_version(cache: KeyCache, clock: ManualClock, operation: Operation) -> None:
    one = Made(1)
    install(cache, clock, one())
    refused(cache, clock, one(version=2), operation=operation)
    install(cache, clock, one(S.SUSPENDED))
    refused(cache, clock, one(version=2), operation=operation)


def test_two_uses_count_by_themselves(cache: KeyCache, clock: ManualClock) -> None:
    data, signing = Made(1), Made(1, KeyUse.SIGN)
    install(cache, clock, data(), signing())
    assert cache.key_of_version(OWNER, KeyUse.DATA, 1).key_id == data.key_id
    assert cache.key_of_version(OWNER, KeyUse.SIGN, 1).key_id == signing.key_id


@pytest.mark.parametrize("how", ["withdrawn", "expired", "left out"])
def test_what_has_ended_frees_its_number(cache: KeyCache, clock: ManualClock, how: str) -> None:
    """An agent that lost its registry begins anew at version 1; until the old word has run out it waits."""
    one, anew, other = Made(1), Made(1), Made(7)
    install(cache, clock, one())
    if how == "withdrawn":
        install(cache, clock)
    elif how == "expired":
        clock.shift(VALIDITY_S)
    else:
        install(cache, clock, other())
    install(cache, clock, anew())
    assert cache.key_of_version(OWNER, KeyUse.DATA, 1).key_id == anew.key_id
    assert why(cache, 7) is (Unavailable.WITHDRAWN if how == "left out" else Unavailable.UNKNOWN)


def test_the_memory_of_versions_is_bounded(cache: KeyCache, clock: ManualClock) -> None:
    for version in range(1, MAX_TOMBSTONES + 200):
        install(cache, clock, Made(version)())
    slot = cache._slots[OWNER]
    assert len(slot.versions) <= MAX_TOMBSTONES + 1


# Signing keys.


def test_the_active_signing_key(cache: KeyCache, clock: ManualClock) -> None:
    one, two = Made(1, KeyUse.SIGN), Made(2, KeyUse.SIGN)
    with pytest.raises(KeyUnavailableError):
        cache.signing_key(OWNER)
    install(cache, clock, one(S.DEACTIVATED), two())
    key = cache.signing_key(OWNER)
    assert (key.version, key.algorithm) == (2, "ES256")
    private = key.signing_key
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert key.signing_key is private, "loaded once"
    assert cache.status([OWNER])[0].can_seal
    with pytest.raises(MisuseError):
        key.service_cipher("native")
    with pytest.raises(KeyUnavailableError):
        cache.sealing_key(OWNER)
    with pytest.raises(KeyUnavailableError):
        cache.opening_key(OWNER, two.key_id)
    install(cache, clock, one(S.DEACTIVATED), two(S.DEACTIVATED), operation=Operation.ADD)
    with pytest.raises(KeyUnavailableError) as caught:
        cache.signing_key(OWNER)
    assert caught.value.reason is Unavailable.NOT_ACTIVE


@pytest.mark.parametrize("how", ["withdrawn", "expired", "suspended"])
def test_an_ended_signing_key_signs_nothing(cache: KeyCache, clock: ManualClock, how: str) -> None:
    made = Made(1, KeyUse.SIGN)
    install(cache, clock, made())
    held = cache.signing_key(OWNER)
    assert held.signing_key is not None
    if how == "withdrawn":
        install(cache, clock)
    elif how == "suspended":
        install(cache, clock, made(S.SUSPENDED))
    else:
        clock.shift(VALIDITY_S)
    with pytest.raises(KeyUnavailableError):
        cache.signing_key(OWNER)
    with pytest.raises(KeyUnavailableError):
        _ = held.signing_key
    assert held._signing_key is None
    assert not any(held._secret)


# What is told.


def test_the_word_of_the_agent(cache: KeyCache, clock: ManualClock) -> None:
    made = Made(1)
    word = cache.word(OWNER)
    assert (word.was_given, word.withdrawn, word.valid_for_s) == (False, False, 0.0)
    install(cache, clock, made())
    clock.shift(30)
    word = cache.word(OWNER)
    assert (word.was_given, word.withdrawn, word.valid_for_s) == (True, False, VALIDITY_S - 30)
    install(cache, clock, Made(2)(S.DEACTIVATED), operation=Operation.ADD)
    assert cache.word(OWNER).valid_for_s == VALIDITY_S - 30, "an answer about one key is no word about all"
    install(cache, clock, made(S.SUSPENDED))
    assert cache.word(OWNER).valid_for_s == VALIDITY_S, "a key without material is a word as well"
    clock.set_wall(clock.wall_s() + 100)  # the machine stood still
    cache.take_off_lost_time()
    assert cache.word(OWNER).valid_for_s == pytest.approx(VALIDITY_S - 100)
    clock.shift(VALIDITY_S)
    word = cache.word(OWNER)
    assert (word.was_given, word.withdrawn, word.valid_for_s) == (True, False, 0.0)
    install(cache, clock)
    word = cache.word(OWNER)
    assert (word.was_given, word.withdrawn, word.valid_for_s) == (True, True, 0.0)


def test_status_counts_down(cache: KeyCache, clock: ManualClock) -> None:
    install(cache, clock, Made(1)())
    clock.shift(30)
    (status,) = cache.status([OWNER])
    assert status.can_seal
    assert status.reason is None
    assert status.valid_for_s == pytest.approx(300)
    (holding,) = status.holds
    assert holding.state is KeyState.ACTIVE
    assert holding.valid_for_s == pytest.approx(300)
    clock.shift(301)
    (status,) = cache.status([OWNER])
    assert not status.can_seal
    assert status.reason is Unavailable.EXPIRED
    assert status.valid_for_s == 0
    assert status.holds == ()
    (status,) = cache.status([NetworkService("acme", "mail")])
    assert status.reason is Unavailable.UNKNOWN
    assert (status.can_seal, status.holds, status.missed) == (False, (), ())
