"""The engine's life: listeners come and go, stopping cuts or lets end, memory stays where it is."""

import asyncio
import contextlib
import dataclasses
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog.testing

from envelope.errors import MisuseError
from proxy.tenants.model import Listen, ServiceEntry
from tests import pki
from tests.fakes.origin import End, Exchange, RecordingOrigin, Reply
from tests.integration.proxy_rig import Rig, proxy, until
from tests.ports import free_port

BODY = os.urandom(100_000)


@dataclass(frozen=True, slots=True)
class World:
    rig: Rig
    origin: RecordingOrigin
    service: ServiceEntry


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server"))
    async with RecordingOrigin(tls).listening() as origin, proxy(tmp_path, ca_file) as rig:
        rig.tenant("acme")
        service = rig.service("acme/files", f"https://localhost:{origin.port}")
        rig.push(service.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        yield World(rig, origin, service)


@contextlib.asynccontextmanager
async def upload(
    world: World, *, length: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A PUT of *length* bytes whose head has reached the service, and none of its body's end."""
    trust = ssl.create_default_context(cafile=world.rig.tenants["acme"].interception_ca.certificate_file)
    assert world.service.reverse_listen is not None
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", world.service.reverse_listen.port, ssl=trust, server_hostname="127.0.0.1"
    )
    try:
        writer.write(f"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode() + BODY)
        await writer.drain()
        await world.origin.until(lambda: world.origin.exchanges and world.origin.exchanges[-1].body)
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_it_is_started_once_and_only_when_prepared(world: World, tmp_path: Path) -> None:
    with pytest.raises(MisuseError):
        await world.rig.engine.start(world.rig.picture())
    other = tmp_path / "other"
    other.mkdir()
    async with proxy(other, None) as rig:
        with pytest.raises(MisuseError):
            await rig.engine.start(rig.picture())
        with pytest.raises(MisuseError):
            await rig.engine.apply(rig.picture())


def udp_sockets() -> str:
    return Path("/proc/net/udp").read_text() + Path("/proc/net/udp6").read_text()


async def test_no_udp_port_is_opened(world: World) -> None:
    listening = udp_sockets()
    for listen in (world.service.reverse_listen, world.rig.tenants["acme"].forward_listen):
        assert listen is not None
        assert f":{listen.port:04X} " not in listening
    assert len(world.rig.engine.listening()) == 2


async def test_listeners_come_and_go_while_others_serve(world: World) -> None:
    rig = world.rig
    async with upload(world, length=2 * len(BODY)) as (reader, writer):
        second = rig.service("acme/second", f"https://localhost:{world.origin.port + 1}")
        await rig.engine.apply(rig.picture())
        assert rig.engine.problems == []
        assert (await rig.ask(second, "/x")).code == "upstream-failed"
        del rig.services[second.owner]
        await rig.engine.apply(rig.picture())
        assert (await rig.ask(second, "/x")).exit_code == 7
        writer.write(BODY)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
    assert rig.open_independently(world.service.owner, bytes(world.origin.exchanges[0].body)) == BODY + BODY


async def test_what_is_removed_is_cut(world: World) -> None:
    async with upload(world, length=2 * len(BODY)) as (reader, _writer):
        del world.rig.services[world.service.owner]
        await world.rig.engine.apply(world.rig.picture())
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
    await world.origin.until(lambda: world.origin.exchanges[0].end is not End.OPEN)
    assert world.origin.exchanges[0].end is End.CUT


async def test_one_bad_entry_takes_nobody_else_down(world: World) -> None:
    rig = world.rig
    squatter = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    taken = squatter.sockets[0].getsockname()[1]
    second = rig.service("acme/second", f"https://localhost:{world.origin.port + 1}")
    rig.services[second.owner] = dataclasses.replace(second, reverse_listen=Listen("127.0.0.1", taken))
    third = rig.service("acme/third", f"https://localhost:{world.origin.port + 2}", profile="absent")
    beta = rig.tenant("beta")
    beta.interception_ca.key_file.chmod(0o644)
    await rig.engine.apply(rig.picture())
    problems = " ".join(rig.engine.problems)
    for part in (str(taken), "absent", "chmod"):
        assert part in problems
    with structlog.testing.capture_logs() as told:
        await rig.engine.apply(rig.picture())
    assert [line for line in told if line["event"] == "not served"] == [], "each problem is told once"
    assert (await rig.ask(world.service, "/x", "-T", "-", body=BODY)).status == 200
    assert (await rig.ask(third, "/x")).exit_code == 7
    squatter.close()
    await squatter.wait_closed()
    beta.interception_ca.key_file.chmod(0o600)
    del rig.services[third.owner]
    await rig.engine.apply(rig.picture())
    assert rig.engine.problems == []


async def test_an_unknown_profile_in_forward_mode_is_refused(world: World) -> None:
    other = world.rig.service("acme/other", f"https://localhost:{world.origin.port + 1}", profile="absent")
    await world.rig.engine.apply(world.rig.picture())
    got = await world.rig.ask(other, "/x", "-T", "-", mode="forward", body=BODY)
    assert (got.status, got.code) == (502, "internal")
    assert world.origin.exchanges == []


async def test_a_body_in_flight_may_end_within_the_grace(world: World) -> None:
    async with upload(world, length=2 * len(BODY)) as (reader, writer):
        stopping = asyncio.create_task(world.rig.engine.stop(grace_s=30))
        await until(lambda: world.rig.engine.listening() == [])
        writer.write(BODY)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
        await asyncio.wait_for(stopping, 30)
    assert world.origin.exchanges[0].end is End.COMPLETE
    assert (await world.rig.ask(world.service, "/x")).exit_code == 7


async def test_what_outlasts_the_grace_has_no_proper_end(world: World) -> None:
    async with upload(world, length=2 * len(BODY)) as (reader, _writer):
        await asyncio.wait_for(world.rig.engine.stop(grace_s=0.1), 30)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
    await world.origin.until(lambda: world.origin.exchanges[0].end is not End.OPEN)
    assert world.origin.exchanges[0].end is End.CUT
    assert any('"request-refused"' in line for line in world.rig.audit_lines())


async def test_an_idle_client_does_not_hold_up_the_end(world: World) -> None:
    trust = ssl.create_default_context(cafile=world.rig.tenants["acme"].interception_ca.certificate_file)
    assert world.service.reverse_listen is not None
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", world.service.reverse_listen.port, ssl=trust, server_hostname="127.0.0.1"
    )
    writer.write(b"OPTIONS /x HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b" 200 " in await reader.readline()
    await asyncio.wait_for(world.rig.engine.stop(grace_s=60), 30)
    await asyncio.wait_for(reader.read(), 30)
    writer.close()


async def test_it_starts_again_after_it_was_stopped(world: World) -> None:
    await world.rig.engine.stop(grace_s=0)
    await world.rig.engine.start(world.rig.picture())
    assert (await world.rig.ask(world.service, "/x", "-T", "-", body=BODY)).status == 200


async def test_the_gauge_of_requests_in_flight_returns_to_none(world: World) -> None:
    async with upload(world, length=2 * len(BODY)):
        assert world.rig.metric("sealgate_active_requests") == 1
    await world.rig.ask(world.service, "/x", "--http2", "-T", "-", body=BODY)
    await world.rig.ask(world.service, "/x", "-X", "PATCH")
    await until(lambda: world.rig.metric("sealgate_active_requests") == 0)
    labels = {"tenant": "acme", "service": "files"}
    assert world.rig.metric("sealgate_requests_total", plan="seal", outcome="ok", **labels) == 1
    assert world.rig.metric("sealgate_requests_total", plan="refuse", outcome="partial-write", **labels) == 1


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_memory_does_not_grow_with_the_body(tmp_path: Path, version: str) -> None:
    size = 192 << 20
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, tmp_path, "server-ca")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*pki.write_credential(pki.issue_server(ca, ["localhost"]), tmp_path, "server"))
    port, seen = free_port(), 0

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The recording origin keeps what it gets; this one counts, slowly at first.
        nonlocal seen
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.2)
        while not (await reader.read(1 << 20)).endswith(b"0\r\n\r\n"):
            seen += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(size)
    origin = await asyncio.start_server(swallow, "localhost", port, ssl=tls)
    try:
        async with proxy(tmp_path, ca_file) as rig:
            rig.tenant("acme")
            service = rig.service("acme/files", f"https://localhost:{port}")
            rig.push(service.owner)
            await rig.engine.prepare()
            await rig.engine.start(rig.picture())
            before = resident_bytes()
            peak = before
            chunked = (
                ["-H", "Transfer-Encoding: chunked"] if version == "--http1.1" else ["-H", "Content-Length:"]
            )
            asked = asyncio.create_task(rig.ask(service, "/x", version, "-T", str(big), *chunked))
            while not asked.done():
                peak = max(peak, resident_bytes())
                await asyncio.sleep(0.02)
            assert asked.result().status == 200, asked.result()
            assert peak - before < 64 << 20
    finally:
        origin.close()
        await origin.wait_closed()
    assert seen > 100


async def test_a_slow_reader_of_a_big_object_costs_no_memory(world: World) -> None:
    plain = os.urandom(1 << 20)
    await world.rig.ask(world.service, "/x", "-T", "-", body=plain)
    stored = bytes(world.origin.exchanges[-1].body)

    def reply(_exchange: Exchange) -> Reply:
        return Reply(pieces=[stored], framing="chunked")

    world.origin.reply = reply
    before = resident_bytes()
    answers = await asyncio.gather(
        *(world.rig.ask(world.service, "/x", "--limit-rate", "4M") for _ in range(8))
    )
    assert all(answer.body == plain for answer in answers)
    assert resident_bytes() - before < 96 << 20
