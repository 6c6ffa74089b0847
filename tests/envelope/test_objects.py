"""Sealed objects: any length in any pieces, any range, lengths both ways, headers, key finding."""

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envelope import derive
from envelope.errors import (
    FormatError,
    IntegrityError,
    KeyUnavailableError,
    MisuseError,
    TruncatedError,
    Unavailable,
    UnsupportedVersion,
)
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from envelope.objects import (
    CHUNK_SIZE,
    HEADER_SIZE,
    MAGIC,
    MAX_CANDIDATES,
    PLAIN_LIMIT,
    PREFIX_SIZE,
    RECORD_SIZE,
    Bind,
    Candidate,
    Header,
    Opener,
    RangeOpener,
    Sealer,
    has_magic,
    matching,
    plain_length,
    sealed_length,
    sealed_range,
)
from tests.envelope.samples import (
    BOUNDARY_LENGTHS,
    KEY_ID,
    MATERIAL,
    OBJECT_KEY,
    OTHER_MATERIAL,
    OWNER,
    always,
    cut,
    pattern,
    refused,
    run,
    seal,
    unseal,
)
from tests.vectors import reference

STEPS = (1, 2, 15, 16, 17, 31, 32, 33, 87, 88, 89, 16383, 16384, 16385, 16399, 16400, 16401, 65536)


# --- streaming ---


@pytest.mark.parametrize("size", BOUNDARY_LENGTHS)
def test_every_boundary_length_in_every_step(size: int) -> None:
    plain = pattern(size)
    for step in STEPS:
        sealed = run(Sealer(OBJECT_KEY, OWNER, KEY_ID), cut(plain, step))
        assert len(sealed) == sealed_length(size)
        assert run(Opener(OWNER, always()), cut(sealed, step)) == plain
    assert reference.open_object(MATERIAL, ("tenant-a", "drive"), seal(plain)) == plain


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3 * CHUNK_SIZE + 40),
    st.lists(st.integers(0, 3 * RECORD_SIZE), max_size=12),
    st.lists(st.integers(0, 3 * RECORD_SIZE), max_size=12),
)
def test_any_length_cut_anywhere(size: int, seal_cuts: list[int], open_cuts: list[int]) -> None:
    plain = pattern(size)
    sealed = run(Sealer(OBJECT_KEY, OWNER, KEY_ID), _cut_at(plain, seal_cuts))
    assert len(sealed) == sealed_length(size)
    assert run(Opener(OWNER, always()), _cut_at(sealed, open_cuts)) == plain


def _cut_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def test_the_prefix_comes_first_and_at_once() -> None:
    sealer = Sealer(OBJECT_KEY, OWNER, KEY_ID)
    prefix = sealer.update(b"x")
    assert len(prefix) == PREFIX_SIZE
    assert Header.parse(prefix) == sealer.header == Header(KEY_ID)
    assert prefix[-32:] == sealer.commitment
    assert sealer.update(b"y") == b""


def test_the_header_is_known_after_32_bytes_and_the_key_is_asked_for_once() -> None:
    asked: list[Header] = []

    def find(header: Header) -> bytes:
        asked.append(header)
        return OBJECT_KEY

    opener = Opener(OWNER, find)
    sealed = seal(b"hello")
    opener.update(sealed[:31])
    before = opener.header
    assert (before, asked) == (None, [])
    opener.update(sealed[31:32])
    assert opener.header == Header(KEY_ID)
    assert asked == [Header(KEY_ID)]
    assert opener.update(sealed[32:]) + opener.finalize() == b"hello"
    assert len(asked) == 1


def test_a_key_that_is_not_there_stays_away() -> None:
    def find(header: Header) -> bytes:
        raise KeyUnavailableError(Unavailable.EXPIRED, f"key {header.key_id} has expired")

    assert refused(Opener(OWNER, find), [seal(b"hello")], KeyUnavailableError) == b""


def test_a_magic_in_the_plaintext_is_sealed_like_any_other() -> None:
    inner = seal(b"hello")
    assert unseal(seal(inner)) == inner


