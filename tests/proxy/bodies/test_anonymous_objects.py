"""Which key an object that names none is opened by: order, bound, record."""

from collections.abc import Iterator

import pytest

from envelope import derive
from envelope.errors import IntegrityError, KeyUnavailableError, Unavailable
from envelope.keys import ANONYMOUS, KeyId, KeyMaterial, KeyState, NetworkService
from envelope.objects import MAX_CANDIDATES, Sealer
from proxy.bodies.anonymous_objects import AnonymousKeys, candidate
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from tests.fakes.clock import ManualClock

OWNER = NetworkService("acme", "files")
VALIDITY_S = 300.0


class Bench:
    """A cache, and what was recorded."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.keys = KeyCache(self.clock)
        self.tried: list[int] = []
        self.used: list[DataKey] = []
        self.anonymous = AnonymousKeys(self.keys, OWNER, tried=self.tried.append, use=self.used.append)

    def install(self, *states: KeyState) -> None:
        """Versions 1, 2, ... in these states, each of the material of its number."""
        keys = [
            KeyMaterial(
                owner=OWNER,
                key_id=KeyId(version.to_bytes(16)),
                state=state,
                version=version,
                secret=bytearray(bytes([version]) * 32),
            )
            for version, state in enumerate(states, start=1)
        ]
        self.keys.install(OWNER, keys, deadline_boot_s=self.clock.boot_s() + VALIDITY_S)

    def versions(self) -> list[int]:
        return [key.version for key in self.keys.candidates(OWNER)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.keys.close()


def sealed(version: int) -> bytes:
    sealer = Sealer(derive.object_key(bytes([version]) * 32, OWNER, ANONYMOUS), OWNER, ANONYMOUS)
    return bytes(sealer.update(b"hello")) + sealer.finalize()


D = KeyState.DEACTIVATED


def test_the_active_key_comes_first_then_the_newest_that_may_open(bench: Bench) -> None:
    bench.install(D, KeyState.ACTIVE, KeyState.SUSPENDED, D, KeyState.COMPROMISED, KeyState.PRE_ACTIVE)
    assert bench.versions() == [2, 6, 4, 1]
    for version in (1, 2, 4, 6):
        assert bench.anonymous.of(sealed(version)).version == version
    assert (bench.tried, [key.version for key in bench.used]) == ([4] * 4, [1, 2, 4, 6])
    for version in (3, 5, 7):
        with pytest.raises(IntegrityError):
            bench.anonymous.of(sealed(version))
    assert bench.tried == [4] * 7, "the search is recorded, whatever comes of it"
    assert len(bench.used) == 4


def test_at_most_so_many_are_tried(bench: Bench) -> None:
    bench.install(*[D] * MAX_CANDIDATES, KeyState.ACTIVE)
    assert bench.anonymous.of(sealed(2)).version == 2
    with pytest.raises(IntegrityError):
        bench.anonymous.of(sealed(1))
    assert bench.tried == [MAX_CANDIDATES] * 2


async def test_without_a_key_the_answer_says_why(bench: Bench) -> None:
    for states, reason in (
        ((), Unavailable.WITHDRAWN),
        ((KeyState.SUSPENDED,), Unavailable.SUSPENDED),
    ):
        bench.install(*states)
        with pytest.raises(KeyUnavailableError) as refused:
            bench.anonymous.of(sealed(1))
        assert refused.value.reason is reason
    bench.install(KeyState.ACTIVE)
    found = bench.anonymous.candidates()
    await bench.clock.advance(VALIDITY_S)
    with pytest.raises(KeyUnavailableError):
        bench.anonymous.found(0)
    with pytest.raises(KeyUnavailableError) as refused:
        bench.anonymous.candidates()
    assert refused.value.reason is Unavailable.EXPIRED
    assert bytes(found[0].object_key) == bytes(32), "what was derived is overwritten with the key"
    assert bench.used == []


def test_what_is_not_recorded_is_not_done() -> None:
    bench = Bench()
    bench.install(KeyState.ACTIVE)

    def refuse(_value: object) -> None:
        raise PermissionError

    ignore = bench.tried.append
    for keys in (
        AnonymousKeys(bench.keys, OWNER, tried=refuse, use=bench.used.append),
        AnonymousKeys(bench.keys, OWNER, tried=ignore, use=refuse),
    ):
        with pytest.raises(PermissionError):
            keys.of(sealed(1))
    bench.keys.close()


def test_the_key_is_the_formats(bench: Bench) -> None:
    bench.install(KeyState.ACTIVE)
    [key] = bench.keys.candidates(OWNER)
    expected = derive.object_key(bytes([1]) * 32, OWNER, ANONYMOUS)
    assert bytes(candidate(key).object_key) == expected
    assert expected != bytes(key.object_key)
