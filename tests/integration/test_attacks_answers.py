"""Attacks by a service: answers that would pass ciphertext off as plaintext, or bring plaintext out."""

import asyncio
import gzip
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.tenants.model import LegacyPolicy
from tests.fakes.origin import End, Exchange, Reply
from tests.integration.attack_rig import CANARY, Siege, answers, besieged

WRITES = [["-T", "-"], ["-X", "POST", "--data-binary", "@-"], ["-X", "DELETE"], ["-X", "OPTIONS"]]


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path) as siege:
        yield siege


@pytest.fixture
async def migrating(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path, legacy=LegacyPolicy.MIGRATE) as siege:
        yield siege


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_no_answer_to_a_write_is_ciphertext(siege: Siege, framing: str, version: str) -> None:
    """`Prefer: return=representation`, a download by POST, `X-HTTP-Method-Override: GET`."""
    stored = await siege.sealed(CANARY)
    for pieces in ([stored], [stored[:5], stored[5:]]):
        siege.origin.reply = Reply(pieces=pieces, framing=framing)
        for arguments in WRITES:
            body = CANARY if "-" in arguments or "@-" in arguments else None
            got = await siege.rig.ask(siege.service, "/x", version, *arguments, body=body)
            assert (got.status, got.code) == (502, "object-invalid"), arguments
    siege.origin.reply = Reply(pieces=[b"{", b'"stored": true}'], framing=framing)
    for arguments in WRITES:
        body = CANARY if "-" in arguments or "@-" in arguments else None
        got = await siege.rig.ask(siege.service, "/x", version, *arguments, body=body)
        assert (got.status, got.body) == (200, b'{"stored": true}'), arguments


@pytest.mark.parametrize("status", [200, 203, 205, 206, 207, 226, 299])
async def test_no_success_brings_ciphertext_to_a_read(siege: Siege, status: int) -> None:
    stored = await siege.sealed(CANARY)
    siege.origin.reply = Reply(status, pieces=[stored])
    got = await siege.rig.ask(siege.service, "/x")
    assert got.body == CANARY or got.code is not None
    siege.origin.reply = Reply(status, pieces=[b"<html>" * 100])
    got = await siege.rig.ask(siege.service, "/x")
    assert got.code is not None


ELSEWHERE = [
    "https://evil.example/x",
    "http://localhost:{port}/x",
    "//evil.example/x",
    "/\\evil.example/x",
    "\\\\evil.example/x",
    "https://localhost:{port}@evil.example/x",
    "https://localhost:{other}/x",
    "https:evil.example",
    "ftp://localhost:{port}/x",
    "https://evil.example\\@localhost:{port}/x",
]
HERE = ["/y", "y", "../y?z=https://evil.example", "?z", "https://localhost:{port}/y", ""]


@pytest.mark.parametrize("mode", ["forward", "reverse"])
async def test_an_upload_is_not_sent_on_to_where_it_is_not_sealed(siege: Siege, mode: str) -> None:
    """A client that follows 307 sends the body again: by itself, in the clear, to whom the service names."""
    port = siege.origin.port

    async def status_of(status: int, location: str) -> int:
        place = location.format(port=port, other=port - 1)
        siege.origin.reply = Reply(status, [("Location", place)], [])
        arguments = ["-T", "-", "-H", "Expect:"]
        return (await siege.rig.ask(siege.service, "/x", *arguments, mode=mode, body=CANARY)).status

    for location in ELSEWHERE:
        assert await status_of(307, location) == 502, location
    for status in (300, 301, 302, 308):
        assert await status_of(status, ELSEWHERE[0]) == 502
    assert await status_of(303, ELSEWHERE[0]) == 303  # to be fetched, without the body
    for location in HERE:
        assert await status_of(307, location) == 307, location
    assert not siege.origin.saw(CANARY)


async def test_an_upload_is_not_acknowledged_before_its_end(siege: Siege) -> None:
    unfinished = b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n" + CANARY
    siege.origin.reply = Reply(201, early=True)
    async with siege.reverse() as stream:
        got = await answers(stream, unfinished, within_s=1)
    assert got.startswith(b"HTTP/1.1 502 ")
    assert b"answer-refused" in got
    assert b"HTTP/1.1 201" not in got
    await siege.origin.until(lambda: siege.origin.exchanges[-1].end is not End.OPEN)
    assert siege.nothing_left()
    siege.origin.reply = Reply(413, early=True)
    async with siege.reverse() as stream:
        got = await answers(stream, unfinished, within_s=1)
    assert got.startswith(b"HTTP/1.1 413 ")


async def test_our_words_are_ours(siege: Siege) -> None:
    siege.origin.reply = Reply(404, [("Sealgate-Error", "key-destroyed")])
    got = await siege.rig.ask(siege.service, "/x")
    assert (got.status, got.code) == (404, None)


