"""Frames between a proxy and its workers."""

import asyncio

import pytest

from proxy.keys.relay import Relayed
from proxy.workers import wire

RELAYED = Relayed(
    tenant="acme",
    agent="hq",
    challenge=b"c" * 32,
    signing_certificate_der=b"der",
    tokens=("a.b.c", "d.e.f"),
    services=("acme/x", "acme/y"),
    replaces=(True, False),
    is_challenged=True,
    takes_keys=True,
)


def stream(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


@pytest.mark.parametrize(
    "request_",
    [
        wire.Start(1, b"{}", "proxy-1"),
        wire.Open(),
        wire.Take(RELAYED),
        wire.Reload(7),
        wire.Ping(),
        wire.Scrape(),
        wire.Stop(0.5),
    ],
)
async def test_requests_arrive_as_they_were_sent(request_: wire.Request) -> None:
    reader = stream(wire.encode(3, request_) + wire.encode(4, wire.Ping()))
    assert await wire.read_request(reader) == (3, request_)
    assert await wire.read_request(reader) == (4, wire.Ping())
    with pytest.raises(EOFError):
        await wire.read_request(reader)


@pytest.mark.parametrize(
    "answer",
    [
        wire.Done(("late",), ports=(1, 2)),
        wire.Taken(("", "nonce")),
        wire.Scraped(b"x"),
        wire.Failed("a", "b"),
    ],
)
async def test_answers_arrive_as_they_were_sent(answer: wire.Answer) -> None:
    assert await wire.read_answer(stream(wire.encode(9, answer))) == (9, answer)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",  # longer than any frame
        b"\0\0\0\1\xc1",  # no MessagePack
        b"\0\0\0\2\x91\x01",  # no message
        wire.encode(1, wire.Done()),  # an answer where a request is due
    ],
)
async def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        await wire.read_request(stream(data))


def test_a_frame_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(wire.WireError):
        wire.encode(1, wire.Scraped(bytes(101)))
