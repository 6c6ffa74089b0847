"""Which range of the plaintext is one part. With a real server: test_s3_clients.py."""

import os

import pytest

from envelope.multipart import Manifest, Part
from envelope.objects import sealed_length
from proxy.plans.conversing import Inspected, StoredKind
from proxy.profiles.s3.part_reading import part_of, without_number
from proxy.refusals import RefusedError


def composite(*sizes: int) -> Inspected:
    parts = [
        Part(number, sealed_length(size), os.urandom(32))
        for number, size in zip((2, 5, 9), sizes, strict=True)
    ]
    manifest = Manifest(bytes(16), tuple(parts))
    return Inspected(
        kind=StoredKind.COMPOSITE,
        stored_bytes=manifest.parts_bytes + 1000,
        plain_bytes=manifest.plain_bytes,
        etag=None,
        manifest=manifest,
    )


def simple(plain_bytes: int) -> Inspected:
    return Inspected(
        kind=StoredKind.SIMPLE,
        stored_bytes=sealed_length(plain_bytes),
        plain_bytes=plain_bytes,
        etag=None,
        manifest=None,
    )


def test_parts_are_counted_in_their_order() -> None:
    found = composite(100, 20_000, 7)
    spans = [part_of(found, number) for number in (1, 2, 3)]
    assert [(part.first, part.last) for part in spans] == [(0, 99), (100, 20_099), (20_100, 20_106)]
    assert {(part.total_bytes, part.count) for part in spans} == {(20_107, 3)}
    assert spans[0].fields == (("x-amz-mp-parts-count", "3"),)


def test_an_object_put_at_once_is_one_part() -> None:
    part = part_of(simple(5000), 1)
    assert (part.first, part.last, part.total_bytes, part.fields) == (0, 4999, 5000, ())


@pytest.mark.parametrize(
    ("found", "number"), [(simple(5), 2), (composite(1, 2, 3), 4), (composite(1, 0, 3), 2)]
)
def test_parts_that_are_not_there(found: Inspected, number: int) -> None:
    with pytest.raises(RefusedError, match="part-not-there"):
        part_of(found, number)


@pytest.mark.parametrize(
    ("target", "without"),
    [
        ("/b/k?partNumber=1", "/b/k"),
        ("/b/k?versionId=a%2Fb&partNumber=1&x-id=GetObject", "/b/k?versionId=a%2Fb&x-id=GetObject"),
        ("/b/partNumber=1", "/b/partNumber=1"),
    ],
)
def test_nothing_else_of_the_target_changes(target: str, without: str) -> None:
    assert without_number(target) == without