# A service that migrates.


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "code"),
    [
        ("gzip", gzip.compress),
        ("X-GZip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_coding_does_not_hide_ciphertext(
    migrating: Siege, coding: str, code: Callable[[bytes], bytes], framing: str
) -> None:
    coded = code(await migrating.sealed(CANARY))
    legacy = code(CANARY)

    def served(content: bytes, step: int) -> Reply:
        pieces = [content[at : at + step] for at in range(0, len(content), step)]
        return Reply(200, [("Content-Encoding", coding)], pieces, framing=framing)

    for step in (1, 7, 1 << 20):
        migrating.origin.reply = served(coded, step)
        got = await migrating.rig.ask(migrating.service, "/x")
        assert (got.status, got.code) == (502, "object-invalid"), step
        migrating.origin.reply = served(legacy, step)
        got = await migrating.rig.ask(migrating.service, "/x")
        assert (got.status, got.body) == (200, legacy), step
    migrating.origin.reply = Reply(200, [("Content-Encoding", coding)], [b"no such coding"], framing=framing)
    assert (await migrating.rig.ask(migrating.service, "/x")).body == b"no such coding"


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "x"])
async def test_what_cannot_be_looked_through_is_refused(migrating: Siege, coding: str) -> None:
    migrating.origin.reply = Reply(200, [("Content-Encoding", coding)], [b"might be anything"])
    assert (await migrating.rig.ask(migrating.service, "/x")).code == "not-sealed"
    stored = await migrating.sealed(CANARY)  # the client's own coding, inside the seal
    migrating.origin.reply = Reply(200, [("Content-Encoding", coding)], [stored])
    assert (await migrating.rig.ask(migrating.service, "/x")).body == CANARY


async def test_a_legacy_range_stays_that_of_what_was_looked_at(migrating: Siege) -> None:
    """Looked at, it was legacy; by the time it is served it is sealed, and If-Match is ignored."""
    stored = await migrating.sealed(CANARY * 100)
    legacy = bytes(range(256)) * 100

    def tag(content: bytes) -> str:
        return f'"{hashlib.sha256(content).hexdigest()}"'

    def reply(exchange: Exchange) -> Reply:
        if exchange.header("range") == "bytes=0-87":
            head = [("ETag", tag(legacy)), ("Content-Range", f"bytes 0-87/{len(legacy)}")]
            return Reply(206, head, [legacy[:88]])
        return replies[-1]

    replies: list[Reply] = []
    migrating.origin.reply = reply
    where = [("Content-Range", f"bytes 0-199/{len(legacy)}")]
    for then, status, code in (
        (Reply(206, [("ETag", tag(legacy)), *where], [legacy[:200]]), 206, None),
        (Reply(206, [("ETag", tag(stored)), *where], [stored[:200]]), 502, "upstream-changed"),
        (Reply(206, where, [stored[:200]]), 502, "upstream-changed"),
        (Reply(206, [("ETag", tag(legacy)), *where], [stored[:200]]), 502, "object-invalid"),
        (Reply(412), 502, "upstream-changed"),
        (Reply(200, [("ETag", tag(stored))], [stored]), 200, None),
        (Reply(200, [("ETag", tag(legacy))], [legacy]), 200, None),
    ):
        replies.append(then)
        got = await migrating.rig.ask(migrating.service, "/x", "-H", "Range: bytes=0-199")
        assert (got.status, got.code) == (status, code), then
        assert stored[:16] not in got.body
        if status == 200:
            assert got.body in (CANARY * 100, legacy)


async def test_what_comes_after_an_answer_answers_nothing(siege: Siege) -> None:
    """A second answer behind the first is not taken for that of the next request."""
    second = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    siege.origin.reply = Reply(raw=b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno" + second)
    async with siege.reverse() as stream:
        got = await answers(stream, b"DELETE /x HTTP/1.1\r\nHost: a\r\n\r\n", within_s=0.5)
        assert got.endswith(b"no")
        siege.origin.reply = Reply(404, [("Connection", "close")], [b"true"])
        got = await answers(stream, b"DELETE /y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert got.endswith(b"true")
    for raw in (
        b"HTTP/1.1 204 No\r\nContent-Length: 6\r\n\r\nforged",
        b"HTTP/1.1 304 No\r\nContent-Length: 6\r\n\r\nforged",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nforged\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nContent-Length: 5\r\n\r\nforged",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n6\r\nforged\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nforged\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Up\r\nUpgrade: x\r\n\r\nforged",
        b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.1 101 Up\r\n\r\nforged",
        b"HTTP/1.1 -1 OK\r\nContent-Length: 6\r\n\r\nforged",
        b"forged",
    ):
        siege.origin.reply = Reply(raw=raw, close=True)
        async with siege.reverse() as stream, asyncio.timeout(20):
            got = await answers(stream, b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", within_s=1)
        assert b"forged" not in got, raw
