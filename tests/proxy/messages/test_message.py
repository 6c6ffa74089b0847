"""Reading heads: framing, ranges, digests, out of fields that may be hostile."""

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.objects import PLAIN_LIMIT
from proxy import refusals
from proxy.messages.message import (
    BodyFrame,
    ByteRange,
    Fields,
    Framing,
    RequestHead,
    body_frame,
    byte_range,
    content_range,
    declared_length,
    digest_fields,
    request_digests,
    strong_etag,
)
from proxy.refusals import RefusedError


def fields(*pairs: tuple[str, str]) -> Fields:
    return Fields((name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in pairs)


def head(*pairs: tuple[str, str], http2: bool = False) -> RequestHead:
    return RequestHead(method="PUT", target="/x", fields=fields(*pairs), http2=http2)


def test_fields_keep_what_came_twice_and_forget_case() -> None:
    got = fields(("Via", "a"), ("VIA", " b "), ("Accept", "x, Y ,, z"))
    assert got.all("via") == ["a", "b"]
    assert got.first("via") == "a"
    assert got.sole("via") is None
    assert got.sole("accept") == "x, Y ,, z"
    assert got.tokens("accept") == ["x", "y", "z"]
    assert "Accept" not in got
    assert list(got) == ["via", "accept"]


def test_fields_show_no_values() -> None:
    assert "hunter2" not in repr(fields(("Authorization", "hunter2")))


@pytest.mark.parametrize(
    ("pairs", "http2", "expected"),
    [
        ((), False, BodyFrame(framing=Framing.NONE)),
        ((), True, BodyFrame(framing=Framing.STREAM)),
        ((("Content-Length", "0"),), False, BodyFrame(framing=Framing.LENGTH, length_bytes=0)),
        ((("Content-Length", "12"),), True, BodyFrame(framing=Framing.LENGTH, length_bytes=12)),
        ((("Transfer-Encoding", "Chunked"),), False, BodyFrame(framing=Framing.CHUNKED)),
    ],
)
def test_framing(pairs: tuple[tuple[str, str], ...], http2: bool, expected: BodyFrame) -> None:
    assert body_frame(head(*pairs, http2=http2)) == expected


@pytest.mark.parametrize(
    "pairs",
    [
        [("Content-Length", "1"), ("Content-Length", "1")],
        [("Content-Length", "1, 1")],
        [("Content-Length", "1"), ("Transfer-Encoding", "chunked")],
        [("Content-Length", "")],
        [("Content-Length", "-1")],
        [("Content-Length", "+1")],
        [("Content-Length", "0x10")],
        [("Content-Length", "1_0")],
        [("Content-Length", "١")],
        [("Content-Length", "9" * 5000)],
        [("Content-Length", str(PLAIN_LIMIT))],
        [("Transfer-Encoding", "gzip, chunked")],
        [("Transfer-Encoding", "chunked, chunked")],
        [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "")],
        [("Transfer-Encoding", "identity")],
        [("Transfer-Encoding", "\x0bchunked")],
    ],
)
def test_ambiguous_framing_is_refused(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(RefusedError) as caught:
        body_frame(head(*pairs))
    assert caught.value.refusal is refusals.BAD_MESSAGE


def test_http2_has_no_transfer_coding() -> None:
    with pytest.raises(RefusedError):
        body_frame(head(("Transfer-Encoding", "chunked"), http2=True))


names = st.sampled_from(["Content-Length", "content-length", "Transfer-Encoding", "Host", "TE"])
values = st.one_of(
    st.integers(-5, 1 << 70).map(str), st.text(max_size=12), st.sampled_from(["chunked", "gzip", "chunked,"])
)


@given(st.lists(st.tuples(names, values), max_size=5), st.booleans())
def test_framing_is_never_guessed(pairs: list[tuple[str, str]], http2: bool) -> None:
    frame: BodyFrame | None = None
    with contextlib.suppress(RefusedError):
        frame = body_frame(head(*pairs, http2=http2))
    if frame is None:
        return
    lengths = [value for name, value in pairs if name.lower() == "content-length"]
    codings = [value for name, value in pairs if name == "Transfer-Encoding"]
    assert len(lengths) + len(codings) <= 1
    if frame.framing is Framing.LENGTH:
        assert frame.length_bytes == int(lengths[0]) < PLAIN_LIMIT
    assert (frame.framing is Framing.CHUNKED) == bool(codings)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-9", ByteRange(first=0, last=9)),
        ("bytes=5-", ByteRange(first=5, last=None)),
        ("bytes=-7", ByteRange(first=None, last=7)),
        ("BYTES = 1-2", ByteRange(first=1, last=2)),
        ("bytes=-0", ByteRange(first=None, last=0)),
        ("bytes=9-5", None),
        ("bytes=-", None),
        ("bytes=1-2,4-5", None),
        ("bytes=1-2,", None),
        ("bytes=a-b", None),
        ("bytes=--5", None),
        ("bytes=1--5", None),
        ("lines=1-2", None),
        ("bytes 1-2", None),
        ("", None),
    ],
)
def test_one_range_or_none(value: str, expected: ByteRange | None) -> None:
    assert byte_range(fields(("Range", value))) == expected


