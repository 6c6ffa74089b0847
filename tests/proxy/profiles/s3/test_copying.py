"""Copies: where they come from, their conditions, their pieces. With real servers: test_s3_clients.py."""

import itertools

import pytest

from proxy.messages.message import ByteRange, Fields
from proxy.profiles.s3.copying import PIECE_BYTES, CopySource, check_conditions, copy_range, pieces_of
from proxy.refusals import RefusedError

GIB = 1 << 30
HEX = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/bucket/key", ("bucket", "key", None)),
        ("bucket/a/b%20c", ("bucket", "a/b%20c", None)),
        ("b.x/k?versionId=3%2F4", ("b.x", "k", "3%2F4")),
    ],
)
def test_sources(text: str, source: tuple[str, str, str | None]) -> None:
    found = CopySource.of(text)
    assert (found.bucket, found.key, found.version) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "bucket",
        "/bucket/",
        "/../key",
        "%2e%2e/key",
        "arn:aws:s3:us-east-1:1:accesspoint/x/object/k",
        "b/k?x=1",
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(RefusedError, match="copy-source"):
        CopySource.of(text)


def test_ranges_of_sources() -> None:
    assert copy_range(None) is None
    assert copy_range("bytes=0-0") == ByteRange(first=0, last=0)
    for text in ("bytes=5-4", "bytes=-5", "bytes=5-", "5-6", "bytes=0-1,3-4", "bytes=0-9999999999999999999"):
        with pytest.raises(RefusedError, match="copy-source"):
            copy_range(text)


@pytest.mark.parametrize(
    "stored_bytes", [1, PIECE_BYTES, PIECE_BYTES + 1, 5 * GIB, 5 * 1024 * GIB, 5 * 1024 * GIB - 1]
)
def test_pieces_cover_all_and_are_as_large_as_parts_must_be(stored_bytes: int) -> None:
    pieces = pieces_of(stored_bytes)
    assert (pieces[0][0], pieces[-1][1]) == (0, stored_bytes)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(pieces))
    sizes = [end - begin for begin, end in pieces]
    assert len(pieces) <= 10_000
    assert max(sizes) <= 5 * GIB
    assert len(pieces) == 1 or min(sizes) >= PIECE_BYTES


EARLY, LATE = "Mon, 05 Jan 2026 10:00:00 GMT", "Tue, 06 Jan 2026 10:00:00 GMT"
MATCH, NONE_MATCH = "x-amz-copy-source-if-match", "x-amz-copy-source-if-none-match"
MODIFIED, UNMODIFIED = "x-amz-copy-source-if-modified-since", "x-amz-copy-source-if-unmodified-since"


@pytest.mark.parametrize(
    ("asked", "holds"),
    [
        ({}, True),
        ({MATCH: f'"{HEX}-1"'}, True),
        ({MATCH: HEX}, True),
        ({MATCH: f'"{HEX}-2"'}, False),
        ({MATCH: f'"{HEX}-1"', UNMODIFIED: EARLY}, True),
        ({UNMODIFIED: EARLY}, False),
        ({UNMODIFIED: LATE}, True),
        ({NONE_MATCH: f'"{HEX}-1"'}, False),
        ({NONE_MATCH: "*"}, False),
        ({NONE_MATCH: '"other"'}, True),
        ({NONE_MATCH: '"other"', MODIFIED: LATE}, True),
        ({MODIFIED: EARLY}, True),
        ({MODIFIED: LATE}, False),
        ({MODIFIED: "nonsense", UNMODIFIED: "nonsense"}, True),
    ],
)
def test_conditions_are_judged_as_s3_documents_them(asked: dict[str, str], holds: bool) -> None:
    its = Fields([(b"etag", f'"{HEX}"'.encode()), (b"last-modified", b"Mon, 05 Jan 2026 12:00:00 GMT")])
    fields = Fields((name.encode(), value.encode()) for name, value in asked.items())
    if holds:
        check_conditions(fields, its)
        return
    with pytest.raises(RefusedError, match="precondition-failed"):
        check_conditions(fields, its)
