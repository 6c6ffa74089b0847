"""Bodies that change on their way: every length, every piece, every failure as a refusal."""

import functools
import hashlib
import os
from collections.abc import Callable

import pytest

from envelope.errors import FormatError, IntegrityError, KeyUnavailableError, MisuseError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.objects import CHUNK_SIZE, Header, Opener, sealed_length, sealed_range
from proxy import refusals
from proxy.bodies.bodies import NoBody, SealBody, refusal_for, sealing_refusal
from proxy.bodies.opening import OpenBody, OpenRangeBody
from proxy.gate.permit import Transform
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import ExpectedDigest
from proxy.messages.ranges import AskedRange
from proxy.plans.plan import EmptyBody
from proxy.refusals import Refusal, RefusedError
from runtime.audit import AuditUnavailableError
from tests.fakes.clock import ManualClock

OWNER = NetworkService("acme", "files")
EDGES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE, 50_000]
STEPS = [1000, CHUNK_SIZE, CHUNK_SIZE + 16, 1 << 20]


class Keys:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.cache = KeyCache(self.clock)
        self.key_id = KeyId.random()
        material = KeyMaterial(
            owner=OWNER, key_id=self.key_id, state=KeyState.ACTIVE, secret=bytearray(os.urandom(32))
        )
        self.cache.install(OWNER, [material], deadline_boot_s=self.clock.boot_s() + 330)

    @property
    def key(self) -> DataKey:
        return self.cache.sealing_key(OWNER)

    def find(self, header: Header) -> DataKey:
        return self.cache.opening_key(OWNER, header.key_id)


@pytest.fixture
def keys() -> Keys:
    return Keys()


class Meter:
    def __init__(self) -> None:
        self.total = 0

    def __call__(self, count: int) -> None:
        self.total += count


def run(body: Transform, content: bytes, step: int = 1 << 20) -> bytes:
    out = bytearray()
    for at in range(0, len(content), step):
        for piece in body(content[at : at + step]):
            out += piece
    for piece in body(b""):
        out += piece
    return bytes(out)


def seal(keys: Keys, plain: bytes) -> bytes:
    return run(SealBody(keys.key, plain_bytes=len(plain), meter=Meter()), plain)


def refusal_of(call: Callable[[], object]) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.refusal


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("step", STEPS)
def test_what_is_sealed_opens_again_in_any_pieces(keys: Keys, size: int, step: int) -> None:
    plain, sealed_meter, opened_meter = os.urandom(size), Meter(), Meter()
    sealed = run(SealBody(keys.key, plain_bytes=size, meter=sealed_meter), plain, step)
    assert len(sealed) == sealed_length(size)
    independent = Opener(OWNER, lambda _header: keys.key.object_key)
    assert bytes(independent.update(sealed)) + independent.finalize() == plain
    body = OpenBody(OWNER, keys.find, out_bytes=size, meter=opened_meter)
    assert run(body, sealed, step) == plain
    assert body.key is keys.key
    assert (sealed_meter.total, opened_meter.total) == (size, size)


def test_an_empty_body_that_is_a_command_stays_empty(keys: Keys) -> None:
    assert run(SealBody(keys.key, empty=EmptyBody.KEEP, meter=Meter()), b"") == b""
    assert len(run(SealBody(keys.key, meter=Meter()), b"")) == 104


@pytest.mark.parametrize("declared", [99, 101])
def test_another_length_than_declared_never_gets_its_last_chunk(keys: Keys, declared: int) -> None:
    body = SealBody(keys.key, plain_bytes=declared, meter=Meter())
    assert refusal_of(lambda: run(body, bytes(100))) is refusals.BAD_LENGTH
    assert body.out_bytes <= 88


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_digests_are_compared_before_the_last_chunk(keys: Keys, algorithm: str) -> None:
    plain = os.urandom(3 * CHUNK_SIZE)
    right = ExpectedDigest(
        algorithm=algorithm, value=hashlib.new(algorithm, plain, usedforsecurity=False).digest()
    )
    assert len(run(SealBody(keys.key, digests=(right,), meter=Meter()), plain)) == sealed_length(len(plain))
    wrong = ExpectedDigest(algorithm=algorithm, value=bytes(len(right.value)))
    body = SealBody(keys.key, digests=(right, wrong), meter=Meter())
    assert refusal_of(lambda: run(body, plain)) is refusals.BAD_DIGEST
    assert body.out_bytes < sealed_length(len(plain))


