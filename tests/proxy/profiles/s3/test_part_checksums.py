"""Checksums of whole objects, by those of their parts."""

import base64
import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.multipart import Part
from envelope.objects import Header, sealed_length
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.checksums import new_checksum
from proxy.messages.message import Fields
from proxy.profiles.s3.multipart import ListedPart
from proxy.profiles.s3.part_checksums import (
    Kind,
    Said,
    compare,
    is_asked,
    keyed,
    opened_sums,
    said_of_whole,
    sealed_sums,
)
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart
from tests.fakes.clock import ManualClock

OWNER = NetworkService("tenant-a", "store")
REF = bytes(range(16))
PIECES = (b"first " * 1000, b"second", b"")
ALGORITHMS = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")


def data_key() -> DataKey:
    keys = KeyCache(ManualClock())
    secret = bytearray(os.urandom(32))
    active = KeyMaterial(owner=OWNER, key_id=KeyId.random(), state=KeyState.ACTIVE, version=1, secret=secret)
    keys.install(OWNER, [active], deadline_boot_s=1e9)
    return keys.sealing_key(OWNER)


def value_of(algorithm: str, data: bytes) -> bytes:
    checksum = new_checksum(algorithm)
    checksum.update(data)
    return checksum.digest()


def said(**values: str) -> tuple[Said, ...]:
    named = ((name.replace("_", "-").encode(), value.encode()) for name, value in values.items())
    return said_of_whole(Fields(named))


def text(value: bytes) -> str:
    return base64.b64encode(value).decode()


@dataclass
class Parts:
    """PIECES as the parts of an upload, with what is remembered of them."""

    key: DataKey = field(default_factory=data_key)
    algorithms: Sequence[str] = ALGORITHMS

    def kept(self) -> list[KeptPart]:
        parts = []
        for number, piece in enumerate(PIECES, 1):
            part = Part(number, sealed_length(len(piece)), bytes([number]) * 32)
            sums = {name: value_of(name, piece) for name in self.algorithms}
            sealed = sealed_sums(sums, self.key, REF, part) if sums else None
            parts.append(KeptPart(part=part, tag=f"tag{number}", digests=sealed))
        return parts

    async def compare(
        self,
        asked: Sequence[Said],
        first: dict[str, str] | None = None,
        *,
        kept: Sequence[KeptPart] | None = None,
    ) -> None:
        """*first*: what the list says of the first part."""
        listed = [
            ListedPart(number=number, tag=f"tag{number}", checksums=given)
            for number, given in enumerate((first or {}, {}, {}), 1)
        ]
        await compare(asked, listed, kept or self.kept(), find_key=lambda _header: self.key, upload_ref=REF)


WHOLE = b"".join(PIECES)


@pytest.mark.parametrize("algorithm", ["crc32", "crc32c", "crc64nvme"])
async def test_a_crc_of_the_whole_is_made_of_those_of_its_parts(algorithm: str) -> None:
    name, right = f"x_amz_checksum_{algorithm}", value_of(algorithm, WHOLE)
    for kind in ({"x_amz_checksum_type": "FULL_OBJECT"}, {}):
        await Parts().compare(said(**{name: text(right)}, **kind))
        wrong = bytes([right[0] ^ 1]) + right[1:]
        with pytest.raises(RefusedError, match="bad-digest"):
            await Parts().compare(said(**{name: text(wrong)}, **kind))


@pytest.mark.parametrize("algorithm", ["crc32", "crc32c", "sha1", "sha256"])
async def test_a_composite_checksum_is_one_of_the_parts_values(algorithm: str) -> None:
    name = f"x_amz_checksum_{algorithm}"
    right = text(value_of(algorithm, b"".join(value_of(algorithm, piece) for piece in PIECES)))
    for shown in (right, f"{right}-3"):
        for kind in ({"x_amz_checksum_type": "COMPOSITE"}, {}):
            await Parts().compare(said(**{name: shown}, **kind))
    with pytest.raises(RefusedError, match="bad-digest"):
        await Parts().compare(said(**{name: f"{right}-2"}))
    of_content = text(value_of(algorithm, WHOLE))
    with pytest.raises(RefusedError, match="bad-digest"):
        await Parts().compare(said(**{name: of_content, "x_amz_checksum_type": "COMPOSITE"}))


async def test_what_its_parts_did_not_show_is_not_believed() -> None:
    asked = said(x_amz_checksum_crc32=text(zlib.crc32(WHOLE).to_bytes(4)))
    await Parts().compare(asked)
    with pytest.raises(RefusedError, match="checksum-of-parts"):
        await Parts(algorithms=("crc32c",)).compare(asked)
    parts = Parts()
    kept = parts.kept()
    with pytest.raises(RefusedError, match="checksum-of-parts"):
        await parts.compare(asked, kept=[*kept[:2], KeptPart(part=kept[2].part, tag="tag3")])


async def test_a_listed_checksum_is_the_one_that_was_compared() -> None:
    right = text(value_of("crc32", PIECES[0]))
    await Parts().compare((), {"ChecksumCRC32": right, "ChecksumSHA512": "of which nothing is known"})
    await Parts(algorithms=()).compare((), {"ChecksumCRC32": right})
    for wrong in ("AAAAAA==", "", "?", right + "="):
        with pytest.raises(RefusedError, match="part-unknown"):
            await Parts().compare((), {"ChecksumCRC32": wrong})