@pytest.mark.parametrize(
    ("bind", "name"), [(Bind.NAME, b"/a"), (Bind.CALLER, b"id"), (Bind.PART, b"p"), (Bind.MANIFEST, b"")]
)
def test_bound_names(bind: Bind, name: bytes) -> None:
    sealed = seal(b"hello", bind=bind, name=name)
    assert unseal(sealed, bind=bind, name=name) == b"hello"
    refused(Opener(OWNER, always(), bind=bind, name=name + b"x"), [sealed], IntegrityError)
    # The header never relaxes the reader's policy, nor tightens it silently.
    refused(Opener(OWNER, always()), [sealed], IntegrityError)
    refused(Opener(OWNER, always(), bind=bind, name=name or b"n"), [seal(b"hello")], IntegrityError)


def test_names_that_do_not_fit_the_bind() -> None:
    with pytest.raises(MisuseError, match="nothing is to be bound"):
        Sealer(OBJECT_KEY, OWNER, KEY_ID, name=b"/a")
    with pytest.raises(MisuseError, match="nothing is to be bound"):
        Opener(OWNER, always(), name=b"/a")
    for bind in (Bind.NAME, Bind.CALLER, Bind.PART):
        with pytest.raises(MisuseError, match="needs a name"):
            Sealer(OBJECT_KEY, OWNER, KEY_ID, bind=bind)
    with pytest.raises(MisuseError, match="16-bit"):
        Sealer(OBJECT_KEY, OWNER, KEY_ID, bind=Bind.NAME, name=b"x" * 65536)


@pytest.mark.parametrize("key", [b"", bytes(16), b"k" * 33, bytes(32)])
def test_object_keys_that_are_none(key: bytes) -> None:
    with pytest.raises(MisuseError):
        Sealer(key, OWNER, KEY_ID)
    refused(Opener(OWNER, always(key)), [seal(b"hello")], MisuseError)


def test_swapped_and_older_objects_open_where_nothing_is_bound() -> None:
    """Documented, not a defect (threat 3): bind 00 allows server-side copy, no bind detects a rollback."""
    first, second = seal(b"version 1"), seal(b"version 2")
    assert (unseal(second), unseal(first)) == (b"version 2", b"version 1")
    one = seal(b"1", bind=Bind.NAME, name=b"/one")
    two = seal(b"2", bind=Bind.NAME, name=b"/two")
    for stored, name in ((one, b"/two"), (two, b"/one")):
        refused(Opener(OWNER, always(), bind=Bind.NAME, name=name), [stored], IntegrityError)


# --- anonymous objects ---


def _anonymous_keys(*materials: bytes) -> list[bytes]:
    return [derive.object_key(material, OWNER, ANONYMOUS) for material in materials]


def _candidates(keys: Sequence[bytes]) -> list[Candidate]:
    return [Candidate(OWNER, key) for key in keys]


def test_anonymous_objects_are_opened_by_trial() -> None:
    keys = _anonymous_keys(*(bytes([number]) * 32 for number in range(1, MAX_CANDIDATES + 1)))
    for index in (0, 1, MAX_CANDIDATES - 1):
        sealed = seal(b"hello", key=keys[index], key_id=ANONYMOUS)
        opener = Opener(OWNER, _never, candidates=lambda: _candidates(keys))
        assert run(opener, cut(sealed, 10)) == b"hello"
        assert opener.matched == index


def test_trial_has_a_limit() -> None:
    keys = _anonymous_keys(*(bytes([number]) * 32 for number in range(1, MAX_CANDIDATES + 2)))
    sealed = seal(b"hello", key=keys[0], key_id=ANONYMOUS)
    refused(Opener(OWNER, _never, candidates=lambda: _candidates(keys)), [sealed], MisuseError)


def test_no_candidate_fits() -> None:
    sealed = seal(b"hello", key=_anonymous_keys(MATERIAL)[0], key_id=ANONYMOUS)
    for keys in ([], _anonymous_keys(OTHER_MATERIAL)):
        candidates = _candidates(keys)
        refused(Opener(OWNER, _never, candidates=lambda: candidates), [sealed], IntegrityError)  # noqa: B023 - run at once


