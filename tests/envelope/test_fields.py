"""Sealed field values. Fixed tokens: test_vectors.py."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envelope import derive
from envelope.base64url import b64u_decode, b64u_encode
from envelope.errors import (
    FormatError,
    IntegrityError,
    KeyUnavailableError,
    MisuseError,
    TruncatedError,
    Unavailable,
)
from envelope.fields import (
    FieldHeader,
    FieldKind,
    has_prefix,
    open_field,
    seal_deterministic,
    seal_field,
    sealed_field_length,
)
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from tests.envelope.samples import (
    DETERMINISTIC_KEY,
    FIELD_KEY,
    KEY_ID,
    MATERIAL,
    OTHER_MATERIAL,
    OTHER_SERVICE,
    OTHER_TENANT,
    OWNER,
    PATH,
    pattern,
)
from tests.vectors import reference

type FieldSealer = Callable[[bytes], str]

NOT_AS_WRITTEN = (FormatError, IntegrityError)


def _find(header: FieldHeader, *, material: bytes = MATERIAL, owner: NetworkService = OWNER) -> bytes:
    derivation = derive.field_key if header.kind is FieldKind.RANDOM else derive.deterministic_key
    return derivation(material, owner, header.key_id)


def _random(value: bytes, path: str = PATH) -> str:
    return seal_field(FIELD_KEY, OWNER, KEY_ID, path=path, value=value)


def _deterministic(value: bytes, path: str = PATH) -> str:
    return seal_deterministic(DETERMINISTIC_KEY, OWNER, KEY_ID, path=path, value=value)


def _open(token: str, *, owner: NetworkService = OWNER, path: str = PATH) -> bytes:
    return open_field(token, owner, _find, path=path)


SEALERS = pytest.mark.parametrize("sealer", [_random, _deterministic])


@pytest.mark.parametrize("size", [0, 1, 50, 16383, 16384, 16385, 40_000])
@SEALERS
def test_round_trip_and_length(sealer: FieldSealer, size: int) -> None:
    value = pattern(size)
    token = sealer(value)
    header = FieldHeader.parse(token)
    assert header.key_id == KEY_ID
    assert _open(token) == value
    assert len(token) == sealed_field_length(size, header.kind)
    assert reference.open_field(MATERIAL, ("tenant-a", "drive"), PATH, token) == value


def test_lengths_of_the_format() -> None:
    assert [sealed_field_length(size) for size in (0, 50)] == [123, 190]
    assert [sealed_field_length(size, FieldKind.DETERMINISTIC) for size in (0, 50)] == [50, 116]
    with pytest.raises(MisuseError):
        sealed_field_length(-1)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=30))
def test_any_text_at_any_path(text: str, path: str) -> None:
    for sealer in (_random, _deterministic):
        assert _open(sealer(text.encode(), path), path=path).decode() == text


def test_random_tokens_hide_equality_and_deterministic_ones_show_it() -> None:
    assert _random(b"x") != _random(b"x")
    assert _deterministic(b"x") == _deterministic(b"x")
    assert _deterministic(b"x") != _deterministic(b"y")


def test_equality_shows_within_one_path_and_owner_only() -> None:
    """Threat 21."""
    tokens = {_deterministic(b"x"), _deterministic(b"x", "$.other")}
    for owner in (OTHER_TENANT, OTHER_SERVICE):
        key = derive.deterministic_key(MATERIAL, owner, KEY_ID)
        tokens.add(seal_deterministic(key, owner, KEY_ID, path=PATH, value=b"x"))
        # Even under one and the same key.
        tokens.add(seal_deterministic(DETERMINISTIC_KEY, owner, KEY_ID, path=PATH, value=b"x"))
    assert len({token.split(".")[2] for token in tokens}) == 6


@SEALERS
def test_every_single_bit(sealer: FieldSealer) -> None:
    kind, key_id, payload = sealer(b"hello").split(".")
    raw = b64u_decode(payload)
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            _open(f"{kind}.{key_id}.{b64u_encode(bytes(damaged))}")


@SEALERS
def test_every_truncation_and_an_extension(sealer: FieldSealer) -> None:
    token = sealer(b"hello")
    for size in range(len(token)):
        with pytest.raises(NOT_AS_WRITTEN):
            _open(token[:size])
    for tail in ("A", "AA", "AAAA", ".", "=", "\n", ".AA"):
        with pytest.raises(NOT_AS_WRITTEN):
            _open(token + tail)


@SEALERS
def test_another_scope(sealer: FieldSealer) -> None:
    token = sealer(b"hello")
    with pytest.raises(IntegrityError):
        _open(token, path="$.customer.nam")
    for owner in (OTHER_TENANT, OTHER_SERVICE, NetworkService("tenant", "adrive")):
        with pytest.raises(IntegrityError):
            _open(token, owner=owner)
        with pytest.raises(IntegrityError):
            open_field(token, owner, partial(_find, owner=owner), path=PATH)
    with pytest.raises(IntegrityError):
        open_field(token, OWNER, lambda header: _find(header, material=OTHER_MATERIAL), path=PATH)


@SEALERS
def test_another_key_id_or_kind_on_the_same_payload(sealer: FieldSealer) -> None:
    kind, key_id, payload = sealer(b"hello" * 20).split(".")
    other = "sg1d" if kind == "sg1" else "sg1"
    with pytest.raises(IntegrityError):
        _open(f"{other}.{key_id}.{payload}")
    with pytest.raises(IntegrityError):
        _open(f"{kind}.{b64u_encode(KeyId.random().raw)}.{payload}")
    if kind == "sg1":
        # The key id is in the context as well, not only in the key.
        relabelled = f"{kind}.{b64u_encode(KeyId.random().raw)}.{payload}"
        with pytest.raises(IntegrityError):
            open_field(relabelled, OWNER, lambda _: FIELD_KEY, path=PATH)


def test_the_key_is_asked_for_once_and_no_other_is_tried() -> None:
    asked: list[FieldHeader] = []

    def find(header: FieldHeader) -> bytes:
        asked.append(header)
        raise KeyUnavailableError(Unavailable.UNKNOWN, "no such key")

    for token in (_random(b"x"), _deterministic(b"x")):
        with pytest.raises(KeyUnavailableError):
            open_field(token, OWNER, find, path=PATH)
    assert asked == [FieldHeader(FieldKind.RANDOM, KEY_ID), FieldHeader(FieldKind.DETERMINISTIC, KEY_ID)]


def test_there_are_no_anonymous_tokens() -> None:
    for sealer in (seal_field, seal_deterministic):
        with pytest.raises(MisuseError):
            sealer(FIELD_KEY, OWNER, ANONYMOUS, path=PATH, value=b"x")
    kind, _, payload = _random(b"x").split(".")
    with pytest.raises(FormatError):
        _open(f"{kind}.{b64u_encode(bytes(16))}.{payload}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sg1",
        "sg1.",
        "sg1..",
        "sg2.oKGio6SlpqeoqaqrrK2urw.AAAA",
        "SG1.oKGio6SlpqeoqaqrrK2urw.AAAA",
        "sg1.oKGio6SlpqeoqaqrrK2ur.AAAA",
        "sg1.oKGio6SlpqeoqaqrrK2urw==.AAAA",
        "sg1.oKGio6SlpqeoqaqrrK2urx.AAAA",
        " sg1.oKGio6SlpqeoqaqrrK2urw.AAAA",
        "sg1.oKGio6SlpqeoqaqrrK2urw.AAAA.AAAA",
        "plain text",
        "sg1.é.AAAA",
    ],
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(FormatError):
        FieldHeader.parse(text)
    with pytest.raises(FormatError):
        _open(text)


def test_short_payloads() -> None:
    for kind in FieldKind:
        for size in (0, 15):
            with pytest.raises(TruncatedError):
                _open(f"{kind}.{b64u_encode(KEY_ID.raw)}.{b64u_encode(bytes(size))}")


def test_prefixes() -> None:
    assert has_prefix(_random(b""))
    assert has_prefix(_deterministic(b""))
    for text in ("", "sg1", "sg12.x", "sg1D.x", "xsg1.", "SG1."):
        assert not has_prefix(text)


@pytest.mark.parametrize("key", [bytes(64), bytes(32), b"k" * 31, b""])
def test_keys_that_are_none(key: bytes) -> None:
    for sealer in (seal_field, seal_deterministic):
        with pytest.raises(MisuseError):
            sealer(key, OWNER, KEY_ID, path=PATH, value=b"x")
    for token in (_random(b"x"), _deterministic(b"x")):
        with pytest.raises(MisuseError):
            open_field(token, OWNER, lambda _: key, path=PATH)


def test_a_path_is_needed() -> None:
    with pytest.raises(MisuseError):
        _random(b"x", "")
    with pytest.raises(MisuseError):
        _open(_random(b"x"), path="")
