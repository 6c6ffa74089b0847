"""Attacks on whose a connection is: listeners that pass to another tenant, tunnels to what became managed."""

import asyncio
import dataclasses
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.tenants.model import Listen
from tests.integration.attack_rig import CANARY, Http2Client, Siege, answers, besieged

UPLOAD = b"PUT /x HTTP/1.1\r\nHost: localhost:%d\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    async with besieged(tmp_path) as siege:
        yield siege


def upload(siege: Siege) -> bytes:
    return UPLOAD % (siege.origin.port, len(CANARY)) + CANARY


async def test_a_connection_does_not_pass_to_another_tenant_with_its_listener(siege: Siege) -> None:
    """Same address, same service, another tenant: what acme's user goes on to send is not sealed for evil."""
    rig = siege.rig
    evil = rig.tenant("evil")
    foreign = rig.service("evil/files", str(siege.service.upstream))
    rig.push(foreign.owner)
    await rig.engine.apply(rig.picture())
    async with siege.forward() as forward, siege.reverse() as reverse:
        tunnel = await siege.connect(forward, f"localhost:{siege.origin.port}", server_name="localhost")
        for stream in (tunnel, reverse):
            assert (await answers(stream, upload(siege), within_s=1)).startswith(b"HTTP/1.1 200")
        count = len(siege.origin.exchanges)
        acme = rig.tenants["acme"]
        rig.tenants["evil"] = dataclasses.replace(evil, forward_listen=acme.forward_listen)
        rig.tenants["acme"] = dataclasses.replace(acme, forward_listen=evil.forward_listen)
        rig.services[foreign.owner] = dataclasses.replace(
            foreign, reverse_listen=siege.service.reverse_listen
        )
        rig.services[siege.owner] = dataclasses.replace(siege.service, reverse_listen=foreign.reverse_listen)
        await rig.engine.apply(rig.picture())
        for stream in (tunnel, reverse):
            assert await answers(stream, upload(siege)) == b""
    assert len(siege.origin.exchanges) == count
    assert rig.engine.problems == []


async def test_a_tunnel_ends_when_its_host_becomes_managed(siege: Siege) -> None:
    """What was passed through unread until now is from now on a way round the proxy."""
    rig, origin = siege.rig, siege.origin
    del rig.services[siege.owner]
    rig.tenants["acme"] = dataclasses.replace(rig.tenants["acme"], tunnel_hosts=frozenset({"localhost"}))
    await rig.engine.apply(rig.picture())
    async with siege.forward() as forward:
        reader, writer = await siege.connect(forward, f"localhost:{origin.port}")
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        await writer.start_tls(unverified, server_hostname="localhost")
        writer.write(b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nbefore")
        await origin.until(lambda: origin.saw(b"before"))
        await rig.engine.apply(rig.picture())  # nothing has changed
        writer.write(b"and after")
        await origin.until(lambda: origin.saw(b"and after"))
        rig.services[siege.owner] = siege.service
        await rig.engine.apply(rig.picture())
        assert await answers((reader, writer), CANARY) == b""
    assert not origin.saw(CANARY)


async def test_a_service_that_is_gone_is_refused_on_connections_that_live(siege: Siege) -> None:
    rig = siege.rig
    async with siege.forward() as forward:
        stream = await siege.connect(forward, f"localhost:{siege.origin.port}", server_name="localhost")
        assert (await answers(stream, upload(siege), within_s=1)).startswith(b"HTTP/1.1 200")
        count = len(siege.origin.exchanges)
        del rig.services[siege.owner]
        await rig.engine.apply(rig.picture())
        assert b"unmanaged-host" in await answers(stream, upload(siege), within_s=1)
    assert len(siege.origin.exchanges) == count


async def test_names_of_other_hosts_inside_a_managed_connection(siege: Siege) -> None:
    """HTTP/2 coalescing, absolute targets, CONNECT inside CONNECT, HTTP in the clear inside CONNECT."""
    target = f"localhost:{siege.origin.port}"
    for authority in (
        "evil.example",
        "localhost",
        "evil@localhost",
        f"localhost.:{siege.origin.port}1",
        "[::1]",
    ):
        async with siege.forward() as forward:
            stream = await siege.connect(forward, target, server_name="localhost", http2=True)
            pseudo = [(":method", "PUT"), (":scheme", "https"), (":authority", authority), (":path", "/x")]
            status, *_ = await Http2Client(stream).ask(pseudo, CANARY)
            assert status in ("421", "400", None), authority
    head = f"PUT {{}} HTTP/1.1\r\nHost: {{}}\r\nContent-Length: {len(CANARY)}\r\nConnection: close\r\n\r\n"
    for server_name in ("localhost", None):
        for wanted, host in (
            ("https://evil.example/x", target),
            ("/x", "evil.example"),
            (f"http://{target}/x", target),
            ("evil.example:443", target),
            ("/x", f"{target}@evil.example"),
            ("/x", f"evil.example, {target}"),
        ):
            if server_name is not None and wanted.startswith("http://"):
                continue  # names the host all the same
            async with siege.forward() as forward:
                stream = await siege.connect(forward, target, server_name=server_name)
                got = await answers(stream, head.format(wanted, host).encode() + CANARY, within_s=1)
                assert got.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400", b"HTTP/1.1 403")), (wanted, host)
        async with siege.forward() as forward:
            stream = await siege.connect(forward, target, server_name=server_name)
            got = await answers(
                stream, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode(), within_s=1
            )
            assert not got.startswith(b"HTTP/1.1 2")
    for wanted in (f"https://{target}/x", f"http://{target}/x", "/x"):  # without CONNECT
        async with siege.forward() as stream:
            got = await answers(stream, head.format(wanted, target).encode() + CANARY, within_s=1)
            assert got.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), wanted
    for wanted in (
        f"127.0.0.1:{siege.origin.port}",
        "localhost:22",
        f"localhost:{siege.origin.port}0",
        "evil.example:443",
    ):
        async with siege.forward() as stream:
            got = await answers(
                stream, f"CONNECT {wanted} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode(), within_s=1
            )
            assert got.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), wanted
    assert siege.origin.connections == 0


async def test_content_in_the_clear_is_taken_on_the_loopback_interface_only(siege: Siege) -> None:
    rig = siege.rig
    assert siege.service.reverse_listen is not None
    port = siege.service.reverse_listen.port

    async def clear() -> bytes:
        stream = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await answers(stream, upload(siege), within_s=1)
        finally:
            stream[1].transport.abort()

    assert (await clear()).startswith(b"HTTP/1.1 200")
    everywhere = dataclasses.replace(siege.service, reverse_listen=Listen("0.0.0.0", port))
    rig.services[siege.owner] = everywhere
    await rig.engine.apply(rig.picture())
    count = len(siege.origin.exchanges)
    got = await clear()
    assert got.startswith(b"HTTP/1.1 403")
    assert b"tls-required" in got
    assert len(siege.origin.exchanges) == count
    for mode in ("forward", "reverse"):
        assert (await rig.ask(everywhere, "/x", "-T", "-", mode=mode, body=CANARY)).status == 200
