"""Descriptions without keys: right for what is whole, and never an exception for what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope import fields, multipart
from envelope.inspect import Description, Kind, describe
from envelope.keys import ANONYMOUS
from envelope.objects import Bind
from tests.envelope.samples import (
    DETERMINISTIC_KEY,
    FIELD_KEY,
    KEY_ID,
    OBJECT_KEY,
    OWNER,
    PATH,
    pattern,
    run,
    seal,
)


def _composite() -> bytes:
    stored, parts = b"", []
    for number in (1, 2):
        sealer = multipart.part_sealer(OBJECT_KEY, OWNER, KEY_ID, upload=bytes(16), number=number)
        message = run(sealer, [pattern(100)])
        parts.append(multipart.Part(number, len(message), sealer.commitment))
        stored += message
    manifest = multipart.Manifest(bytes(16), tuple(parts))
    return stored + multipart.seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest)


@pytest.mark.parametrize("size", [0, 5, 16384, 40000])
def test_object(size: int) -> None:
    sealed = seal(pattern(size))
    expected = Description(
        kind=Kind.OBJECT,
        stored_bytes=len(sealed),
        version=1,
        suite="Cobblestone-256",
        key_id=KEY_ID,
        bind=Bind.NOTHING,
        plain_bytes=size,
    )
    assert describe(sealed) == expected
    assert describe(sealed[:32], stored_bytes=len(sealed)) == expected


def test_anonymous_and_bound_object() -> None:
    described = describe(seal(b"x", key_id=ANONYMOUS, bind=Bind.NAME, name=b"/a"))
    assert described.key_id == ANONYMOUS
    assert described.bind is Bind.NAME


def test_composite() -> None:
    stored = _composite()
    described = describe(stored)
    assert (described.kind, described.parts, described.plain_bytes) == (Kind.COMPOSITE, 2, None)
    assert described.problems == ()
    assert describe(stored[:32], stored_bytes=len(stored), tail=stored[-16:]) == described
    for cut in (stored[:-1], stored[:-16], stored[:200]):
        assert "end is missing" in describe(cut).problems[0]


def test_fields() -> None:
    random = fields.seal_field(FIELD_KEY, OWNER, KEY_ID, path=PATH, value=pattern(50))
    deterministic = fields.seal_deterministic(DETERMINISTIC_KEY, OWNER, KEY_ID, path=PATH, value=pattern(50))
    for token, suite in ((random, "Cobblestone-256"), (deterministic, "AES-256-SIV")):
        described = describe(token.encode() + b"\n")
        assert (described.kind, described.suite, described.key_id) == (Kind.FIELD, suite, KEY_ID)
        assert (described.plain_bytes, described.problems) == (50, ())
        # One character behind the last group of four is no byte. Other cuts may be another field's encoding.
        behind = (len(token.rpartition(".")[2]) - 1) % 4
        assert describe(token[:-behind].encode()).problems
    assert describe(b"sg1.nonsense").problems
    for short in ("sg1", "sg1d"):
        described = describe(f"{short}.oKGio6SlpqeoqaqrrK2urw.AAAA".encode())
        assert (described.plain_bytes, described.problems) == (None, ("no value is sealed in 3 bytes",))


def test_plain() -> None:
    described = describe(b"\x00\xffplain")
    assert described == Description(kind=Kind.PLAIN, stored_bytes=7, plain_bytes=7)
    assert describe(b"").problems == ()
    assert describe(seal(b"")[:7]).problems == ("begins like a sealed object, but ends too soon",)


def test_damage_is_named() -> None:
    sealed = seal(b"hello")
    assert describe(sealed[:20]).problems[0] == "the header is cut off after 20 bytes"
    assert describe(sealed[:100]).problems == ("no sealed object has 100 bytes",)
    later = describe(sealed[:8] + b"\x02\x03" + sealed[10:])
    assert (later.version, later.suite) == (2, "FLOE (reserved)")
    assert later.problems == ("object version 2, this reader knows 1",)
    assert describe(sealed[:9] + b"\x63" + sealed[10:]).suite == "unknown (99)"
    assert describe(sealed[:28] + b"\x09" + sealed[29:]).bind is None


@given(st.binary(max_size=200), st.integers(0, 200), st.booleans())
def test_never_raises(noise: bytes, keep: int, composite: bool) -> None:
    good = _composite() if composite else seal(b"hello")
    describe(noise)
    describe(good[:keep] + noise)
    describe(b"sg1." + noise)
