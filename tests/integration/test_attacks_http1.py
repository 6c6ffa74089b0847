"""Attacks by the bytes of HTTP/1: lines without an end, requests that are not waited for, folded fields."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.bodies.bodies import SealBody
from proxy.gate.permit import Piece
from tests.fakes.origin import End, Exchange, Reply
from tests.integration.attack_rig import CANARY, Siege, answers, besieged

MIB = 1 << 20
BOUND_BYTES = 24 * MIB
"""More than socket buffers, one read and MAX_HEAD_BYTES take together; a fraction of what is sent."""
PUT = b"PUT /x HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path) as siege:
        yield siege


async def send_until_stuck(writer: asyncio.StreamWriter, piece: bytes, total_bytes: int) -> int:
    """How much the proxy took before it read no more (for a second) or cut the connection."""
    sent = 0
    with contextlib.suppress(OSError, TimeoutError):
        while sent < total_bytes:
            writer.write(piece)
            sent += len(piece)
            async with asyncio.timeout(1):
                await writer.drain()
    return sent


async def test_requests_that_do_not_wait_for_the_answer_are_not_collected(siege: Siege) -> None:
    siege.origin.reply = Reply(pieces=[b"first", b"never"], stall_after=1)
    async with siege.reverse() as (_reader, writer):
        writer.write(b"DELETE /x HTTP/1.1\r\nHost: a\r\n\r\n")
        await siege.origin.until(lambda: siege.origin.exchanges)
        sent = await send_until_stuck(writer, b"z" * MIB, 4 * BOUND_BYTES)
    assert sent < BOUND_BYTES


async def test_a_large_pipelined_upload_waits_its_turn_and_arrives(siege: Siege) -> None:
    body = CANARY * 20_000  # 4 MB: more than is kept while the first answer is out
    siege.origin.read_delay_s = 0.5

    def reply(_exchange: Exchange) -> Reply:
        siege.origin.read_delay_s = 0
        return Reply()

    siege.origin.reply = reply
    async with siege.reverse() as (reader, writer):
        writer.write(
            b"DELETE /x HTTP/1.1\r\nHost: a\r\n\r\n" + PUT + b"Content-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body + b"DELETE /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = b""
        async with asyncio.timeout(20):
            while data := await reader.read(1 << 16):
                got += data
    assert got.count(b"HTTP/1.1 200") == 3
    assert [exchange.method for exchange in siege.origin.exchanges] == ["DELETE", "PUT", "DELETE"]
    assert siege.rig.open_independently(siege.owner, bytes(siege.origin.exchanges[1].body)) == body


@pytest.mark.parametrize(
    "begin", [b"5;", b"5\r\nhello\r\n", b"0\r\nA: "], ids=["extension", "header", "trailer"]
)
async def test_lines_inside_a_body_have_an_end(siege: Siege, begin: bytes) -> None:
    async with siege.reverse() as (_reader, writer):
        writer.write(PUT + b"Transfer-Encoding: chunked\r\n\r\n" + begin)
        sent = await send_until_stuck(writer, b"1" * MIB, 4 * BOUND_BYTES)
        assert sent < BOUND_BYTES
    await siege.origin.until(lambda: all(one.end is not End.OPEN for one in siege.origin.exchanges))
    assert siege.nothing_left()


async def test_lines_inside_a_service_s_body_have_an_end(siege: Siege) -> None:
    endless = b"1" * MIB
    head = b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5;"
    siege.origin.reply = Reply(raw=head + endless * 4)
    async with siege.reverse() as stream:
        got = await answers(stream, b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"hello" in got
    assert b"\r\n0\r\n" not in got


@pytest.mark.parametrize(
    "field",
    [
        b"Host: a\r\n Content-Length: 200",
        b"Host: a\r\nX-A: b\r\n\tc",
        b"Host: a\rb",
        b"Host: a\r\nX-A: b\rc: d",
    ],
)
async def test_folded_fields_are_refused(siege: Siege, field: bytes) -> None:
    async with siege.reverse() as stream:
        got = await answers(stream, b"PUT /x HTTP/1.1\r\n" + field + b"\r\n\r\n" + CANARY)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert siege.origin.exchanges == []


async def test_tiny_chunks_do_not_cost_a_walk_each(siege: Siege, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    stock = SealBody.feed

    def feed(self: SealBody, piece: bytes) -> list[Piece]:
        fed.append(len(piece))
        return stock(self, piece)

    monkeypatch.setattr(SealBody, "feed", feed)
    body = CANARY * 100
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    async with siege.reverse() as stream:
        head = PUT + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        got = await answers(stream, head + chunks + b"0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200 ")
    assert siege.rig.open_independently(siege.owner, bytes(siege.origin.exchanges[-1].body)) == body
    assert sum(fed) == len(body)
    assert len(fed) < len(body) / 100


async def test_reading_ahead_says_no_more_than_the_request_may(siege: Siege) -> None:
    async with siege.reverse() as stream:
        hop = b"Connection: close, X-Mine\r\nX-Mine: 1\r\nProxy-Authorization: B x\r\nWant-Digest: md5\r\n"
        head = b"GET /x HTTP/1.1\r\nHost: a\r\nX-Kept: 1\r\nRange: bytes=0-5\r\n"
        await answers(stream, head + hop + b"\r\n")
    assert [one.header("range") for one in siege.origin.exchanges] == ["bytes=0-87", None]
    for exchange in siege.origin.exchanges:
        assert exchange.header("x-kept") == "1"
        for name in ("x-mine", "proxy-authorization", "want-digest"):
            assert exchange.header(name) is None