def test_the_prefix_alone_tells_which_candidate_it_is() -> None:
    keys = _candidates(_anonymous_keys(OTHER_MATERIAL, MATERIAL))
    sealed = seal(b"hello", key=bytes(keys[1].object_key), key_id=ANONYMOUS)
    assert matching(sealed, keys) == matching(sealed[:88], keys) == 1
    for wrong in (seal(b"hello"), sealed[:87], b"\0" + sealed[1:], sealed[:60] + bytes(28), b""):
        with pytest.raises((FormatError, IntegrityError)):
            matching(wrong, keys)
    bound = seal(b"hello", key=bytes(keys[1].object_key), key_id=ANONYMOUS, bind=Bind.NAME, name=b"/a")
    with pytest.raises(IntegrityError):
        matching(bound, keys)
    with pytest.raises(MisuseError):
        matching(sealed, [keys[1]] * (MAX_CANDIDATES + 1))


def test_a_candidate_brings_its_owner() -> None:
    """The same material of two services: whose object it is decides, and where it stands does not."""
    other = NetworkService(OWNER.tenant, "another")
    key = _anonymous_keys(MATERIAL)[0]
    sealed = seal(b"hello", key=key, key_id=ANONYMOUS)
    for index, owners in enumerate(((OWNER, other), (other, OWNER))):
        candidates = [Candidate(owner, key) for owner in owners]
        opener = Opener(other, _never, candidates=lambda: candidates)  # noqa: B023 - run at once
        assert run(opener, cut(sealed, 10)) == b"hello"
        assert opener.matched == index
    refused(Opener(OWNER, _never, candidates=lambda: [Candidate(other, key)]), [sealed], IntegrityError)


def test_a_named_key_is_never_looked_for_among_candidates() -> None:
    def candidates() -> Sequence[Candidate]:
        pytest.fail("tried by trial")

    assert run(Opener(OWNER, always(), candidates=candidates), [seal(b"hello")]) == b"hello"


def _never(header: Header) -> bytes:
    pytest.fail(f"asked for {header}")


# --- lengths ---


def test_lengths_of_known_objects() -> None:
    assert [sealed_length(size) for size in (0, 1024, 2**20)] == [104, 1128, 2**20 + 1128]


@given(st.integers(0, PLAIN_LIMIT - 1))
def test_lengths_both_ways(size: int) -> None:
    assert plain_length(sealed_length(size)) == size


@given(st.integers(-100, 10**6))
def test_a_length_is_possible_or_refused(size: int) -> None:
    try:
        plain = plain_length(size)
    except FormatError:
        assert size < 104 or (size - 88) % 16400 < 16
    else:
        assert sealed_length(plain) == size


def test_lengths_beyond_the_format() -> None:
    assert sealed_length(PLAIN_LIMIT - 1) > PLAIN_LIMIT
    for plain in (-1, PLAIN_LIMIT):
        with pytest.raises(FormatError):
            sealed_length(plain)
    with pytest.raises(FormatError):
        plain_length(sealed_length(PLAIN_LIMIT - 1) + 1 + 16)


# --- ranges ---


def _open_range(sealed: bytes, start: int, stop: int, *, step: int = 10**6) -> bytes:
    plain_bytes = plain_length(len(sealed))
    begin, end = sealed_range(start, stop, plain_bytes=plain_bytes)
    opener = RangeOpener(
        OWNER, always(), sealed[:PREFIX_SIZE], start=start, stop=stop, plain_bytes=plain_bytes
    )
    return run(opener, cut(sealed[begin:end], step))


@pytest.mark.parametrize("size", [1, 100, 16383, 16384, 16385, 32768, 40000, 49152])
def test_ranges_around_every_boundary(size: int) -> None:
    plain, sealed = pattern(size), seal(pattern(size))
    near = {0, 1, size // 2, size - 1, size}
    near |= {edge + delta for edge in range(CHUNK_SIZE, size + 1, CHUNK_SIZE) for delta in (-1, 0, 1)}
    edges = sorted(edge for edge in near if 0 <= edge <= size)
    for start, stop in itertools.combinations(edges, 2):
        assert _open_range(sealed, start, stop) == plain[start:stop]
        assert _open_range(sealed, start, stop, step=5000) == plain[start:stop]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70_000), st.data())
