"""Attacks by the bytes of HTTP/2: fields that would be lines, streams that are reset at once, floods."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.addon import MAX_FLOWS
from tests.fakes.origin import Reply
from tests.integration.attack_rig import CANARY, Http2Client, Siege, besieged

HEAD = [(":method", "PUT"), (":scheme", "https"), (":authority", "a"), (":path", "/x")]


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path) as siege:
        yield siege


@pytest.mark.parametrize(
    "head",
    [
        [*HEAD, ("x-a\n", "b")],
        [*HEAD, ("x-a\r\nfoo", "b")],
        [*HEAD, ("x-a", "b\r\nfoo: bar")],
        [*HEAD, ("x-a", "b\nfoo: bar")],
        [*HEAD, ("x-a", "\x00")],
        [*HEAD, ("x:a", "b")],
        [*HEAD, ("", "")],
        [*HEAD, ("transfer-encoding", "chunked")],
        [*HEAD, ("connection", "x-a")],
        [*HEAD, ("content-length", "5"), ("content-length", "5")],
        [*HEAD, ("content-length", "+200")],
        [*HEAD, ("content-length", "100")],
        [*HEAD, ("host", "a"), ("host", "b")],
        [*HEAD, (":path", "/y")],
        [(":method", "PUT / HTTP/1.1\r\nX:"), *HEAD[1:]],
        [*HEAD[:3], (":path", "/x HTTP/1.1\r\nX: y")],
        [*HEAD[:3], (":path", "/x y")],
        [*HEAD[:3], (":path", "*")],
        [*HEAD[:3], (":path", "@evil.example/")],
        [*HEAD[:3], (":path", "https://evil.example/")],
        [(":method", "CONNECT"), (":authority", "localhost")],
        [(":method", "CONNECT"), (":protocol", "websocket"), *HEAD[1:]],
    ],
)
async def test_nothing_that_http1_would_read_otherwise_goes_on(
    siege: Siege, head: list[tuple[str, str]]
) -> None:
    async with siege.reverse(http2=True) as stream:
        status, *_ = await Http2Client(stream).ask(head, CANARY)
    assert status in (None, "400", "501", "403")
    assert siege.nothing_left()
    # The proxy is as it was.
    assert (await siege.rig.ask(siege.service, "/x", "--http2", "-T", "-", body=CANARY)).status == 200


@pytest.mark.parametrize("extra", [[], [("range", "bytes=0-5")]], ids=["whole", "range"])
async def test_streams_that_are_reset_at_once_are_bounded(siege: Siege, extra: list[tuple[str, str]]) -> None:
    """The service does not answer, so each stream would leave a hook or a connect that waits behind."""
    siege.origin.reply = Reply(pieces=[b"x", b"never"], stall_after=1)
    before = len(asyncio.all_tasks())
    count = 8 * MAX_FLOWS
    most = 0
    async with siege.reverse(http2=True) as stream:
        client = Http2Client(stream)
        with contextlib.suppress(OSError):
            for _ in range(count // 32):
                for _ in range(32):
                    number = client.h2.get_next_available_stream_id()
                    head = [(":method", "GET"), *HEAD[1:], *extra]
                    client.h2.send_headers(number, head, end_stream=True)
                    client.h2.reset_stream(number)
                client.writer.write(client.h2.data_to_send())
                await client.writer.drain()
                await asyncio.sleep(0)
                most = max(most, len(asyncio.all_tasks()))
            for _ in range(100):
                await asyncio.sleep(0.01)
                most = max(most, len(asyncio.all_tasks()))
        assert siege.rig.metric("sealgate_active_requests") <= MAX_FLOWS
        assert most - before < 3 * MAX_FLOWS
    assert (await siege.rig.ask(siege.service, "/x", "-X", "PATCH")).code == "partial-write"


async def test_floods_of_frames_are_survived(siege: Siege) -> None:
    for frame in (
        b"\x00\x00\x08\x06\x00\x00\x00\x00\x00abcdefgh",  # PING
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",  # SETTINGS
        b"\x00\x00\x01\x09\x00\x00\x00\x00\x01\x82",  # CONTINUATION of nothing
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01",  # WINDOW_UPDATE
        b"\x00\x00\x05\x02\x00\x00\x00\x00\x03\x00\x00\x00\x00\x10",  # PRIORITY
    ):
        async with siege.reverse(http2=True) as stream:
            client = Http2Client(stream)
            stream[1].write(client.h2.data_to_send())
            with contextlib.suppress(OSError, TimeoutError):
                for _ in range(10):
                    stream[1].write(frame * 1000)
                    async with asyncio.timeout(1):
                        await stream[1].drain()
        assert (await siege.rig.ask(siege.service, "/x", "--http2", "-T", "-", body=CANARY)).status == 200