def test_every_body_stops_when_its_key_ends(keys: Keys) -> None:
    plain = os.urandom(2 * CHUNK_SIZE)
    sealed = seal(keys, plain)
    sealing = SealBody(keys.key, meter=Meter())
    opening = OpenBody(OWNER, keys.find, out_bytes=None, meter=Meter())
    ranged = OpenRangeBody(keys.key, sealed[:88], asked(plain, 0, 10), meter=Meter())
    finishing: list[Transform] = [
        SealBody(keys.key, meter=Meter()),
        OpenBody(OWNER, keys.find, out_bytes=None, meter=Meter()),
        OpenRangeBody(keys.key, sealed[:88], asked(plain, 0, 10), meter=Meter()),
    ]
    finishing[0](plain)
    finishing[1](sealed)
    finishing[2](sealed[88 : 88 + 16400])
    opening(sealed[:200])
    keys.clock.shift(331)
    running: list[tuple[Transform, bytes]] = [
        (sealing, plain),
        (opening, sealed[200:]),
        (ranged, sealed[88:]),
        *((body, b"") for body in finishing),
    ]
    for body, piece in running:
        assert refusal_of(functools.partial(body, piece)) is refusals.KEY_EXPIRED


def test_a_withdrawn_key_stops_running_bodies(keys: Keys) -> None:
    body = SealBody(keys.key, meter=Meter())
    body(b"x")
    keys.cache.withdraw(OWNER)
    assert refusal_of(lambda: body(b"y")) is refusals.KEY_WITHDRAWN


def test_a_refresh_prolongs_running_bodies(keys: Keys) -> None:
    body = SealBody(keys.key, meter=Meter())
    keys.clock.shift(300)
    secret = bytearray(keys.key._secret)
    again = KeyMaterial(owner=OWNER, key_id=keys.key_id, state=KeyState.ACTIVE, secret=secret)
    keys.cache.install(OWNER, [again], deadline_boot_s=keys.clock.boot_s() + 330)
    keys.clock.shift(300)
    assert len(run(body, b"x")) == sealed_length(1)


@pytest.mark.parametrize("framed", [True, False])
def test_every_flip_and_cut_of_a_small_object_is_refused(keys: Keys, framed: bool) -> None:
    plain = b"attack at dawn"
    sealed = seal(keys, plain)
    for at in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[at] ^= 1
        for content in (bytes(damaged), sealed[:at]):
            body = OpenBody(OWNER, keys.find, out_bytes=len(plain) if framed else None, meter=Meter())
            out = refusal_of(functools.partial(run, body, content))
            assert out in (refusals.OBJECT_INVALID, refusals.NOT_SEALED, refusals.KEY_UNKNOWN)
            assert body.out_bytes == 0
    assert refusal_of(
        lambda: run(OpenBody(OWNER, keys.find, out_bytes=None, meter=Meter()), sealed + b"x")
    ) is refusals.OBJECT_INVALID  # fmt: skip


def test_only_verified_chunks_come_out_before_a_bad_one(keys: Keys) -> None:
    plain = os.urandom(4 * CHUNK_SIZE)
    damaged = bytearray(seal(keys, plain))
    damaged[88 + 2 * 16400 + 5] ^= 1
    body = OpenBody(OWNER, keys.find, out_bytes=len(plain), meter=Meter())
    out = bytearray()

    def feed() -> None:
        for at in range(0, len(damaged), 1000):
            for piece in body(bytes(damaged[at : at + 1000])):
                out.extend(piece)

    assert refusal_of(feed) is refusals.OBJECT_INVALID
    assert out == plain[: 2 * CHUNK_SIZE]


def test_what_is_not_sealed(keys: Keys) -> None:
    def opened(content: bytes, *, may_be_simple: bool = True, may_be_legacy: bool = False) -> bytes:
        body = OpenBody(
            OWNER,
            keys.find,
            out_bytes=None,
            may_be_simple=may_be_simple,
            may_be_legacy=may_be_legacy,
            meter=Meter(),
        )
        return run(body, content, step=3)

    sealed = seal(keys, b"ours")
    assert refusal_of(lambda: opened(b"plain text")) is refusals.NOT_SEALED
    assert refusal_of(lambda: opened(b"x")) is refusals.NOT_SEALED
    assert refusal_of(lambda: opened(b"")) is refusals.OBJECT_INVALID
    for content in (b"plain text", b"x", b""):
        assert opened(content, may_be_legacy=True) == content
    assert opened(sealed, may_be_legacy=True) == b"ours"
    assert (
        refusal_of(lambda: opened(sealed, may_be_simple=False, may_be_legacy=True)) is refusals.OBJECT_INVALID
    )
    assert refusal_of(lambda: opened(sealed, may_be_simple=False)) is refusals.OBJECT_INVALID
    assert refusal_of(lambda: opened(sealed[:40], may_be_legacy=True)) is refusals.OBJECT_INVALID