def test_any_range(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    step = data.draw(st.integers(50, 40_000))
    assert _open_range(seal(pattern(size)), start, stop, step=step) == pattern(size)[start:stop]


def test_a_range_is_whole_records() -> None:
    assert sealed_range(0, 1, plain_bytes=40000) == (88, 88 + 16400)
    assert sealed_range(16383, 16385, plain_bytes=40000) == (88, 88 + 2 * 16400)
    assert sealed_range(39999, 40000, plain_bytes=40000) == (88 + 2 * 16400, 40136)
    assert sealed_range(0, 40000, plain_bytes=40000) == (88, 40136)
    assert sealed_range(16384, 32768, plain_bytes=32768) == (88 + 16400, 88 + 2 * 16400)
    assert sealed_range(32768, 32768, plain_bytes=32768) == (88 + 2 * 16400, 88 + 2 * 16400 + 16)
    assert sealed_range(0, 0, plain_bytes=0) == (88, 104)


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 40000])
def test_the_last_record_alone_proves_the_length(size: int) -> None:
    sealed = seal(pattern(size))
    assert _open_range(sealed, size, size) == b""
    # A server that claims another length, with bytes to match, is found out.
    for lie in (size + 1, size + CHUNK_SIZE, size - 1 if size else 2):
        opener = RangeOpener(OWNER, always(), sealed[:PREFIX_SIZE], start=lie, stop=lie, plain_bytes=lie)
        begin, end = sealed_range(lie, lie, plain_bytes=lie)
        forged = (sealed + bytes(2 * RECORD_SIZE))[begin:end]
        refused(opener, [forged], IntegrityError)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 0), (5, 5), (6, 5), (0, 11), (10, 11), (11, 11)])
def test_ranges_outside(start: int, stop: int) -> None:
    with pytest.raises(MisuseError):
        sealed_range(start, stop, plain_bytes=10)
    with pytest.raises(MisuseError):
        RangeOpener(OWNER, always(), seal(b"0123456789")[:88], start=start, stop=stop, plain_bytes=10)


def test_a_range_with_too_few_or_too_many_bytes() -> None:
    sealed = seal(pattern(40000))
    for start, stop in ((0, 100), (20_000, 40_000), (0, 40_000)):
        begin, end = sealed_range(start, stop, plain_bytes=40000)

        def opener(start: int = start, stop: int = stop) -> RangeOpener:
            return RangeOpener(OWNER, always(), sealed[:88], start=start, stop=stop, plain_bytes=40000)

        refused(opener(), [], TruncatedError)
        refused(opener(), [sealed[begin : end - 1]], TruncatedError)
        refused(opener(), [sealed[begin:end], b"x"], IntegrityError)
        refused(opener(), [sealed[begin:end] + b"x"], IntegrityError)
        # Records of another place, whole and authentic.
        if end - begin <= RECORD_SIZE:
            refused(opener(), [sealed[begin + RECORD_SIZE : end + RECORD_SIZE]], IntegrityError)


def test_a_finished_range_takes_empty_pieces() -> None:
    sealed = seal(pattern(100))
    opener = RangeOpener(OWNER, always(), sealed[:88], start=10, stop=20, plain_bytes=100)
    assert opener.update(sealed[88:]) + opener.update(b"") + opener.finalize() == pattern(100)[10:20]


def test_a_range_checks_header_and_commitment_first() -> None:
    sealed = bytearray(seal(pattern(100)))

    def begin(prefix: bytes) -> None:
        RangeOpener(OWNER, always(), prefix, start=0, stop=1, plain_bytes=100)

    with pytest.raises(TruncatedError):
        begin(bytes(sealed[:87]))
    with pytest.raises(TruncatedError):
        begin(bytes(sealed[:20]))
    with pytest.raises(FormatError):
        begin(bytes(88))
    for at in (12, 28, 32, 56, 87):
        damaged = bytearray(sealed[:88])
        damaged[at] ^= 1
        with pytest.raises(IntegrityError):
            begin(bytes(damaged))


def test_mixed_versions_of_an_object_do_not_make_a_range() -> None:
    old, new = seal(pattern(40000)), seal(pattern(40000))
    begin, end = sealed_range(20_000, 20_010, plain_bytes=40000)
    opener = RangeOpener(OWNER, always(), old[:88], start=20_000, stop=20_010, plain_bytes=40000)
    refused(opener, [new[begin:end]], IntegrityError)


