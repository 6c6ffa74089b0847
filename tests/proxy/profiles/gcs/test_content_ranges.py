"""Content-Range of resumable uploads, and Range of a 308: what is read, and what is not."""

import random
from dataclasses import replace

import pytest

from proxy import refusals
from proxy.messages.message import Fields
from proxy.profiles.gcs.content_ranges import AskedRange, may_have_body, persisted_bytes
from proxy.profiles.gcs.sessions import GRANULE_BYTES
from proxy.refusals import RefusedError
from tests.proxy.profiles.gcs.upload_world import head, request

TARGET = "/upload/storage/v1/b/box/o?upload_id=x"


def asked(value: str | None, length: str | None = None) -> AskedRange:
    fields = {} if value is None else {"content-range": value}
    return AskedRange.of(
        request(head("PUT", TARGET, fields if length is None else {**fields, "content-length": length}))
    )


def test_what_is_said() -> None:
    assert asked("bytes 0-262143/*", "262144") == AskedRange(start=0, stop=262_144)
    assert asked("bytes 262144-262144/262145", "1") == AskedRange(start=262_144, stop=262_145, total=262_145)
    assert asked("bytes */*") == AskedRange(is_status=True)
    assert asked("bytes */7", "0") == AskedRange(is_status=True, total=7)
    assert asked("bytes 0-*/*", "5") == AskedRange(is_rest=True)
    assert asked("bytes 9-*/12", "3") == AskedRange(start=9, total=12, is_rest=True)
    assert asked("bytes 12-*/12", "0") == AskedRange(start=12, total=12, is_rest=True)
    assert asked("bytes 0-1/2") == AskedRange(start=0, stop=2, total=2), "a body whose length nobody said"
    assert asked(None, "5") == AskedRange(is_rest=True)
    assert asked(None, "0") == AskedRange(is_status=True, total=0)


@pytest.mark.parametrize(
    "value",
    [
        "", "bytes", "bytes ", "bytes 0-1", "bytes=0-1/2", "Bytes 0-1/2", "bytes 0 - 1/2", "items 0-1/2",
        "bytes -1/2", "bytes 0-/2", "bytes *-1/2", "bytes 0-1/", "bytes 0-1/-2", "bytes +0-1/2",
        "bytes 0-1/2,3-4/5", "bytes 0-1/0x2", "bytes 0-1/\u0662", "bytes 1-0/*", "bytes 0-2/2", "bytes 3-*/2",
        "bytes 0-1/1234567890123456",
    ],
)  # fmt: skip
def test_what_is_none(value: str) -> None:
    with pytest.raises(RefusedError) as caught:
        asked(value, "2")
    assert caught.value.refusal in (refusals.BAD_MESSAGE, refusals.BAD_LENGTH)


def test_two_of_them_are_none() -> None:
    raw = [(b"content-range", b"bytes 0-1/*"), (b"content-range", b"bytes 2-3/*"), (b"content-length", b"2")]
    its = head("PUT", TARGET)
    both = type(its)(method="PUT", target=TARGET, fields=Fields(raw), host=its.host, http2=False)
    with pytest.raises(RefusedError):
        AskedRange.of(request(both))


def test_a_body_of_another_length_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        asked("bytes 0-3/*", "5")
    assert caught.value.refusal is refusals.BAD_LENGTH


def test_any_text_is_read_as_it_says_or_refused() -> None:
    dice = random.Random(1)
    read = 0
    for _ in range(20_000):
        number = [str(dice.choice((0, 1, 2, 29, 300))) for _ in range(3)]
        tokens = ["bytes ", number[0], "-", dice.choice((number[1], "*")), "/", dice.choice((number[2], "*"))]
        if dice.random() < 0.5:
            tokens[dice.randrange(6)] = dice.choice(("", "-", "/", "*", "x", "*/", "9" * 16, "bytes "))
        value = "".join(tokens).strip(" ")
        try:
            found = asked(value)
        except RefusedError:
            continue
        read += 1
        place, total = value.removeprefix("bytes ").split("/")
        assert (found.total is None) == (total == "*")
        assert found.total is None or found.total == int(total)
        assert found.is_status == (place == "*")
        if not found.is_status:
            start, last = place.split("-")
            assert found.start == int(start)
            assert found.stop == (None if last == "*" else int(last) + 1)
            assert found.stop is None or found.start < found.stop
            assert found.total is None or (found.stop or found.start) <= found.total
    assert read > 50, "the dice were loaded"


@pytest.mark.parametrize(
    ("value", "persisted"),
    [
        (None, 0),
        ("bytes=0-0", 0),
        ("bytes=0-262142", 0),
        ("bytes=0-262143", GRANULE_BYTES),
        ("bytes=0-300000", GRANULE_BYTES),
        ("bytes=0-524287", 2 * GRANULE_BYTES),
        ("bytes=1-524287", 0),
        ("0-524287", 0),
        ("bytes=0-99999999999999999999", 0),
    ],
)
def test_what_a_service_says_it_has(value: str | None, persisted: int) -> None:
    raw = [] if value is None else [(b"range", value.encode())]
    assert persisted_bytes(Fields(raw)) == persisted


def test_whether_a_body_may_come() -> None:
    assert may_have_body(request(head("PUT", TARGET, {"content-length": "1"})))
    assert not may_have_body(request(head("PUT", TARGET, {"content-length": "0"})))
    assert not may_have_body(request(head("PUT", TARGET)))
    by_http2 = replace(head("PUT", TARGET), http2=True)
    assert may_have_body(request(by_http2)), "it need not say a length"
