"""Floods and bombs by HTTP/2, and compressed ones: the proxy's memory stays, and others are served meanwhile.

The proxy is a process of its own; what it keeps is read from the kernel. What ends a connection, frame by
frame, is tests/proxy/gate/test_frames.py's.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.integration.attack_rig import Http2Client, Stream
from tests.integration.hostile_proxy import BOMB_BYTES, HostileProxy, bomb, hostile_proxy
from tests.integration.proxy_rig import curl

MIB = 1 << 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEAD = [(":method", "PUT"), (":scheme", "https"), (":authority", "a"), (":path", "/x")]
BLOCK = Encoder().encode(HEAD, huffman=False)
OPENED = HeadersFrame(1, BLOCK, flags=["END_HEADERS"]).serialize()
PATIENCE_S = 60


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileProxy]:
    with hostile_proxy(tmp_path_factory.mktemp("hostile")) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def greeted(proxy: HostileProxy) -> AsyncIterator[Stream]:
    trust = ssl.create_default_context(cafile=proxy.address.ca_file)
    trust.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.address.reverse_port, ssl=trust, server_hostname="127.0.0.1"
    )
    try:
        writer.write(PREFACE)
        yield reader, writer
    finally:
        writer.transport.abort()


async def is_ended(stream: Stream, pieces: Iterator[bytes]) -> bool:
    """Send *pieces* and read all the while: whether the proxy has closed before their end."""
    reader, writer = stream

    async def read() -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        reading = group.create_task(read(), name="read")
        with contextlib.suppress(OSError):
            for piece in pieces:
                if reading.done():
                    break
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            else:
                # All is sent; the last of it may not have been judged yet.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(reading), 20)
        has_ended = reading.done() or writer.is_closing()
        reading.cancel()
    return has_ended


async def served(proxy: HostileProxy) -> None:
    """An upload and its download by HTTP/2."""
    way = (
        "--http2",
        "--cacert",
        proxy.address.ca_file,
        f"https://127.0.0.1:{proxy.address.reverse_port}/mine",
    )
    put = await curl("-T", "-", *way, body=b"content", timeout_s=PATIENCE_S)
    assert (put.status, put.version) == (200, "2"), put.error
    got = await curl(*way, timeout_s=PATIENCE_S)
    assert got.body == b"content", got.error


def alike(frame: bytes, before: bytes = b"") -> Callable[[], Iterator[bytes]]:
    """The same again and again, 8 MiB at most."""
    piece = frame * (65_536 // len(frame))

    def pieces() -> Iterator[bytes]:
        yield before
        for _ in range(128):
            yield piece

    return pieces


def resets() -> Iterator[bytes]:
    for start in range(1, 40_000, 256):
        yield b"".join(
            HeadersFrame(stream_id, BLOCK, flags=["END_HEADERS", "END_STREAM"]).serialize()
            + RstStreamFrame(stream_id, error_code=8).serialize()
            for stream_id in range(start, start + 256, 2)
        )


def table_sizes() -> Iterator[bytes]:
    pair = b"".join(SettingsFrame(0, settings={1: size}).serialize() for size in (2**32 - 1, 0))
    return alike(pair)()


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "ping": alike(PingFrame(0, b"12345678").serialize()),
    "settings": alike(SettingsFrame(0).serialize()),
    "table-sizes": table_sizes,
    "priority": alike(PriorityFrame(5, depends_on=0, stream_weight=1).serialize()),
    "window": alike(WindowUpdateFrame(0, window_increment=1).serialize()),
    "empty-data": alike(DataFrame(1, b"").serialize(), OPENED),
    "padding": alike(DataFrame(1, b"", pad_length=255, flags=["PADDED"]).serialize(), OPENED),
    "unknown": alike(b"\x00\x00\x01\xbe\x00\x00\x00\x00\x00x"),
    "resets": resets,
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_ends_its_connection_and_no_other(proxy: HostileProxy, kind: str) -> None:
    await served(proxy)
    before = proxy.resident_bytes()
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(greeted(proxy)) for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            floods = [group.create_task(is_ended(stream, FLOODS[kind]()), name="flood") for stream in streams]
            group.create_task(served(proxy), name="served")
    assert [flood.result() for flood in floods] == [True] * 3
    await served(proxy)
    assert proxy.resident_bytes() - before < 32 * MIB


async def test_header_bombs(proxy: HostileProxy) -> None:
    """Each would become 40 MB of fields: a field of 4000 bytes, named again by one byte each time."""
    remembered = Encoder().encode([("x", "v" * 4000)], huffman=False)
    bombs = [
        HeadersFrame(1, BLOCK + remembered + b"\xbe" * 10_000, flags=["END_HEADERS"]).serialize(),
        # The same with the field left behind by a request before it.
        HeadersFrame(1, BLOCK + remembered, flags=["END_HEADERS"]).serialize()
        + HeadersFrame(3, BLOCK + b"\xbe" * 10_000, flags=["END_HEADERS"]).serialize(),
        # Long and in several frames.
        HeadersFrame(1, BLOCK).serialize()
        + b"".join(ContinuationFrame(1, remembered * 30).serialize() for _ in range(4)),
    ]
    before = proxy.resident_bytes()
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(greeted(proxy)) for _ in range(30)]
        ended = await asyncio.gather(
            *(is_ended(stream, iter([bombs[index % 3]])) for index, stream in enumerate(streams))
        )
        assert all(ended)
        await served(proxy)
    assert proxy.resident_bytes() - before < 32 * MIB


async def test_header_blocks_that_never_end(proxy: HostileProxy) -> None:
    """As much of a block as is taken, and more than that: a hundred clients could keep 800 MiB otherwise."""
    junk = bytes(120_000)
    taken = HeadersFrame(1, bytes(60_000)).serialize()
    before = proxy.resident_bytes()
    async with contextlib.AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(greeted(proxy)) for _ in range(50)]
        for _, writer in waiting:
            writer.write(taken)
            await writer.drain()
        flooding = [await stack.enter_async_context(greeted(proxy)) for _ in range(50)]
        more = [
            HeadersFrame(1, junk).serialize(),
            *(ContinuationFrame(1, junk).serialize() for _ in range(20)),
        ]
        assert all(await asyncio.gather(*(is_ended(stream, iter(more)) for stream in flooding)))
        await served(proxy)
        assert proxy.resident_bytes() - before < 40 * MIB
        assert not any(reader.at_eof() for reader, _ in waiting)


async def test_a_head_of_many_small_fields_is_refused_alone(proxy: HostileProxy) -> None:
    async with greeted_client(proxy) as client:
        many = [*HEAD, *(("a", "") for _ in range(1500))]
        status, fields, _, is_complete = await client.ask(many, b"content", within_s=PATIENCE_S)
        assert (status, fields.get("sealgate-error"), is_complete) == ("400", "bad-message", True)
        status, *_ = await client.ask(
            [*HEAD, *((f"x-{n}", "") for n in range(900))], b"content", within_s=PATIENCE_S
        )
        assert status == "200"


@contextlib.asynccontextmanager
async def greeted_client(proxy: HostileProxy) -> AsyncIterator[Http2Client]:
    trust = ssl.create_default_context(cafile=proxy.address.ca_file)
    trust.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.address.reverse_port, ssl=trust, server_hostname="127.0.0.1"
    )
    try:
        yield Http2Client((reader, writer))
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_compressed_bombs_are_never_decoded(proxy: HostileProxy, coding: str, tmp_path: Path) -> None:
    """What is uploaded comes back as it was; what a service sends for an object or a list is refused."""
    address = proxy.address
    packed = tmp_path / "packed"
    packed.write_bytes(bomb(coding))
    await served(proxy)
    before = proxy.resident_bytes("VmHWM")
    trust = ("--http2", "--cacert", address.ca_file)
    mine = f"https://127.0.0.1:{address.reverse_port}/packed-{coding}"
    put = await curl(
        *trust, "-H", f"Content-Encoding: {coding}", "-T", str(packed), mine, timeout_s=PATIENCE_S
    )
    assert put.status == 200, put.error
    got = await curl(*trust, mine, timeout_s=PATIENCE_S)
    assert got.body == bomb(coding)
    assert got.headers["content-encoding"] == coding
    theirs = await curl(
        *trust, f"https://127.0.0.1:{address.reverse_port}/bomb/{coding}", timeout_s=PATIENCE_S
    )
    assert theirs.code == "not-sealed"
    listed = await curl(
        *trust, "-X", "PROPFIND", f"https://127.0.0.1:{address.dav_port}/{coding}", timeout_s=PATIENCE_S
    )
    assert listed.code == "service-answer"
    # The service is in the same process, and makes its bomb of a sixteenth of the whole.
    assert proxy.resident_bytes("VmHWM") - before < BOMB_BYTES // 4