def test_ranges_of_anonymous_and_bound_objects() -> None:
    keys = _anonymous_keys(OTHER_MATERIAL, MATERIAL)
    sealed = seal(b"hello", key=keys[1], key_id=ANONYMOUS, bind=Bind.NAME, name=b"/a")
    opener = RangeOpener(
        OWNER,
        _never,
        sealed[:88],
        start=1,
        stop=3,
        plain_bytes=5,
        bind=Bind.NAME,
        name=b"/a",
        candidates=lambda: _candidates(keys),
    )
    assert run(opener, [sealed[88:]]) == b"el"


def test_an_object_beyond_4_gib() -> None:
    """Sparse: only the records that a range needs are ever made."""
    size = 5 * 2**30 + 123
    sealer = Sealer(OBJECT_KEY, OWNER, KEY_ID)
    prefix = bytes(sealer.update(b""))
    sealer._number = size // CHUNK_SIZE - 1
    tail = bytes(sealer.update(pattern(CHUNK_SIZE + size % CHUNK_SIZE))) + sealer.finalize()
    start, stop = size - size % CHUNK_SIZE - 10, size
    begin, end = sealed_range(start, stop, plain_bytes=size)
    assert (end, end - begin) == (sealed_length(size), len(tail))
    opener = RangeOpener(OWNER, always(), prefix, start=start, stop=stop, plain_bytes=size)
    assert run(opener, cut(tail, 777)) == pattern(CHUNK_SIZE + size % CHUNK_SIZE)[CHUNK_SIZE - 10 :]


# --- headers ---


@pytest.mark.parametrize("bind", Bind)
def test_header_both_ways(bind: Bind) -> None:
    header = Header(KeyId.random(), bind)
    assert len(header.encode()) == HEADER_SIZE
    assert Header.parse(header.encode() + b"behind") == header


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, 0x88, FormatError),
        (8, 0, UnsupportedVersion),
        (8, 2, UnsupportedVersion),
        (9, 0, UnsupportedVersion),
        (9, 2, UnsupportedVersion),
        (9, 3, UnsupportedVersion),
        (10, 1, FormatError),
        (11, 31, FormatError),
        (11, 33, FormatError),
        (28, 5, UnsupportedVersion),
        (28, 255, UnsupportedVersion),
        (29, 1, FormatError),
        (30, 1, FormatError),
        (31, 1, FormatError),
    ],
)
def test_headers_that_are_refused(at: int, value: int, error: type[FormatError]) -> None:
    raw = bytearray(Header(KEY_ID).encode())
    raw[at] = value
    with pytest.raises(error) as refusal:
        Header.parse(raw)
    assert type(refusal.value) is error
    sealed = bytes(raw) + seal(b"hello")[HEADER_SIZE:]
    refused(Opener(OWNER, always()), [sealed], error)


def test_magic() -> None:
    assert has_magic(seal(b""))
    assert has_magic(MAGIC)
    assert not has_magic(MAGIC[:7])
    assert not has_magic(b"\x89PNG\r\n\x1a\n")
    assert not has_magic(b"")


def test_what_is_no_object_and_what_is_a_cut_one() -> None:
    for foreign in (b"", b"plain text", MAGIC[:7], bytes(1000)):
        refused(Opener(OWNER, always()), [foreign], FormatError)
    for size in (8, 31, 32, 87, 88, 103):
        refused(Opener(OWNER, always()), [seal(b"")[:size]], TruncatedError)


def test_openers_do_not_share_state() -> None:
    """Many at once, fed in random order."""
    order = random.Random(7)
    plains = [pattern(20_000 + number) for number in range(20)]
    openers = [Opener(OWNER, always()) for _ in plains]
    pieces = [list(cut(seal(plain), 3000)) for plain in plains]
    outs = [bytearray() for _ in plains]
    while any(pieces):
        index = order.choice([number for number, left in enumerate(pieces) if left])
        outs[index] += openers[index].update(pieces[index].pop(0))
    assert [bytes(out + opener.finalize()) for out, opener in zip(outs, openers, strict=True)] == plains
