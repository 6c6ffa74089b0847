"""Composites: parts sent by any proxy, joined by a service, read whole or in ranges (threat 15)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

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
)
from envelope.keys import KeyId
from envelope.multipart import (
    LISTED,
    MAX_PARTS,
    TRAILER_MAGIC,
    TRAILER_SIZE,
    CompositeOpener,
    CompositeRangeOpener,
    Ending,
    Manifest,
    Part,
    block_number,
    composite_range,
    ending_range,
    open_ending,
    part_sealer,
    seal_ending,
    upload_ref,
)
from envelope.objects import CHUNK_SIZE, PREFIX_SIZE, RECORD_SIZE, Bind, Header, Opener, sealed_length
from tests.envelope.samples import (
    KEY_ID,
    MATERIAL,
    OBJECT_KEY,
    OTHER_TENANT,
    OWNER,
    always,
    cut,
    pattern,
    refused,
    run,
    seal,
)
from tests.vectors import reference

UPLOAD: Final = upload_ref("upload-1")
NOT_AS_WRITTEN: Final = (FormatError, IntegrityError)
SIZES: Final = (CHUNK_SIZE + 100, 0, CHUNK_SIZE, 5, 2 * CHUNK_SIZE)


@dataclass(frozen=True)
class _Composite:
    plain: bytes
    messages: tuple[bytes, ...]
    manifest: Manifest
    ending: bytes

    @property
    def stored(self) -> bytes:
        return b"".join(self.messages) + self.ending


def _part(number: int, plain: bytes, *, upload: bytes = UPLOAD, key_id: KeyId = KEY_ID) -> tuple[bytes, Part]:
    key = derive.object_key(MATERIAL, OWNER, key_id)
    sealer = part_sealer(key, OWNER, key_id, upload=upload, number=number)
    message = run(sealer, [plain])
    return message, Part(number, len(message), sealer.commitment)


def _join(parts: Sequence[tuple[bytes, Part]], *, upload: bytes = UPLOAD, name: bytes = b"") -> _Composite:
    manifest = Manifest(upload, tuple(part for _, part in parts))
    ending = seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest, name=name)
    return _Composite(b"", tuple(message for message, _ in parts), manifest, ending)


def _composite(sizes: Sequence[int] = SIZES, *, name: bytes = b"") -> _Composite:
    plain = pattern(sum(sizes))
    edges = [0, *itertools.accumulate(sizes)]
    parts = [
        _part(3 * index + 1, plain[begin:end]) for index, (begin, end) in enumerate(itertools.pairwise(edges))
    ]
    return replace(_join(parts, name=name), plain=plain)


def _ending(stored: bytes, *, name: bytes = b"") -> Ending:
    begin, end = ending_range(stored[-TRAILER_SIZE:], stored_bytes=len(stored))
    return open_ending(OWNER, always(), stored[begin:end], stored_bytes=len(stored), name=name)


def _read(stored: bytes, *, step: int = 10**6) -> bytes:
    return run(CompositeOpener(OWNER, always(), _ending(stored)), cut(stored, step))


def _read_refused(stored: bytes) -> None:
    """Refused somewhere on the way: at the trailer, the manifest, or the parts."""
    try:
        ending = _ending(stored)
    except NOT_AS_WRITTEN:
        return
    refused(CompositeOpener(OWNER, always(), ending), [stored], NOT_AS_WRITTEN)


# --- whole ---


@pytest.mark.parametrize("step", [1, 88, 1000, RECORD_SIZE, 10**6])
def test_round_trip(step: int) -> None:
    composite = _composite()
    assert _read(composite.stored, step=step) == composite.plain
    assert reference.open_composite(MATERIAL, ("tenant-a", "drive"), composite.stored) == composite.plain


@pytest.mark.parametrize("sizes", [(0,), (0, 0), (1,), (CHUNK_SIZE,), (CHUNK_SIZE - 1, CHUNK_SIZE + 1)])
def test_small_composites(sizes: tuple[int, ...]) -> None:
    composite = _composite(sizes)
    assert _read(composite.stored) == composite.plain
    assert composite.manifest.plain_bytes == len(composite.plain)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=6), st.integers(100, 50_000))
def test_any_parts_in_any_step(sizes: list[int], step: int) -> None:
    composite = _composite(sizes)
    assert _read(composite.stored, step=step) == composite.plain


def test_parts_may_be_sealed_under_different_keys() -> None:
    kids = [KeyId.random(), KeyId.random()]
    composite = _join([_part(number, b"part", key_id=kid) for number, kid in enumerate(kids)])
    asked: list[KeyId] = []

    def find(header: Header) -> bytes:
        asked.append(header.key_id)
        return derive.object_key(MATERIAL, OWNER, header.key_id)

    opener = CompositeOpener(OWNER, find, _ending(composite.stored))
    assert run(opener, [composite.stored]) == b"partpart"
    assert asked == kids


def test_a_missing_key_stops_the_reading() -> None:
    composite = _composite((10, 10))

    def find(_: Header) -> bytes:
        raise KeyUnavailableError(Unavailable.EXPIRED, "expired")

    refused(CompositeOpener(OWNER, find, _ending(composite.stored)), [composite.stored], KeyUnavailableError)


def test_a_bound_name() -> None:
    stored = _composite((5,), name=b"/a").stored
    assert _ending(stored, name=b"/a").manifest.plain_bytes == 5
    for name in (b"", b"/b"):
        with pytest.raises(IntegrityError):
            _ending(stored, name=name)


def test_upload_references() -> None:
    assert len(upload_ref("x")) == 16
    assert upload_ref("x") == upload_ref("x") != upload_ref("y")


# --- what is not as it was written ---


def test_a_composite_and_its_parts_do_not_open_as_single_objects() -> None:
    composite = _composite((5, 6))
    for stored in (composite.stored, composite.messages[0], composite.ending[:-TRAILER_SIZE]):
        refused(Opener(OWNER, always()), [stored], IntegrityError)


def _rearranged() -> list[Callable[[tuple[bytes, ...]], list[bytes]]]:
    return [
        lambda parts: [*parts[1:]],
        lambda parts: [*parts[:-1]],
        lambda parts: [parts[0], *parts[2:]],
        lambda parts: [parts[1], parts[0], *parts[2:]],
        lambda parts: [parts[0], parts[0], *parts[2:]],
        lambda parts: [*parts, parts[-1]],
        lambda parts: [],
    ]


@pytest.mark.parametrize("rearrange", _rearranged())
def test_dropped_reordered_and_doubled_parts(rearrange: Callable[[tuple[bytes, ...]], list[bytes]]) -> None:
    composite = _composite((50, 50, 50))
    _read_refused(b"".join(rearrange(composite.messages)) + composite.ending)


def test_a_superseded_part() -> None:
    """A part sent twice is two messages; only the one that the manifest lists is read."""
    first, second = _part(1, b"first try"), _part(1, b"other try")
    composite = _join([second, _part(2, b"end")])
    assert _read(composite.stored) == b"other tryend"
    _read_refused(first[0] + composite.messages[1] + composite.ending)
    # Even the same bytes again are another message.
    _read_refused(_part(1, b"other try")[0] + composite.messages[1] + composite.ending)


def test_parts_of_another_upload_or_number() -> None:
    good = _composite((9, 9))
    foreign, _ = _part(1, good.plain[:9], upload=upload_ref("upload-2"))
    _read_refused(foreign + good.messages[1] + good.ending)
    # And not even if a manifest lists them: the part itself names its upload and number.
    for message, part in (_part(1, b"x", upload=upload_ref("upload-2")), _part(2, b"x"), _whole(b"x")):
        lying = _join([(message, replace(part, number=1))])
        ending = _ending(lying.stored)
        refused(CompositeOpener(OWNER, always(), ending), [lying.stored], IntegrityError)


def _whole(plain: bytes) -> tuple[bytes, Part]:
    message = seal(plain)
    return message, Part(1, len(message), message[56:88])


def test_a_manifest_of_another_composite() -> None:
    one, other = _composite((9, 9)), _composite((9, 9))
    _read_refused(b"".join(one.messages) + other.ending)


def test_every_single_bit() -> None:
    stored = _composite((3, 2)).stored
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        _read_refused(bytes(damaged))


def test_every_truncation_and_an_extension() -> None:
    stored = _composite((3, 2)).stored
    for size in range(len(stored)):
        _read_refused(stored[:size])
    for tail in (b"\0", bytes(16), stored[-16:], stored):
        _read_refused(stored + tail)
        _read_refused(tail + stored)


def test_an_object_exchanged_between_the_two_reads() -> None:
    """The ending is read first, the parts later: each must be of one and the same composite."""
    one, other = _composite((9, 9)), _composite((9, 9))
    refused(CompositeOpener(OWNER, always(), _ending(one.stored)), [other.stored], IntegrityError)
    mixed = b"".join(one.messages) + other.ending
    refused(CompositeOpener(OWNER, always(), _ending(one.stored)), [mixed], IntegrityError)


def test_too_few_and_too_many_bytes() -> None:
    composite = _composite((9, 9))
    ending = _ending(composite.stored)
    for size in (0, 50, len(composite.messages[0]), len(composite.stored) - 1):
        refused(CompositeOpener(OWNER, always(), ending), [composite.stored[:size]], TruncatedError)
    refused(CompositeOpener(OWNER, always(), ending), [composite.stored, b"x"], IntegrityError)


def test_another_owner() -> None:
    composite = _composite((9,))
    with pytest.raises(IntegrityError):
        open_ending(OTHER_TENANT, always(), composite.ending, stored_bytes=len(composite.stored))
    refused(
        CompositeOpener(OTHER_TENANT, always(), _ending(composite.stored)), [composite.stored], IntegrityError
    )


# --- ranges ---


def _read_range(composite: _Composite, start: int, stop: int, *, step: int = 10**6) -> bytes:
    intervals = composite_range(composite.manifest, start, stop)
    fetched = b"".join(composite.stored[begin:end] for begin, end in intervals)
    opener = CompositeRangeOpener(OWNER, always(), composite.manifest, start=start, stop=stop)
    return run(opener, cut(fetched, step))


def test_ranges_around_every_boundary() -> None:
    composite = _composite()
    total = len(composite.plain)
    starts = [0, *itertools.accumulate(SIZES)]
    near = {edge + delta for edge in starts for delta in (-1, 0, 1, CHUNK_SIZE)}
    edges = sorted(edge for edge in near if 0 <= edge <= total)
    for start, stop in itertools.combinations(edges, 2):
        assert _read_range(composite, start, stop) == composite.plain[start:stop]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_range(data: st.DataObject) -> None:
    composite = _composite(data.draw(st.lists(st.integers(0, 40_000), min_size=1, max_size=4).filter(any)))
    start = data.draw(st.integers(0, len(composite.plain) - 1))
    stop = data.draw(st.integers(start + 1, len(composite.plain)))
    step = data.draw(st.integers(50, 40_000))
    assert _read_range(composite, start, stop, step=step) == composite.plain[start:stop]


def test_only_what_is_needed_is_fetched() -> None:
    composite = _composite((3 * CHUNK_SIZE, 10, 3 * CHUNK_SIZE))
    assert composite_range(composite.manifest, 0, 10) == ((0, PREFIX_SIZE + RECORD_SIZE),)
    second = sealed_length(3 * CHUNK_SIZE)
    third = second + sealed_length(10)
    assert composite_range(composite.manifest, 2 * CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 11) == (
        (0, PREFIX_SIZE),
        (PREFIX_SIZE + 2 * RECORD_SIZE, PREFIX_SIZE + 3 * RECORD_SIZE),
        (second, third + PREFIX_SIZE + RECORD_SIZE),
    )


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 0), (5, 4), (0, 19), (18, 18), (18, 19)])
def test_ranges_outside(start: int, stop: int) -> None:
    manifest = _composite((9, 9)).manifest
    with pytest.raises(MisuseError):
        composite_range(manifest, start, stop)
    with pytest.raises(MisuseError):
        CompositeRangeOpener(OWNER, always(), manifest, start=start, stop=stop)


def test_ranges_with_other_bytes() -> None:
    composite, other = _composite((9, 9)), _composite((9, 9))

    def opener() -> CompositeRangeOpener:
        return CompositeRangeOpener(OWNER, always(), composite.manifest, start=3, stop=15)

    ((begin, end),) = composite_range(composite.manifest, 3, 15)
    good = composite.stored[begin:end]
    assert run(opener(), [good]) == composite.plain[3:15]
    for size in (0, 50, len(good) - 1):
        refused(opener(), [good[:size]], TruncatedError)
    refused(opener(), [good + b"x"], IntegrityError)
    refused(opener(), [other.stored[begin:end]], IntegrityError)
    refused(opener(), [composite.messages[1] + composite.messages[0]], IntegrityError)
    for at in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[at] ^= 1
        refused(opener(), [bytes(damaged)], NOT_AS_WRITTEN)


# --- manifests and trailers ---


def test_a_manifest_both_ways() -> None:
    manifest = _composite((1, 2, 3)).manifest
    assert Manifest.parse(manifest.encode()) == manifest
    assert len(manifest.encode()) == 21 + 3 * 44


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: b"",
        lambda raw: raw[:20],
        lambda raw: b"\x00" + raw[1:],
        lambda raw: b"\x03" + raw[1:],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw[:17] + b"\xff\xff\xff\xff" + raw[21:],
        lambda raw: raw[:17] + bytes(4) + raw[21:],
        lambda raw: raw[:17] + bytes(4),
        lambda raw: raw[:21] + raw[65:109] + raw[21:65],
        lambda raw: raw[:21] + raw[21:65] + raw[21:65],
        lambda raw: raw[:25] + bytes(8) + raw[33:],
        lambda raw: raw[:25] + b"\xff" * 8 + raw[33:],
    ],
)
def test_manifests_that_are_none(edit: Callable[[bytes], bytes]) -> None:
    raw = _composite((1, 2)).manifest.encode()
    with pytest.raises(FormatError):
        Manifest.parse(edit(raw))


def test_manifests_that_cannot_be_made() -> None:
    _, part = _part(1, b"x")
    with pytest.raises(FormatError):
        Manifest(UPLOAD, ())
    with pytest.raises(FormatError):
        Manifest(UPLOAD[:15], (part,))
    with pytest.raises(FormatError):
        Manifest(UPLOAD, (replace(part, number=2), part))
    with pytest.raises(FormatError):
        Manifest(UPLOAD, tuple(replace(part, number=number) for number in range(MAX_PARTS + 1)))
    for changed in ({"number": -1}, {"number": 2**32}, {"stored_bytes": 103}, {"commitment": bytes(31)}):
        with pytest.raises(FormatError):
            replace(part, **changed)
    for upload, number in ((b"", 1), (UPLOAD + b"x", 1), (UPLOAD, -1), (UPLOAD, 2**32)):
        with pytest.raises(MisuseError):
            part_sealer(OBJECT_KEY, OWNER, KEY_ID, upload=upload, number=number)


def _listed(names: Sequence[bytes], plains: Sequence[bytes]) -> _Composite:
    """Named blocks, joined in the order of a list (version 2)."""
    parts = [_part(block_number(name), plain) for name, plain in zip(names, plains, strict=True)]
    manifest = Manifest(UPLOAD, tuple(part for _, part in parts), LISTED)
    ending = seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest)
    return _Composite(b"".join(plains), tuple(message for message, _ in parts), manifest, ending)


def test_blocks_in_the_order_of_a_list() -> None:
    names = [b"zulu", b"alpha", b"mike", b"alpha"]
    composite = _listed(names, [pattern(size) for size in (CHUNK_SIZE + 1, 0, 5, 70)])
    numbers = [part.number for part in composite.manifest.parts]
    assert numbers != sorted(numbers)
    assert numbers[1] == numbers[3], "a block may be listed twice"
    assert Manifest.parse(composite.manifest.encode()) == composite.manifest
    assert composite.manifest.encode()[0] == LISTED
    ending = open_ending(OWNER, always(OBJECT_KEY), composite.ending, stored_bytes=len(composite.stored))
    opener = CompositeOpener(OWNER, always(OBJECT_KEY), ending)
    assert run(opener, [composite.stored]) == composite.plain


def test_blocks_are_bound_to_their_names_and_their_order() -> None:
    composite = _listed([b"b", b"a"], [pattern(100), pattern(100)])
    ending = open_ending(OWNER, always(OBJECT_KEY), composite.ending, stored_bytes=len(composite.stored))
    swapped = b"".join(reversed(composite.messages)) + composite.ending
    with pytest.raises(IntegrityError):
        run(CompositeOpener(OWNER, always(OBJECT_KEY), ending), [swapped])
    renamed = replace(composite.manifest.parts[0], number=block_number(b"c"))
    forged = Manifest(UPLOAD, (renamed, composite.manifest.parts[1]), LISTED)
    with pytest.raises(IntegrityError):
        run(
            CompositeOpener(OWNER, always(OBJECT_KEY), Ending(forged, composite.ending)),
            [b"".join(composite.messages) + composite.ending],
        )
    with pytest.raises(FormatError):
        Manifest(UPLOAD, tuple(sorted(composite.manifest.parts, key=lambda part: -part.number)))
    with pytest.raises(FormatError):
        Manifest(UPLOAD, composite.manifest.parts, 3)


def test_the_largest_manifest() -> None:
    _, part = _part(0, b"")
    manifest = Manifest(UPLOAD, tuple(replace(part, number=number) for number in range(MAX_PARTS)))
    ending = seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest)
    stored_bytes = manifest.parts_bytes + len(ending)
    assert ending_range(ending[-16:], stored_bytes=stored_bytes) == (manifest.parts_bytes, stored_bytes)
    assert open_ending(OWNER, always(), ending, stored_bytes=stored_bytes).manifest == manifest


@pytest.mark.parametrize("size", [0, 1, 103, 104, 124, 125 + 16 + 44, 2**63, 2**64 - 1])
def test_trailers_that_name_no_manifest(size: int) -> None:
    """Before a byte of memory is spent on it."""
    with pytest.raises(FormatError):
        ending_range(size.to_bytes(8) + TRAILER_MAGIC, stored_bytes=10**6)


def test_trailers_that_are_none() -> None:
    stored = _composite((5,)).stored
    for trailer in (b"", stored[-15:], bytes(16), stored[-16:-1] + b"\r", stored[-17:]):
        with pytest.raises(FormatError):
            ending_range(trailer, stored_bytes=len(stored))
    for stored_bytes in (0, 16, len(stored) - 109):
        with pytest.raises(FormatError):
            ending_range(stored[-16:], stored_bytes=stored_bytes)


def test_lengths_that_do_not_add_up() -> None:
    composite = _composite((50, 50))
    for stored_bytes in (len(composite.stored) + 1, len(composite.stored) + 16400, len(composite.stored) - 1):
        with pytest.raises(IntegrityError):
            open_ending(OWNER, always(), composite.ending, stored_bytes=stored_bytes)
    with pytest.raises(TruncatedError):
        open_ending(OWNER, always(), composite.ending[1:], stored_bytes=len(composite.stored))


def test_a_manifest_sealed_as_something_else() -> None:
    composite = _composite((5,))
    message = seal(composite.manifest.encode())
    assert Header.parse(message).bind is Bind.NOTHING
    ending = message + len(message).to_bytes(8) + TRAILER_MAGIC
    with pytest.raises(IntegrityError):
        open_ending(OWNER, always(), ending, stored_bytes=composite.manifest.parts_bytes + len(ending))
