"""multipart/related: parsed in any pieces, and what could be read in two ways is refused."""

import random

import pytest

from envelope.objects import Opener, Sealer
from proxy import refusals
from proxy.profiles.gcs.related import MAX_HEAD_BYTES, MAX_METADATA_BYTES, Related, RelatedBody, boundary_of
from proxy.refusals import Refusal, RefusedError
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER

METADATA = b'{"name": "o"}'
JSON = b"Content-Type: application/json; charset=UTF-8"


def body(
    content: bytes = b"content",
    *,
    metadata: bytes = METADATA,
    first: bytes = JSON,
    second: bytes = b"Content-Type: a/b",
    boundary: bytes = b"x",
    end: bytes = b"\r\n",
) -> bytes:
    head = b"\r\n" + second + b"\r\n\r\n" if second else b"\r\n\r\n"
    return (
        b"--" + boundary + b"\r\n" + first + b"\r\n\r\n" + metadata
        + b"\r\n--" + boundary + head + content
        + b"\r\n--" + boundary + b"--" + end
    )  # fmt: skip


def parsed(
    data: bytes, boundary: bytes = b"x", steps: random.Random | int = 1_000_000
) -> tuple[bytes, Related]:
    """The content, opened again, and what else there was."""
    found = Related()
    reader, sealed, at = RelatedBody(boundary, found, Sealer(OBJECT_KEY, OWNER, KEY_ID)), bytearray(), 0
    while at < len(data):
        step = steps if isinstance(steps, int) else steps.randrange(1, 40)
        sealed += reader.feed(data[at : at + step])
        at += step
    sealed += reader.finish()
    opener = Opener(OWNER, lambda _header: OBJECT_KEY)
    return bytes(opener.update(sealed)) + opener.finalize(), found


def refused(data: bytes, boundary: bytes = b"x", *, steps: int = 1) -> Refusal:
    """However it comes."""
    found: Refusal | None = None
    for step in (steps, 1_000_000):
        with pytest.raises(RefusedError) as caught:
            parsed(data, boundary, step)
        assert found in (None, caught.value.refusal)
        found = caught.value.refusal
    assert found is not None
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 1_000_000])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a",
        b"\r\n",
        b"\r\n-",
        b"\r",
        b"--",
        b"\n--y",
        b"\r\n--y\r\n",
        bytes(range(256)) * 80,
        b"\r\n-x\r\n--",
    ],
    ids=range(10),
)
def test_content_of_any_kind_in_any_pieces(content: bytes, steps: int) -> None:
    for second in (b"Content-Type: a/b", b"", b"Content-Type: a/b\r\nContent-Transfer-Encoding: binary"):
        made, found = parsed(body(content, second=second), steps=steps)
        assert made == content
        assert found.metadata == METADATA
        assert found.content_type == ("a/b" if second else None)
        assert found.tally.uploaded.plain_bytes == len(content)


def test_delimiters_as_clients_write_them() -> None:
    for data in (body(), b"\r\n" + body(), body(end=b""), body(boundary=b"=====1234==")):
        boundary = b"=====1234==" if b"1234" in data else b"x"
        assert parsed(data, boundary)[0] == b"content"


def test_cuts_are_refused() -> None:
    data = body(end=b"")
    for stop in range(len(data)):
        with pytest.raises(RefusedError):
            parsed(data[:stop], steps=7)


def test_anything_that_passes_is_what_another_reader_sees() -> None:
    """By the letter of RFC 2046: what stands between the delimiter lines."""
    dice = random.Random(5)
    passed = 0
    for _ in range(4000):
        data = bytearray(body(bytes(dice.choice(b"\r\n-xab") for _ in range(dice.randrange(30)))))
        for _ in range(dice.randrange(3)):
            data[dice.randrange(len(data))] = dice.choice(b"\r\n-x: a")
        try:
            content, found = parsed(bytes(data), steps=dice)
        except RefusedError:
            continue
        passed += 1
        pieces = (b"\r\n" + bytes(data).removeprefix(b"\r\n")).split(b"\r\n--x")
        assert len(pieces) == 4
        assert pieces[1].partition(b"\r\n\r\n")[2] == found.metadata
        assert (pieces[2].partition(b"\r\n\r\n")[2]) == content
    assert passed > 500