def test_two_range_fields_are_none() -> None:
    assert byte_range(fields(("Range", "bytes=0-1"), ("Range", "bytes=0-1"))) is None


def test_huge_positions_lie_beyond_every_object() -> None:
    for digits in ("9" * 40, "9" * 5000):
        got = byte_range(fields(("Range", f"bytes={digits}-")))
        assert got is not None
        assert got.resolve(PLAIN_LIMIT - 1) is None


@given(
    st.integers(0, 100), st.one_of(st.none(), st.integers(0, 120)), st.one_of(st.none(), st.integers(0, 120))
)
def test_a_range_resolves_to_what_slicing_gives(total: int, first: int | None, last: int | None) -> None:
    if (first is None and last is None) or (first is not None and last is not None and first > last):
        return
    content = bytes(range(total))
    if first is None:
        expected = content[total - min(last or 0, total) :]
    else:
        expected = content[first:] if last is None else content[first : last + 1]
    span = ByteRange(first=first, last=last).resolve(total)
    assert (content[slice(*span)] if span else b"") == expected
    assert (span is None) == (expected == b"")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes 0-9/100", (0, 10, 100)),
        ("bytes 99-99/100", (99, 100, 100)),
        ("bytes 0-100/100", None),
        ("bytes 5-4/100", None),
        ("bytes 0-9/*", None),
        ("bytes */100", None),
        ("items 0-9/100", None),
        ("bytes 0-9/100, bytes 0-9/100", None),
    ],
)
def test_content_ranges(value: str, expected: tuple[int, int, int] | None) -> None:
    assert content_range(fields(("Content-Range", value))) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"a"', '"a"'), ('W/"a"', None), ("a", None), ('"', None), ('""', '""')],
)
def test_strong_etags(value: str, expected: str | None) -> None:
    assert strong_etag(fields(("ETag", value))) == expected


def digest(algorithm: str, body: bytes = b"body") -> bytes:
    return hashlib.new(algorithm, body, usedforsecurity=False).digest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("Content-MD5", b64(digest("md5")), [("md5", digest("md5"))]),
        ("Digest", f"md5={b64(digest('md5'))}", [("md5", digest("md5"))]),
        (
            "Digest",
            f"SHA-256={b64(digest('sha256'))},sha-512={b64(digest('sha512'))}",
            [("sha256", digest("sha256")), ("sha512", digest("sha512"))],
        ),
        ("Digest", "crc32c=AAAAAA==, id-sha-256=xyz", []),
        ("Content-Digest", f"sha-256=:{b64(digest('sha256'))}:", [("sha256", digest("sha256"))]),
        ("Repr-Digest", f"adler=:AAAA:, sha-512=:{b64(digest('sha512'))}:", [("sha512", digest("sha512"))]),
        ("OC-Checksum", "SHA1:" + digest("sha1").hex(), [("sha1", digest("sha1"))]),
        ("OC-Checksum", "ADLER32:00000001", []),
        ("X-Checksum-Sha1", digest("sha1").hex(), [("sha1", digest("sha1"))]),
        ("x-amz-content-sha256", "UNSIGNED-PAYLOAD", []),
    ],
)
def test_request_digests(name: str, value: str, expected: list[tuple[str, bytes]]) -> None:
    assert [(item.algorithm, item.value) for item in request_digests(fields((name, value)))] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Content-MD5", "not base64!"),
        ("Content-MD5", b64(b"short")),
        ("Content-MD5", ""),
        ("Digest", "sha-256=AAAA"),
        ("Content-Digest", "sha-256=AAAA"),
        ("Content-Digest", "sha-256=:AAAA:"),
        ("OC-Checksum", "SHA1:zz"),
    ],
)
def test_a_malformed_digest_is_a_bad_digest(name: str, value: str) -> None:
    with pytest.raises(RefusedError) as caught:
        request_digests(fields((name, value)))
    assert caught.value.refusal is refusals.BAD_DIGEST