def test_a_legacy_body_is_told_once_and_refused_if_that_cannot_be_recorded(keys: Keys) -> None:
    told: list[int] = []
    body = OpenBody(
        OWNER, keys.find, out_bytes=None, may_be_legacy=True, on_legacy=lambda: told.append(1), meter=Meter()
    )
    assert run(body, b"plain text in pieces", step=3) == b"plain text in pieces"
    assert told == [1]

    def cannot() -> None:
        raise AuditUnavailableError("is full", "free it")

    body = OpenBody(OWNER, keys.find, out_bytes=None, may_be_legacy=True, on_legacy=cannot, meter=Meter())
    assert refusal_of(lambda: body(b"plain text")) is refusals.AUDIT_UNAVAILABLE


def test_a_key_whose_use_is_not_recorded_opens_nothing(keys: Keys) -> None:
    def find(_header: Header) -> DataKey:
        raise AuditUnavailableError("is full", "free it")

    body = OpenBody(OWNER, find, out_bytes=None, meter=Meter())
    assert refusal_of(lambda: run(body, seal(keys, b"x"))) is refusals.AUDIT_UNAVAILABLE


def asked(plain: bytes, start: int, stop: int) -> AskedRange:
    stored = sealed_range(start, stop, plain_bytes=len(plain))
    return AskedRange(
        stored=stored, stored_bytes=sealed_length(len(plain)), plain=(start, stop), plain_bytes=len(plain),
        pinned=False, etag=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 50_000), (16383, 16385), (49_999, 50_000), (32768, 49_152)]
)
@pytest.mark.parametrize("step", STEPS)
def test_ranges(keys: Keys, start: int, stop: int, step: int) -> None:
    plain = os.urandom(50_000)
    sealed = seal(keys, plain)
    wanted = asked(plain, start, stop)
    body = OpenRangeBody(keys.key, sealed[:88], wanted, meter=Meter())
    assert body.expected_out_bytes == stop - start
    assert run(body, sealed[slice(*wanted.stored)], step) == plain[start:stop]
    for content in (sealed[wanted.stored[0] : wanted.stored[1] - 1], sealed[slice(*wanted.stored)] + b"x"):
        body = OpenRangeBody(keys.key, sealed[:88], wanted, meter=Meter())
        assert refusal_of(functools.partial(run, body, content)) is refusals.OBJECT_INVALID


def test_a_range_under_another_prefix_is_refused(keys: Keys) -> None:
    plain = os.urandom(50_000)
    sealed, other = seal(keys, plain), seal(keys, plain)
    wanted = asked(plain, 0, 100)
    body = OpenRangeBody(keys.key, other[:88], wanted, meter=Meter())
    assert refusal_of(lambda: run(body, sealed[slice(*wanted.stored)])) is refusals.OBJECT_INVALID
    broken = bytearray(sealed[:88])
    broken[60] ^= 1
    assert refusal_of(
        lambda: OpenRangeBody(keys.key, bytes(broken), wanted, meter=Meter())
    ) is refusals.OBJECT_INVALID  # fmt: skip


def test_no_body_means_none() -> None:
    assert run(NoBody(), b"") == b""
    assert refusal_of(lambda: NoBody()(b"x")) is refusals.UNKNOWN_ROUTE


def test_every_reason_has_its_refusal() -> None:
    for reason in Unavailable:
        error = KeyUnavailableError(reason, "x")
        assert refusal_for(error).status in (410, 423, 503)
        assert sealing_refusal(error).status in (410, 423, 503)
    assert sealing_refusal(KeyUnavailableError(Unavailable.UNKNOWN, "x")) is refusals.NO_ACTIVE_KEY
    assert refusal_for(IntegrityError("x")) is refusal_for(FormatError("x")) is refusals.OBJECT_INVALID
    assert refusal_for(MisuseError("x")) is refusals.INTERNAL


def test_bodies_show_no_key(keys: Keys) -> None:
    body = SealBody(keys.key, meter=Meter())
    assert keys.key.object_key.hex() not in repr(body) + repr(vars(body))