@pytest.mark.parametrize(
    "fields",
    [
        {"x_amz_checksum_crc32": "AAAAAA=="},
        {"x_amz_checksum_crc32": "AAAAAA==-12"},
        {"x_amz_checksum_crc64nvme": "AAAAAAAAAAA=", "x_amz_checksum_type": "FULL_OBJECT"},
        {"x_amz_checksum_sha256": text(hashlib.sha256().digest()), "x_amz_checksum_type": "COMPOSITE"},
        {"x_amz_checksum_type": "FULL_OBJECT"},
        {"x_amz_checksum_algorithm": "CRC32", "x_amz_checksum_mode": "ENABLED"},
    ],
    ids=["crc32", "crc32-counted", "crc64nvme", "sha256", "type-alone", "none"],
)
def test_what_may_be_said_of_a_whole(fields: dict[str, str]) -> None:
    values = [name for name in fields if name not in ("x_amz_checksum_type", "x_amz_checksum_algorithm")]
    assert len(said(**fields)) == len([name for name in values if not name.endswith("mode")])
    assert is_asked(said(**fields), []) is bool(said(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"x_amz_checksum_crc32": "AAAAAAA="},
        {"x_amz_checksum_crc32": "AAAA"},
        {"x_amz_checksum_crc32": "AAAAAA==-"},
        {"x_amz_checksum_crc32": "AAAAAA==-x"},
        {"x_amz_checksum_crc32": "AAAAAA==-123456"},
        {"x_amz_checksum_crc32": ""},
        {"x_amz_checksum_crc16": "AAA="},
        {"x_amz_checksum_crc64nvme": "AAAAAAAAAAA=", "x_amz_checksum_type": "COMPOSITE"},
        {"x_amz_checksum_crc64nvme": "AAAAAAAAAAA=-2"},
        {"x_amz_checksum_sha256": text(hashlib.sha256().digest()), "x_amz_checksum_type": "FULL_OBJECT"},
        {"x_amz_checksum_crc32": "AAAAAA==-2", "x_amz_checksum_type": "FULL_OBJECT"},
        {"x_amz_checksum_type": "full"},
    ],
    ids=[
        "encoding", "length", "no-count", "count", "long-count", "empty", "unknown", "crc64-composite",
        "crc64-counted", "sha-full", "full-counted", "type",
    ],
)  # fmt: skip
def test_what_may_not(fields: dict[str, str]) -> None:
    with pytest.raises(RefusedError, match="invalid-digest"):
        said(**fields)


def test_of_one_algorithm_there_is_one() -> None:
    """A thousand would be a thousand times the work, for each of ten thousand parts, between two awaits."""
    value = text(value_of("crc64nvme", WHOLE))
    fields = Fields([(b"x-amz-checksum-crc64nvme", value.encode())] * 2)
    with pytest.raises(RefusedError, match="invalid-digest"):
        said_of_whole(fields)


def test_a_bare_crc_may_be_of_either_kind() -> None:
    (item,) = said(x_amz_checksum_crc32="AAAAAA==")
    assert item.kinds == {Kind.FULL_OBJECT, Kind.COMPOSITE}
    (other,) = said(x_amz_checksum_crc32="AAAAAA==", x_amz_checksum_type="FULL_OBJECT")
    assert item.spelt() != other.spelt()


def test_what_is_remembered_is_sealed_for_one_part() -> None:
    key, other = data_key(), data_key()
    part = Part(7, 1000, bytes(32))
    sums = {"crc32": b"\x01\x02\x03\x04"}
    sealed = sealed_sums(sums, key, REF, part)
    assert b"\x01\x02\x03\x04" not in sealed
    assert b"crc32" not in sealed
    assert opened_sums(sealed, lambda _header: key, REF, part) == sums
    for ref, wrong in (
        (bytes(16), part),
        (REF, Part(8, 1000, bytes(32))),
        (REF, Part(7, 1000, bytes(31) + b"\x01")),
    ):
        with pytest.raises(RefusedError, match="part-unknown"):
            opened_sums(sealed, lambda _header: key, ref, wrong)
    for data in (sealed[:-1], sealed[:50], b"", sealed[:-1] + bytes([sealed[-1] ^ 1])):
        with pytest.raises(RefusedError, match="part-unknown"):
            opened_sums(data, lambda _header: key, REF, part)
    with pytest.raises(RefusedError, match="part-unknown"):
        opened_sums(sealed, lambda _header: other, REF, part)

    def withdrawn(_header: Header) -> DataKey:
        raise KeyUnavailableError(Unavailable.WITHDRAWN, "withdrawn")

    with pytest.raises(KeyUnavailableError):
        opened_sums(sealed, withdrawn, REF, part)


def test_what_was_asked_is_known_again_by_its_key_alone() -> None:
    key, other = data_key(), data_key()
    asked = hashlib.sha256(b"1 tag1\nChecksumCRC32=AAAAAA==\n").digest()
    found = keyed(asked, key, REF)
    assert found == keyed(asked, key, REF)
    assert len(found) == len(asked)  # of the column
    assert (
        len({asked, found, keyed(asked, other, REF), keyed(asked, key, bytes(16)), keyed(found, key, REF)})
        == 5
    )
