"""Every wait for a client has an end, and no honest one is ended by it: the phases, then real connections."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from math import inf
from typing import Any

import pytest

from proxy import gate
from proxy.gate.deadlines import Deadlines, Phase
from proxy.limits import ClientLimits
from tests.fakes.origin import End, RecordingOrigin, Reply
from tests.proxy.gate.harness import CANARY, Http1Client, Pki, Rig, Script, invert, running

pytestmark = pytest.mark.usefixtures("guarded")

LIMITS = ClientLimits(handshake_s=10, head_s=20, keep_alive_s=50, idle_s=100)


class Connection:
    """A connection whose time stands still unless it is told."""

    def __init__(self) -> None:
        self.time_s = 1000.0
        self.is_busy = False
        self.deadlines = Deadlines(
            LIMITS, is_busy=lambda: self.is_busy, expired=lambda _: False, now_s=lambda: self.time_s
        )

    def after(self, seconds: float) -> tuple[Phase, float]:
        """Phase, and seconds until its end, *seconds* later."""
        self.time_s += seconds
        phase, end_s = self.deadlines.phase()
        return phase, end_s - self.time_s


def test_a_handshake_gets_no_time_by_moving() -> None:
    connection = Connection()
    for second in range(10):
        connection.deadlines.register_activity()
        assert connection.after(0) == (Phase.HANDSHAKE, 10 - second)
        connection.time_s += 1
    connection.deadlines.opened()
    assert connection.after(0) == (Phase.QUIET, 50)
    connection.deadlines.opens()  # CONNECT was answered: another one inside
    assert connection.after(3) == (Phase.HANDSHAKE, 7)


def test_a_head_gets_no_time_by_moving() -> None:
    connection = Connection()
    connection.deadlines.opened()
    connection.time_s += 45
    connection.deadlines.head_begins()
    assert connection.after(15) == (Phase.HEAD, 5)
    connection.deadlines.head_begins()
    connection.deadlines.register_activity()
    assert connection.after(0) == (Phase.HEAD, 5)
    connection.deadlines.requested()
    assert connection.after(0) == (Phase.QUIET, 50)


def test_a_first_request_in_the_clear_needs_no_handshake() -> None:
    connection = Connection()
    connection.deadlines.head_begins()
    assert connection.after(0) == (Phase.HEAD, 20)
    connection.deadlines.requested()
    connection.is_busy = True
    assert connection.after(0) == (Phase.BUSY, 100)


def test_quiet_is_from_the_end_of_the_last_request() -> None:
    connection = Connection()
    connection.deadlines.requested()
    connection.is_busy = True
    assert connection.after(80)[0] is Phase.BUSY
    connection.is_busy = False
    assert connection.after(10) == (Phase.QUIET, 50)
    connection.deadlines.register_activity()  # a PING, say
    assert connection.after(20) == (Phase.QUIET, 30)
    connection.deadlines.requested()
    assert connection.after(5) == (Phase.QUIET, 50), "one came and went between two looks"


def test_what_moves_goes_on() -> None:
    connection = Connection()
    connection.deadlines.requested()
    connection.is_busy = True
    for _ in range(50):
        assert connection.after(99) == (Phase.BUSY, 1)
        connection.deadlines.register_activity()
    with connection.deadlines.disarm():
        assert connection.after(1000) == (Phase.BUSY, inf)
    assert connection.after(0) == (Phase.BUSY, 100)


def test_a_tunnel_is_no_quiet_connection() -> None:
    connection = Connection()
    connection.deadlines.tunnelled()
    assert connection.after(60) == (Phase.TUNNEL, 40)
    connection.deadlines.register_activity()
    assert connection.after(0) == (Phase.TUNNEL, 100)


# ---- real connections

SHORT_S = 0.4
LONG_S = 60.0


def limits(
    *,
    handshake_s: float = LONG_S,
    head_s: float = LONG_S,
    keep_alive_s: float = LONG_S,
    idle_s: float = LONG_S,
    **places: int,
) -> ClientLimits:
    return ClientLimits(
        handshake_s=handshake_s, head_s=head_s, keep_alive_s=keep_alive_s, idle_s=idle_s, **places
    )


@contextlib.asynccontextmanager
async def limited(
    pki: Pki, wanted: ClientLimits, script: Script | None = None, **how: Any
) -> AsyncIterator[tuple[Rig, gate.Clients]]:
    async with running(pki, script or Script(), **how) as rig:
        clients = gate.Clients(wanted)
        gate.limit(rig.master, clients)
        yield rig, clients


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Byte by byte, for as long as it is taken."""
    with contextlib.suppress(OSError):
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await writer.drain()
            await asyncio.sleep(SHORT_S / 10)


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the proxy closes."""
    got = b""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(20):
            while data := await reader.read(1 << 16):
                got += data
    return got


async def is_served(rig: Rig) -> bool:
    return (await rig.put()).is_success


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600)


@pytest.mark.parametrize(
    "sent", [b"", HELLO[:1], HELLO[:2], HELLO], ids=["nothing", "a byte", "two bytes", "byte by byte"]
)
async def test_a_handshake_that_never_ends(pki: Pki, sent: bytes) -> None:
    async with limited(pki, limits(handshake_s=SHORT_S)) as (rig, clients):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        async with asyncio.TaskGroup() as group:
            group.create_task(drip(writer, sent), name="drip")
            assert await end_of(reader) == b""
            writer.transport.abort()
        assert clients.expired == {Phase.HANDSHAKE: 1}
        assert await is_served(rig)
        await rig.tidy()


async def test_a_handshake_that_comes_byte_by_byte_and_ends(pki: Pki) -> None:
    """mitmproxy takes one or two bytes of it for HTTP."""
    async with limited(pki, limits()) as (rig, _clients):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = pki.client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        is_done = False
        while not is_done:
            try:
                tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                pass
            for byte in outgoing.read():
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            if not is_done:
                incoming.write(await asyncio.wait_for(reader.read(1 << 16), 20))
        tls.write(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        writer.write(outgoing.read())
        await rig.origin.until(lambda: rig.origin.exchanges)
        writer.transport.abort()


async def test_a_head_that_never_ends(pki: Pki) -> None:
    async with limited(pki, limits(head_s=SHORT_S)) as (rig, clients), rig.http1_client() as client:
        assert (await client.exchange("GET", pieces=None)).is_success
        async with asyncio.TaskGroup() as group:
            group.create_task(drip(client.writer, b"PUT /x HTTP/1.1\r\nX-A: " + b"a" * 500), name="drip")
            assert await end_of(client.reader) == b""
            client.leave()
        assert clients.expired == {Phase.HEAD: 1}
        assert await is_served(rig)
        await rig.tidy()


async def test_empty_lines_are_no_head(pki: Pki) -> None:
    async with limited(pki, limits(head_s=SHORT_S)) as (rig, clients), rig.http1_client() as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(drip(client.writer, b"\r\n" * 200), name="drip")
            await end_of(client.reader)
            client.leave()
        assert clients.expired[Phase.HEAD] <= 1
        assert rig.origin.exchanges == []
        await rig.tidy()


@pytest.mark.parametrize("protocol", ["h1", "h2"])
async def test_a_quiet_connection_is_closed_properly(pki: Pki, protocol: str) -> None:
    """Over HTTP/2 whatever frames it sends."""
    ping = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00abcdefgh"
    async with limited(pki, limits(keep_alive_s=SHORT_S), protocols=(protocol, "h1")) as (rig, clients):
        assert await is_served(rig)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", rig.port, ssl=pki.client_context(protocol)
        )
        if protocol == "h2":
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        async with asyncio.TaskGroup() as group:
            if protocol == "h2":
                group.create_task(drip(writer, ping * 20), name="pings")
            await end_of(reader)
            assert reader.exception() is None, "no reset"
            writer.transport.abort()
        assert clients.expired[Phase.QUIET] >= 1
        await rig.tidy()


async def test_a_slow_body_is_not_ended(pki: Pki) -> None:
    """Far longer than any limit, always moving: up and down."""
    pieces = [bytes([number]) * 10 for number in range(24)]

    async def slowly(_number: int) -> None:
        await asyncio.sleep(SHORT_S / 4)

    short = limits(handshake_s=SHORT_S, head_s=SHORT_S, keep_alive_s=SHORT_S, idle_s=4 * SHORT_S)
    async with limited(pki, short) as (rig, clients), rig.client() as client:
        assert isinstance(client, Http1Client)
        assert (await client.exchange("PUT", pieces=pieces, before=slowly)).is_success
        assert bytes(rig.origin.exchanges[-1].body) == b"".join(map(invert, pieces)) + b"END!"
        assert clients.expired == {}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_body_that_stands_still_is_cut_not_ended(pki: Pki, version: str) -> None:
    """An HTTP/1.0 client takes a FIN for the end of what it reads."""
    stalled = Reply(pieces=[b"first", b"never"], framing="close", stall_after=1)
    async with limited(pki, limits(idle_s=SHORT_S)) as (rig, clients):
        context = pki.client_context()
        rig.origin.reply = stalled
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, ssl=context)
        writer.write(f"GET /x HTTP/{version}\r\nHost: a\r\n\r\n".encode())
        got = await end_of(reader)
        writer.transport.abort()
        assert isinstance(reader.exception(), OSError), "it must not look like the end of the body"
        assert b"first" in got
        assert b"0\r\n\r\n" not in got
        assert clients.expired[Phase.BUSY] >= 1
        assert rig.script.codes == ["idle"]
        await rig.tidy()


async def test_an_upload_that_stands_still_is_cut(pki: Pki) -> None:
    async with limited(pki, limits(idle_s=SHORT_S)) as (rig, clients), rig.http1_client() as client:
        await client.send(b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + CANARY)
        await end_of(client.reader)
        assert clients.expired == {Phase.BUSY: 1}
        await rig.origin.until(lambda: [one.end for one in rig.origin.exchanges] == [End.CUT])
        assert not rig.origin.saw(CANARY)
        assert rig.script.codes == ["idle"]
        await rig.tidy()


@pytest.mark.parametrize("protocol", ["h1", "h2"])
async def test_a_service_that_does_not_answer_is_left(pki: Pki, protocol: str) -> None:
    """The client is told, and its connection goes on."""
    async with limited(pki, limits(idle_s=SHORT_S), protocols=(protocol, "h1")) as (rig, clients):
        rig.origin.reply = Reply(raw=b"", stall_after=0)
        async with rig.client() as client:
            answer = await client.exchange("PUT")
            assert (answer.status, answer.code) == (504, "idle")
            rig.origin.reply = Reply()
            assert (await client.exchange("PUT")).is_success
        assert clients.expired == {Phase.BUSY: 1}
        await rig.tidy()


async def test_a_reader_that_never_reads_is_cut(pki: Pki) -> None:
    async with limited(pki, limits(idle_s=SHORT_S)) as (rig, clients), rig.http1_client() as client:
        rig.origin.reply = Reply(pieces=[bytes(1 << 20)] * 64)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        await rig.origin.until(lambda: rig.origin.exchanges and rig.origin.open_connections == 0)
        assert clients.expired == {Phase.BUSY: 1}
        await rig.tidy()


async def test_a_tunnel_that_stands_still_is_cut(pki: Pki) -> None:
    def pass_through(data: Any) -> None:
        data.ignore_connection = True

    async with (
        RecordingOrigin(pki.origin_context()).listening() as origin,
        limited(
            pki,
            limits(idle_s=2 * SHORT_S, handshake_s=SHORT_S),
            Script(tls_clienthello=pass_through),
            mode="regular",
            origin=origin,
        ) as (rig, clients),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await writer.start_tls(ssl.create_default_context(cafile=pki.origin_ca), server_hostname="127.0.0.1")
        for _ in range(12):  # longer than a handshake may take
            writer.write(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"stored")
            await asyncio.sleep(SHORT_S / 4)
        await end_of(reader)
        writer.transport.abort()
        assert clients.expired == {Phase.TUNNEL: 1}
        await rig.tidy()


async def test_a_client_hello_without_an_end(pki: Pki) -> None:
    async with limited(pki, limits()) as (rig, _clients):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        begin = b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(0x4000 - 4)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 4 << 20:
                writer.write(begin if not sent else b"\x16\x03\x01\x40\x00" + bytes(0x4000))
                await writer.drain()
                sent += 0x4005
        await end_of(reader)
        writer.transport.abort()
        assert await is_served(rig)
        await rig.tidy()


# ---- places


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def test_more_than_a_peer_s_share_is_reset_and_nobody_else(pki: Pki) -> None:
    async with limited(pki, limits(connections_per_peer=2)) as (rig, clients), rig.client() as client:
        assert isinstance(client, Http1Client)
        assert (await client.exchange("PUT")).is_success
        second = await connect(rig.port)
        await rig.origin.until(lambda: len(clients.places) == 2)
        third = await connect(rig.port)
        assert await end_of(third[0]) == b""
        assert clients.places.refused == {gate.Refused.PEER: 1}
        assert (await client.exchange("PUT")).is_success
        for _, writer in (second, third):
            writer.transport.abort()


async def test_idle_connections_make_room_and_busy_ones_do_not(pki: Pki) -> None:
    async with limited(pki, limits(connections=3)) as (rig, clients), rig.client() as busy:
        assert isinstance(busy, Http1Client)
        await busy.send(b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(CANARY))
        await rig.origin.until(lambda: rig.origin.exchanges)
        idle = [await connect(rig.port) for _ in range(20)]
        assert await is_served(rig)
        assert clients.places.refused[gate.Refused.FULL] == 0
        assert clients.places.refused[gate.Refused.DISPLACED] >= 18
        assert len(clients.places) <= 3
        await busy.send(CANARY)
        await rig.origin.until(lambda: rig.origin.exchanges[0].end is End.COMPLETE)
        for _, writer in idle:
            writer.transport.abort()
        busy.leave()
        await rig.tidy()
        assert len(clients.places) == 0