@pytest.mark.parametrize(
    "data",
    [
        b"preamble\r\n" + body(),
        body() + b"epilogue",
        body() + b"\r\n",
        body(b"a--x b"),  # a delimiter elsewhere than behind a line end
        body(b"a\n--x\r\nb"),
        body(b"a\r\n--xy\r\nb"),  # one that goes on
        body(b"a\r\n--x \r\nb"),
        body(b"a\r\n--x\r\nContent-Type: c/d\r\n\r\nthird"),
        body(metadata=b'{"a--x": 1}'),
        body(first=b"Content-Type: text/plain"),
        body(first=b"X-Other: 1\r\n" + JSON),
        body(first=JSON + b"\r\n " + b"folded"),
        body(first=JSON + b"\r\n" + JSON),
        body(first=b"Content-Type : application/json"),
        body(second=b"Content-Type: multipart/mixed; boundary=y"),
        body(second=b"Content-Type: message/rfc822"),
        body(second=b"Content-Transfer-Encoding: base64"),
        body(second=b"Content-Encoding: gzip"),
        body().replace(b"\r\n", b"\n"),
        b"--x--\r\n",
        b"--x\r\n" + JSON + b"\r\n\r\n{}\r\n--x--\r\n",
        b"--x\r\n\r\n{}\r\n--x\r\n\r\ncontent\r\n--x--",
        b"",
    ],
    ids=range(23),
)
def test_what_is_refused(data: bytes) -> None:
    assert refused(data) is refusals.BAD_MESSAGE


def test_heads_and_metadata_are_limited() -> None:
    assert refused(body(first=JSON + b"; x=" + b"y" * MAX_HEAD_BYTES)) is refusals.TOO_LARGE
    assert refused(body(metadata=b" " * (MAX_METADATA_BYTES + 1)), steps=1000) is refusals.TOO_LARGE
    assert parsed(body(metadata=b" " * MAX_METADATA_BYTES))[0] == b"content"


def test_a_reader_that_has_failed_stays_failed() -> None:
    reader = RelatedBody(b"x", Related(), Sealer(OBJECT_KEY, OWNER, KEY_ID))
    with pytest.raises(RefusedError):
        reader.feed(b"no delimiter")
    for _ in range(2):
        with pytest.raises(RefusedError):
            reader.feed(body())
        with pytest.raises(RefusedError):
            reader.finish()
    at_its_end = RelatedBody(b"x", Related(), Sealer(OBJECT_KEY, OWNER, KEY_ID))
    with pytest.raises(RefusedError):
        at_its_end.feed(body() + b"and more")
    with pytest.raises(RefusedError):
        at_its_end.finish()


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/related; boundary=abc", b"abc"),
        ('Multipart/Related; boundary="a b:c"', b"a b:c"),
        ("multipart/related;BOUNDARY=abc", b"abc"),
        ('multipart/related; type="application/json"; boundary=abc', b"abc"),
        ("multipart/related; boundary====1==", b"===1=="),
    ],
)
def test_boundaries(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "multipart/related",
        "multipart/related;",
        "multipart/mixed; boundary=a",
        "multipart/related; boundary=",
        'multipart/related; boundary=""',
        "multipart/related; boundary=a; boundary=b",
        "multipart/related boundary=a",
        'multipart/related; boundary="a',
        "multipart/related; boundary=a b",
        "multipart/related; boundary=" + "a" * 71,
        'multipart/related; boundary="a "',
        "multipart/related; boundary=\u00e4",
        'multipart/related; boundary="a\\"b"',
        "multipart/related; boundary=a, multipart/related; boundary=b",
        "multipart/related; boundary*=utf-8''a",
    ],
)
def test_no_boundaries(content_type: str) -> None:
    with pytest.raises(RefusedError) as caught:
        boundary_of(content_type)
    assert caught.value.refusal is refusals.BAD_MESSAGE
