"""Requests that two readers read differently: refused, or passed on so that there is one reading.

Each case asserts that no plaintext arrives, that the service saw as many requests as were honestly sent, each
with one framing and a proper end or none, and that the next client is served.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from tests.fakes.origin import End, Exchange, Reply
from tests.integration.attack_rig import CANARY, Http2Client, Siege, answers, besieged

LINE = b"PUT /x HTTP/1.1\r\n"
PUT = LINE + b"Host: a\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(CANARY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SIZE = b"%x" % len(CANARY)
SECOND = b"PUT /second HTTP/1.1\r\nHost: a\r\n" + LENGTH + b"\r\n" + CANARY


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path) as siege:
        yield siege


def chunks(size: bytes = SIZE, *, after: bytes = b"\r\n", end: bytes = b"\r\n", last: bytes = b"0") -> bytes:
    return size + end + CANARY + after + last + b"\r\n\r\n"


def with_length(fields: bytes = b"", line: bytes = LINE) -> bytes:
    return line + b"Host: a\r\n" + fields + LENGTH + b"\r\n" + CANARY + SECOND


def with_chunks(fields: bytes = b"", body: bytes | None = None) -> bytes:
    return PUT + fields + b"\r\n" + (chunks() if body is None else body) + SECOND


REFUSED = {
    "CL.TE": with_chunks(LENGTH + CHUNKED),
    "TE.CL": with_chunks(CHUNKED + LENGTH),
    "CL.0": PUT + b"Content-Length: 0\r\n" + LENGTH + b"\r\n" + SECOND,
    "TE xchunked": with_chunks(b"Transfer-Encoding: xchunked\r\n"),
    "TE space before colon": with_chunks(b"Transfer-Encoding : chunked\r\n"),
    "TE vertical tab": with_chunks(b"Transfer-Encoding:\x0bchunked\r\n"),
    "TE form feed": with_chunks(b"Transfer-Encoding: chunked\x0c\r\n"),
    "TE carriage return": with_chunks(b"Transfer-Encoding: chunked\r\r\n"),
    "TE NUL": with_chunks(b"Transfer-Encoding: chunked\x00\r\n"),
    "TE.TE": with_chunks(CHUNKED + b"Transfer-Encoding: x\r\n"),
    "TE.TE same": with_chunks(CHUNKED + CHUNKED),
    "TE list": with_chunks(b"Transfer-Encoding: identity, chunked\r\n"),
    "TE chunked not last": with_chunks(b"Transfer-Encoding: chunked, gzip\r\n"),
    "TE gzip": with_chunks(b"Transfer-Encoding: gzip, chunked\r\n"),
    "TE quoted": with_chunks(b'Transfer-Encoding: "chunked"\r\n'),
    "TE empty": with_chunks(b"Transfer-Encoding:\r\n"),
    "TE folded": with_chunks(b"X: a\r\n Transfer-Encoding: chunked\r\n"),
    "TE behind LF": with_length(b"X: a\nTransfer-Encoding: chunked\r\n"),
    "TE behind CR": with_length(b"X: a\rTransfer-Encoding: chunked\r\n"),
    "TE in HTTP/1.0": LINE.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + chunks() + SECOND,
    "TE named by Connection": with_chunks(CHUNKED + b"Connection: Transfer-Encoding\r\n"),
    "CL plus": PUT + b"Content-Length: +%d\r\n\r\n" % len(CANARY) + CANARY + SECOND,
    "CL minus": PUT + b"Content-Length: -1\r\n\r\n" + CANARY + SECOND,
    "CL zeros": PUT + b"Content-Length: 0%d\r\n\r\n" % len(CANARY) + CANARY + SECOND,
    "CL hex": PUT + b"Content-Length: 0xc8\r\n\r\n" + CANARY + SECOND,
    "CL underscore": PUT + b"Content-Length: 2_00\r\n\r\n" + CANARY + SECOND,
    "CL other digits": PUT + "Content-Length: \u0662\u0660\u0660\r\n\r\n".encode() + CANARY + SECOND,
    "CL list": PUT + b"Content-Length: %d, %d\r\n\r\n" % (len(CANARY), len(CANARY)) + CANARY + SECOND,
    "CL.CL": PUT + LENGTH + b"Content-Length: 5\r\n\r\n" + CANARY + SECOND,
    "CL.CL same": PUT + LENGTH + LENGTH + b"\r\n" + CANARY + SECOND,
    "CL empty": PUT + b"Content-Length:\r\n\r\n" + CANARY + SECOND,
    "CL beyond any": PUT + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + CANARY + SECOND,
    "CL named by Connection": with_length(b"Connection: Content-Length\r\n"),
    "no colon": with_length(b"nonsense\r\n"),
    "NUL in a value": with_length(b"X: a\x00b\r\n"),
    "NUL in a name": with_length(b"X\x00: a\r\n"),
    "control in a value": with_length(b"X: a\x01b\r\n"),
    "space in a name": with_length(b"X Y: a\r\n"),
    "no name": with_length(b": a\r\n"),
    "bare LF": with_length().replace(b"\r\n", b"\n"),
    "LF before the request": b"\n" + with_length(),
    "many empty lines": b"\r\n" * 9 + with_length(),
    "Host twice": with_length(b"Host: b\r\n"),
    "Host twice, same": with_length(b"Host: a\r\n"),
    "Host missing": LINE + LENGTH + b"\r\n" + CANARY + SECOND,
    "absolute form of another host": with_length(line=b"PUT https://evil.example/x HTTP/1.1\r\n"),
    "absolute form with user": with_length(line=b"PUT https://evil@a/x HTTP/1.1\r\n"),
    "space in the target": with_length(line=b"PUT /x y HTTP/1.1\r\n"),
    "tab in the target": with_length(line=b"PUT /x\ty HTTP/1.1\r\n"),
    "NUL in the target": with_length(line=b"PUT /x\x00 HTTP/1.1\r\n"),
    "fragment": with_length(line=b"PUT /x#y HTTP/1.1\r\n"),
    "asterisk": with_length(line=b"PUT * HTTP/1.1\r\n"),
    "two spaces": with_length(line=b"PUT  /x HTTP/1.1\r\n"),
    "space first": with_length(line=b" PUT /x HTTP/1.1\r\n"),
    "control in the method": with_length(line=b"P\x01T /x HTTP/1.1\r\n"),
    "HTTP/1.2": with_length(line=b"PUT /x HTTP/1.2\r\n"),
    "HTTP/2.0": with_length(line=b"PUT /x HTTP/2.0\r\n"),
    "version in small": with_length(line=b"PUT /x http/1.1\r\n"),
    "another Expect": with_length(b"Expect: 100-continue, x\r\n"),
}
"""Nothing of them leaves, and nothing that follows is a request."""

UNWANTED = {
    "body of a GET": PUT.replace(b"PUT", b"GET") + LENGTH + b"\r\n" + CANARY,
    "body of a HEAD": PUT.replace(b"PUT", b"HEAD") + LENGTH + b"\r\n" + CANARY,
    "body of a DELETE": PUT.replace(b"PUT", b"DELETE") + LENGTH + b"\r\n" + CANARY,
    "body of a TRACE": PUT.replace(b"PUT", b"TRACE") + LENGTH + b"\r\n" + CANARY,
    "websocket": PUT.replace(b"PUT", b"GET")
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    + CANARY,
    "another upgrade": PUT
    + b"Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n"
    + LENGTH
    + b"\r\n"
    + CANARY,
}
"""Nothing of them leaves; where they end is clear."""

CUT = {
    "LF after a size": with_chunks(CHUNKED, chunks(end=b"\n")),
    "LF after a chunk": with_chunks(CHUNKED, chunks(after=b"\n")),
    "nothing after a chunk": with_chunks(CHUNKED, chunks(after=b"")),
    "more after a chunk": with_chunks(CHUNKED, chunks(after=b"XX")),
    "LF in an extension": with_chunks(CHUNKED, chunks(SIZE + b";a\nb")),
    "size with 0x": with_chunks(CHUNKED, chunks(b"0x" + SIZE)),
    "size with plus": with_chunks(CHUNKED, chunks(b"+" + SIZE)),
    "size with minus": with_chunks(CHUNKED, chunks(b"-1")),
    "size with underscore": with_chunks(CHUNKED, chunks(b"0_" + SIZE)),
    "size with space before": with_chunks(CHUNKED, chunks(b" " + SIZE)),
    "no size": with_chunks(CHUNKED, chunks(b"")),
    "size of more digits than any": with_chunks(CHUNKED, chunks(b"0" * 30 + SIZE)),
    "trailer": PUT + CHUNKED + b"\r\n" + chunks().removesuffix(b"\r\n") + b"X: " + CANARY + b"\r\n\r\n",
    "framing as a trailer": PUT + CHUNKED + b"\r\n" + chunks().removesuffix(b"\r\n") + LENGTH + b"\r\n",
}
"""What comes before the fault may have left, sealed; it has no end."""

PASSED = {
    "length": with_length(),
    "chunks": with_chunks(CHUNKED),
    "chunks in another case": with_chunks(b"TRANSFER-ENCODING: ChUnKeD\r\n"),
    "TE tab": with_chunks(b"Transfer-Encoding:\tchunked\t\r\n"),
    "TE with an underscore": with_length(b"Transfer_Encoding: chunked\r\n"),
    "extensions": with_chunks(CHUNKED, chunks(SIZE + b';a="b;c"', last=b"000;x")),
    "size with zeros": with_chunks(CHUNKED, chunks(b"0000" + SIZE)),
    "empty lines before": b"\r\n\r\n" + with_length(),
    "absolute form": with_length(line=b"PUT https://A:443/x HTTP/1.1\r\n"),
    "offer of h2c": with_length(
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n"
    ),
    "name in another case": with_length(line=b"put /x HTTP/1.1\r\n"),
}
"""Unusual, and everybody reads the same: two requests."""


def is_framed_once(siege: Siege, exchange: Exchange) -> bool:
    """One length or chunks, in canonical form, and all of the sealed body."""
    length, coding = exchange.header("content-length"), exchange.header("transfer-encoding")
    names = [name.lower() for name, _ in exchange.headers]
    return (
        names.count("content-length") + names.count("transfer-encoding") == 1
        and exchange.end is End.COMPLETE
        and (coding is None or coding.lower() == "chunked")
        and (length is None or length == str(len(exchange.body)))
        and siege.rig.open_independently(siege.owner, bytes(exchange.body)) == CANARY
    )


async def answers_to(siege: Siege, requests: Mapping[str, bytes]) -> dict[str, bytes]:
    """All side by side, each until the proxy closes: it lingers where a body was not read."""

    async def ask(request: bytes) -> bytes:
        async with siege.reverse() as stream:
            return await answers(stream, request + b"\r\nGET / HTTP/1.1\r\n\r\n", within_s=30)

    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(ask(request), name=name) for name, request in requests.items()}
    return {name: task.result() for name, task in tasks.items()}


async def is_served(siege: Siege) -> bool:
    return (await siege.rig.ask(siege.service, "/next", "-T", "-", body=CANARY)).status == 200


async def test_what_can_be_read_in_two_ways_goes_nowhere(siege: Siege) -> None:
    wrong = {
        name: got
        for name, got in (await answers_to(siege, REFUSED)).items()
        if not got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")) or got.count(b"HTTP/1.1 ") != 1
    }
    assert wrong == {}, list(wrong)
    unwanted = await answers_to(siege, UNWANTED)
    wrong = {name: got for name, got in unwanted.items() if not got.startswith(b"HTTP/1.1 501 ")}
    assert wrong == {}, list(wrong)
    assert siege.origin.exchanges == []
    assert siege.origin.received == b""
    assert await is_served(siege)


async def test_a_body_that_goes_wrong_has_no_end(siege: Siege) -> None:
    wrong = {
        name: got
        for name, got in (await answers_to(siege, CUT)).items()
        if got and not got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
    }
    assert wrong == {}, list(wrong)
    await siege.origin.until(lambda: siege.origin.open_connections == 0)
    assert siege.nothing_left(), [(one.path, one.end, len(one.body)) for one in siege.origin.exchanges]
    assert {exchange.path for exchange in siege.origin.exchanges} <= {"/x"}
    assert all(exchange.end is End.CUT for exchange in siege.origin.exchanges)
    assert await is_served(siege)


@pytest.mark.parametrize("name", PASSED)
async def test_what_is_only_unusual_has_one_reading(siege: Siege, name: str) -> None:
    async with siege.reverse() as stream:
        got = await answers(stream, PASSED[name] + b"\r\nGET / HTTP/1.1\r\n\r\n", within_s=20)
    assert got.count(b"HTTP/1.1 200 ") == 2, got
    assert got.count(b"HTTP/1.1 400 ") == 1, got  # the last one has no Host: it ends the connection
    assert [exchange.path for exchange in siege.origin.exchanges] == ["/x", "/second"]
    assert all(is_framed_once(siege, exchange) for exchange in siege.origin.exchanges)
    assert siege.nothing_left() or not siege.origin.saw(CANARY)
    assert not any(
        name.lower() in {"upgrade", "http2-settings"}
        for exchange in siege.origin.exchanges
        for name, _ in exchange.headers
    )


async def test_a_length_that_lies_about_what_comes(siege: Siege) -> None:
    """Too long: cut when the client ends. Too short: the rest is no request."""
    async with siege.reverse() as (reader, writer):
        writer.write(PUT + b"Content-Length: %d\r\n\r\n" % (len(CANARY) + 1) + CANARY)
        await siege.origin.until(lambda: siege.origin.exchanges)
        writer.transport.abort()
        await siege.origin.until(lambda: siege.origin.exchanges[0].end is End.CUT)
        assert reader.exception() is None
    async with siege.reverse() as stream:
        got = await answers(
            stream, PUT + b"Content-Length: 5\r\n\r\nshort" + CANARY + b"\r\n\r\n", within_s=20
        )
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.count(b"HTTP/1.1 400 ") == 1
    assert not siege.origin.saw(CANARY)
    assert siege.rig.open_independently(siege.owner, bytes(siege.origin.exchanges[1].body)) == b"short"
    assert await is_served(siege)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, x\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\x00\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\rSet-Cookie: b=c\r\n\r\nhello",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 2_0_0 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/9.9 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 60_000 + b"Content-Length: 0\r\n\r\n",
    ],
    ids=[
        "length and chunks", "two lengths", "plus", "unknown coding", "NUL", "CR", "no status", "two digits",
        "underscores", "version", "nonsense", "bomb",
    ],
)  # fmt: skip
async def test_answers_that_can_be_read_in_two_ways_reach_nobody(siege: Siege, raw: bytes) -> None:
    siege.origin.reply = Reply(raw=raw)
    async with siege.reverse() as stream:
        request = PUT + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello"
        got = await answers(stream, request, within_s=20)
    assert got.startswith(b"HTTP/1.1 502 "), got[:200]
    assert got.count(b"HTTP/1.1 ") == 1
    siege.origin.reply = Reply()
    assert await is_served(siege)


HEAD = [(":method", "PUT"), (":scheme", "https"), (":authority", "a"), (":path", "/x")]


@pytest.mark.parametrize(
    "extra",
    [
        [("transfer-encoding", "chunked")],
        [("te", "chunked")],
        [("connection", "content-length")],
        [("keep-alive", "5")],
        [("proxy-connection", "x")],
        [("upgrade", "h2c")],
        [("content-length", "5")],
        [("content-length", "0200")],
        [("content-length", "5, 200")],
        [("x", "a\x0bb")],
        [("x", "a\x01")],
        [("x", "\r\nfoo: bar")],
        [("X-Upper", "a")],
        [("x y", "a")],
        [("host", "evil.example")],
        [(":authority", "evil.example")],
        [(":unknown", "a")],
        [(":status", "200")],
    ],
    ids=lambda extra: ascii(": ".join(extra[0])),
)
async def test_what_comes_by_http2_cannot_become_two_requests(
    siege: Siege, extra: list[tuple[str, str]]
) -> None:
    async with siege.reverse(http2=True) as stream:
        status, *_ = await Http2Client(stream).ask([*HEAD, *extra], CANARY)
    assert status in (None, "400", "421", "501"), status
    assert siege.nothing_left()
    assert siege.origin.exchanges == []
    assert await is_served(siege)