@given(st.sampled_from(["Content-MD5", "Digest", "Content-Digest", "Repr-Digest", "OC-Checksum"]), st.text())
def test_no_digest_field_makes_a_crash(name: str, value: str) -> None:
    with contextlib.suppress(RefusedError):
        request_digests(fields((name, value)))


def test_fields_that_hold_a_digest() -> None:
    got = digest_fields(fields(("X-Amz-Checksum-Crc32", "x"), ("ETag", "x"), ("Content-MD5", "x")))
    assert got == {"x-amz-checksum-crc32", "content-md5"}


@pytest.mark.parametrize(
    "name",
    [
        "Content-MD5", "Digest", "Content-Digest", "Repr-Digest", "OC-Checksum", "Upload-Checksum",
        "X-Goog-Hash", "X-Bz-Content-Sha1", "X-Ms-Blob-Content-Md5", "X-Ms-Content-Crc64",
        "X-Amz-Sdk-Checksum-Algorithm", "X-Amz-Meta-Md5chksum", "X-Object-Meta-Sha256sum", "X-Checksum-Sha1",
        "X-Checksum-Deploy", "X-Content-Sha256", "X-Oss-Meta-hash", "X-Amz-Checksum-Crc64nvme",
    ],
)  # fmt: skip
def test_whatever_is_named_after_a_digest_is_one(name: str) -> None:
    """A digest in the clear tells a service which known file an object is."""
    assert digest_fields(fields((name, "x"))) == {name.lower()}


@pytest.mark.parametrize(
    "name",
    ["Authorization", "ETag", "If-Match", "X-Amz-Date", "X-Shape", "X-Summary", "X-Hashtag", "Content-Type"],
)
def test_other_fields_are_none(name: str) -> None:
    assert digest_fields(fields((name, "x"))) == frozenset()


def test_what_a_signature_needs_stays_unless_it_tells_of_a_body() -> None:
    for value in ("UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", hashlib.sha256().hexdigest()):
        assert digest_fields(fields(("x-amz-content-sha256", value))) == frozenset()
    told = fields(("x-amz-content-sha256", digest("sha256").hex()))
    assert digest_fields(told) == {"x-amz-content-sha256"}
    assert [item.value for item in request_digests(told)] == [digest("sha256")]


def test_one_hash_of_each_kind_whatever_is_asked_for() -> None:
    """Each further one would hash the whole body again."""
    one = f"sha-512={b64(digest('sha512'))}"
    assert len(request_digests(fields(("Digest", ",".join([one] * 1000)), ("Repr-Digest", "")))) == 1
    other = f"sha-512={b64(digest('sha512', b'other'))}"
    with pytest.raises(RefusedError) as caught:
        request_digests(fields(("Digest", f"{one},{other}")))
    assert caught.value.refusal is refusals.BAD_DIGEST


def test_declared_lengths() -> None:
    assert declared_length(fields()) is None
    assert declared_length(fields(("Content-Length", "7"))) == 7
    for pairs in ([("Content-Length", "7"), ("Content-Length", "7")], [("Content-Length", "x")]):
        with pytest.raises(RefusedError):
            declared_length(fields(*pairs))
