"""Check values: catalogue of parametrised CRC algorithms (of `123456789`), RFC 3720 B.4, the S3 reference."""

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.messages.checksums import CHECKSUMS, COMBINED, CombinedCrc, Crc32C, Crc64Nvme, new_checksum

POLYNOMIALS = {"crc32": (0xEDB88320, 32), "crc32c": (0x82F63B78, 32), "crc64nvme": (0x9A6C9329AC4BC9B5, 64)}


def bit_by_bit(data: bytes, name: str) -> bytes:
    polynomial, width = POLYNOMIALS[name]
    ones = (1 << width) - 1
    value = ones
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
    return (value ^ ones).to_bytes(width // 8)


def checksum(name: str, data: bytes, *, step: int | None = None) -> bytes:
    found = new_checksum(name)
    for at in range(0, len(data), step or max(1, len(data))):
        found.update(data[at : at + (step or len(data))])
    return found.digest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("crc32", "cbf43926"),
        ("crc32c", "e3069283"),
        ("crc64nvme", "ae8b14860a799888"),
        ("md5", "25f9e794323b453885f5181f1b624d0b"),
        ("sha1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
    ],
)
def test_check_values(name: str, expected: str) -> None:
    assert checksum(name, b"123456789").hex() == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [(bytes(32), "aa36918a"), (b"\xff" * 32, "43aba862"), (bytes(range(32)), "4e79dd46"), (b"", "00000000")],
)
def test_castagnoli_of_rfc_3720(data: bytes, expected: str) -> None:
    assert bytes.fromhex(expected)[::-1] == checksum("crc32c", data) or not data
    assert checksum("crc32c", b"") == bytes(4)


def test_the_value_in_the_s3_references_trailer() -> None:
    assert base64.b64encode(checksum("crc32c", b"a" * 66560)) == b"sOO8/Q=="


@pytest.mark.parametrize("name", list(POLYNOMIALS))
@pytest.mark.parametrize("length", [0, 1, 31, 32, 511, 512, 513, 1023, 4096, 4099, 70_000])
def test_folding_is_the_definition(name: str, length: int) -> None:
    data = os.urandom(length)
    assert checksum(name, data) == bit_by_bit(data, name)


@pytest.mark.parametrize("step", [1, 7, 511, 512, 600, 16_384, 200_001])
@pytest.mark.parametrize("name", ["crc32c", "crc64nvme"])
def test_the_pieces_make_no_difference(name: str, step: int) -> None:
    data = os.urandom(300_000 if step > 100 else 3_000)
    assert checksum(name, data, step=step) == checksum(name, data)
    assert checksum(name, data) == checksum(name, data, step=512)


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_any_cut_gives_the_same(data: bytes, cut: int) -> None:
    for make in (Crc32C, Crc64Nvme):
        whole, parts = make(), make()
        whole.update(data)
        parts.update(data[:cut])
        parts.update(memoryview(data)[cut:])
        assert whole.digest() == parts.digest()


def test_sizes_are_what_the_table_says() -> None:
    assert {name: len(checksum(name, b"x")) for name in CHECKSUMS} == {
        name: size for name, (_make, size) in CHECKSUMS.items()
    }


@given(data=st.binary(max_size=3000), cut=st.integers(min_value=0, max_value=3000))
def test_a_crc_goes_on_behind_what_is_known(data: bytes, cut: int) -> None:
    before = Crc32C()
    before.update(data[:cut])
    behind = Crc32C(before.digest())
    behind.update(data[cut:])
    assert behind.digest() == checksum("crc32c", data)


@pytest.mark.parametrize("name", list(COMBINED))
@given(pieces=st.lists(st.binary(max_size=300), max_size=6))
def test_the_crc_of_pieces_is_made_of_theirs(name: str, pieces: list[bytes]) -> None:
    combined = CombinedCrc(name)
    for piece in pieces:
        combined.add(bit_by_bit(piece, name), len(piece))
    assert combined.digest() == bit_by_bit(b"".join(pieces), name)


@pytest.mark.parametrize("name", list(COMBINED))
def test_large_pieces_are_combined(name: str) -> None:
    """Lengths with many bits; two orders of one content's pieces differ."""
    first, second = os.urandom(1_048_575), os.urandom(700_001)
    for pieces in ((first, second), (second, first)):
        combined = CombinedCrc(name)
        for piece in pieces:
            combined.add(checksum(name, piece), len(piece))
        assert combined.digest() == checksum(name, b"".join(pieces))


def test_what_is_no_crc_of_a_piece_is_not_combined() -> None:
    combined = CombinedCrc("crc32")
    for value, length in ((bytes(8), 1), (b"", 1), (bytes(4), -1)):
        with pytest.raises(ValueError, match="no checksum"):
            combined.add(value, length)
    with pytest.raises(KeyError):
        CombinedCrc("sha256")
