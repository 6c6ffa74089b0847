"""Which heads every reader reads alike."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.http import Headers, Response
from mitmproxy.net.http import http1

from proxy.gate import heads
from proxy.gate.heads import (
    MAX_FIELDS,
    HeadSearch,
    has_controls,
    is_request_head,
    names_one_host,
    unfold,
)
from proxy.gate.http1 import MAX_HEAD_BYTES

GOOD = (
    b"PUT /a%20b?c=d&e HTTP/1.1\r\nHost: a.example:8443\r\nX-Empty:\r\nX-Tab:\tb\tc \r\n"
    b'X-Quoted: "a;b", c\r\nX-Raw: \xc3\xa9\xff\r\n!#$%&\'*+-.^_`|~: token\r\n\r\n'
)


def is_sound(head: bytes) -> bool:
    end = HeadSearch().end_of(bytearray(head))
    return end is not None and is_request_head(bytearray(head), end)


@pytest.mark.parametrize(
    "head",
    [
        GOOD,
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\n\r\n",
        b"M-SEARCH * HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * MAX_FIELDS + b"\r\n",
    ],
    ids=["all kinds", "1.0", "raw path", "connect", "asterisk", "long", "many"],
)
def test_what_real_clients_send_is_sound(head: bytes) -> None:
    assert is_sound(head)


LINE = GOOD.partition(b"\r\n")[0]
BAD_LINES = [
    b"PUT  /x HTTP/1.1",
    b"PUT /x  HTTP/1.1",
    b"PUT /x HTTP/1.1 ",
    b" PUT /x HTTP/1.1",
    b"PUT\t/x HTTP/1.1",
    b"PUT /x y HTTP/1.1",
    b"PUT /x\x00 HTTP/1.1",
    b"PUT /x\x7f HTTP/1.1",
    b"PU:T /x HTTP/1.1",
    b"PU\xc3\xa9 /x HTTP/1.1",
    b"PUT /x HTTP/1.1\r",
    b"PUT /x http/1.1",
    b"PUT /x HTTP/1.10",
    b"PUT /x",
    b"",
]
BAD_FIELDS = [
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: chunked\r",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chunked\x00",
    b"X: a\r\n Transfer-Encoding: chunked",
    b"X: a\r\n\tfolded",
    b"X: a\nTransfer-Encoding: chunked",
    b"X: a\rTransfer-Encoding: chunked",
    b"X: a\x08",
    b"X: a\x7f",
    b"X Y: a",
    b"X\x00: a",
    b"X\xc3\xa9: a",
    b": a",
    b"no colon",
    b"(x): a",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_request_line_that_can_be_read_otherwise(line: bytes) -> None:
    assert not is_sound(line + b"\r\nHost: a\r\n\r\n")


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_field_that_can_be_read_otherwise(field: bytes) -> None:
    assert is_sound(LINE + b"\r\nHost: a\r\nX: b\r\n\r\n")
    for fields in (b"Host: a\r\n" + field, field + b"\r\nHost: a"):
        assert not is_sound(LINE + b"\r\n" + fields + b"\r\n\r\n")


def test_lines_end_in_both_characters() -> None:
    for at in (index for index in range(len(GOOD)) if GOOD[index : index + 2] == b"\r\n"):
        assert not is_sound(GOOD[:at] + GOOD[at + 1 :])


@given(at=st.integers(0, len(GOOD) - 5), byte=st.integers(0, 255))
def test_whatever_is_sound_is_read_by_mitmproxy_as_it_is_written(at: int, byte: int) -> None:
    """One byte exchanged: either refused, or the parsed message says again what was sent."""
    head = GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]
    if is_sound(head):
        lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        try:
            request = http1.read_request_head(lines)
        except ValueError:
            return
        data = request.data
        assert head.startswith(b"%b %b" % (data.method, b"" if data.authority else data.path))
        assert len(data.headers.fields) == len(lines) - 1
        for (name, value), line in zip(data.headers.fields, lines[1:], strict=True):
            assert line.startswith(name + b":")
            assert line[len(name) + 1 :].strip(b" \t") == value


def test_too_many_fields() -> None:
    assert not is_sound(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_FIELDS + 1) + b"\r\n")


def test_the_search_looks_at_each_byte_once() -> None:
    data, search = bytearray(), HeadSearch()
    began_s = time.process_time()
    for _ in range(1 << 18):
        data += b"a"
        assert search.end_of(data) is None
    assert time.process_time() - began_s < 10  # 0.1 s; 1,000 s if it began anew each time
    data += b"\r\n\r"
    assert search.end_of(data) is None
    data += b"\n"
    assert search.end_of(data) == len(data)


@pytest.mark.parametrize(
    ("head", "is_one"),
    [
        (b"GET / HTTP/1.1\r\nHost: a", True),
        (b"GET / HTTP/1.1\r\nX: a", False),
        (b"GET / HTTP/1.0\r\nX: a", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a", False),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b", False),
        (b"GET http://a/ HTTP/1.1\r\nHost: a", True),
        (b"GET http://A:80/ HTTP/1.1\r\nHost: a", True),
        (b"GET https://a/ HTTP/1.1\r\nHost: a:443", True),
        (b"GET http://a/ HTTP/1.1\r\nHost: a:443", False),
        (b"GET http://a/ HTTP/1.1\r\nHost: b", False),
        (b"GET http://a@b/ HTTP/1.1\r\nHost: b", False),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a", True),
        (b"CONNECT a:443 HTTP/1.1", True),
    ],
)
def test_one_host(head: bytes, is_one: bool) -> None:
    try:
        request = http1.read_request_head(head.split(b"\r\n"))
    except ValueError:
        assert not is_one
        return
    assert names_one_host(request) is is_one


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (b"a", b"a"),
        (b"a\tb", b"a\tb"),
        (b"a\r\n b", b"a b"),
        (b"a \r\n\t  b\r\n c", b"a b c"),
        (b" a\r\n \r\n\tb ", b" a  b "),
        (b"a\n b", b"a b"),
        (b"a\rb", None),
        (b"a\r\nb: c", None),
        (b"a\x00", None),
        (b"\x1b[2J", None),
    ],
)
def test_a_folded_response_is_unfolded(value: bytes, becomes: bytes | None) -> None:
    response = Response.make(200, b"", Headers([(b"x", value), (b"y", b"z")]))
    assert unfold(response) is (becomes is not None)
    if becomes is not None:
        assert response.headers.fields[:2] == ((b"x", becomes), (b"y", b"z"))
        assert not has_controls(response.headers)


def test_unfolding_takes_no_longer_for_blanks() -> None:
    """As many as a head may have, and no fold behind: work that grows by their square takes an hour."""
    blanks = b"a" + b" \t" * (MAX_HEAD_BYTES // 2) + b"b"
    response = Response.make(200, b"", Headers([(b"x", blanks), (b"y", b"a\r\n b")]))
    assert unfold(response)
    assert response.headers.fields[:2] == ((b"x", blanks), (b"y", b"a b"))


def test_what_is_parsed_already_is_bounded_as_well() -> None:
    """HTTP/2: no line is there to be judged, and the fields become lines elsewhere."""
    assert heads.is_sound(Headers([(b"x", b"y")] * MAX_FIELDS))
    assert not heads.is_sound(Headers([(b"x", b"y")] * (MAX_FIELDS + 1)))
    assert not heads.is_sound(Headers([(b"x", b"y\r\nz: a")]))
