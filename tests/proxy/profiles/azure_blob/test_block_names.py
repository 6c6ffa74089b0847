"""Names of blocks at the service, and the size that stands in place of an MD5."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import refusals
from proxy.profiles.azure_blob.block_names import (
    MAX_CLIENT_SIZE,
    NONCE_SIZE,
    BlockName,
    NameKind,
    Stem,
    manifest_name,
    marked_size,
    size_mark,
)
from proxy.refusals import RefusedError

NONCE = b"n" * NONCE_SIZE
NAMES = st.binary(min_size=1, max_size=MAX_CLIENT_SIZE)


@given(NAMES, st.binary(min_size=NONCE_SIZE, max_size=NONCE_SIZE))
def test_a_stored_name_leads_back(raw: bytes, nonce: bytes) -> None:
    name = BlockName.of(base64.b64encode(raw).decode())
    stored = name.stored(nonce)
    assert len(base64.b64decode(stored)) <= MAX_CLIENT_SIZE
    stem = Stem.of(stored)
    assert stem == name.stem
    assert stem is not None
    assert stem.shown == (base64.b64encode(raw).decode() if len(raw) <= 56 else None)


@given(NAMES, NAMES)
def test_names_differ_where_the_clients_do(one: bytes, two: bytes) -> None:
    assert (BlockName(one).stem == BlockName(two).stem) == (one == two)
    if len(one) == len(two):
        assert len(BlockName(one).stored(NONCE)) == len(BlockName(two).stored(NONCE))


def test_a_name_has_a_nonce() -> None:
    assert BlockName(b"a").stored(NONCE) != BlockName(b"a").stored(b"m" * NONCE_SIZE)


@pytest.mark.parametrize("text", ["", "=", "QQ", "QQ=", "Q Q=", "\u00e4", "A" * 100])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        BlockName.of(text)
    assert caught.value.refusal == refusals.BLOCK_ID


@pytest.mark.parametrize("size", [1, 8, 48, 56, 57, 64])
def test_the_manifests_name_is_as_long_and_its_own(size: int) -> None:
    stored = BlockName(b"x" * size).stored(NONCE)
    name = manifest_name(stored, NONCE)
    assert len(base64.b64decode(name)) == len(base64.b64decode(stored))
    stem = Stem.of(name)
    assert stem is not None
    assert (stem.kind, stem.shown) == (NameKind.MANIFEST, None)


@pytest.mark.parametrize("stored", ["", "QUFB", "!", base64.b64encode(bytes(20) + b"\x09").decode()])
def test_names_of_others(stored: str) -> None:
    assert Stem.of(stored) is None


@given(st.integers(min_value=0, max_value=(1 << 53) - 1))
def test_a_size_in_place_of_an_md5(size: int) -> None:
    assert len(base64.b64decode(size_mark(size))) == 16
    assert marked_size(size_mark(size)) == size


@pytest.mark.parametrize(
    "md5", [None, "", "x", base64.b64encode(bytes(16)).decode(), size_mark(5)[:-4], size_mark(1 << 53)]
)
def test_other_md5s(md5: str | None) -> None:
    assert marked_size(md5) is None
