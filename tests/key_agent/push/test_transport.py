"""HTTPS to a proxy: who is spoken to, who is believed, and what becomes of answers that are none."""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from key_agent.push.transport import HttpsTransport, PushError
from key_agent.registry.model import Proxy
from runtime.clock import SystemClock
from runtime.tls import server_context
from tests.fakes.proxies import FakeProxy, FakeProxyServer, pem
from tests.fakes.resolver import silent_name_servers
from tests.key_agent.conftest import until
from tests.key_agent.push.serving import AUTHORITY, served, session_answer
from tests.pki import Tenant, issue_server, make_server_ca, write_credential


async def test_a_session_and_a_push_over_one_connection(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        session = await transport.open_session(proxy)
        assert len(session.challenge or b"") == 16
        assert [str(held.owner) for held in session.services] == ["acme/s3"]
        answers = await transport.send(proxy, ["not.an.envelope.at.all"])
        assert [(answer.accepted, answer.code) for answer in answers] == [(False, "malformed")]
        assert server.connections == 1
        certificate = (tmp_path / "tls.pem").read_text()
        der = ssl.PEM_cert_to_DER_cert(certificate)
        assert set(server.clients) == {sha256(der).digest()}


async def test_asking_who_is_there_uses_the_open_connection(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        session = await transport.open_session(proxy)
        for _ in range(3):
            assert (await transport.presence(proxy)).instance == session.instance == server.proxy.instance
        assert server.connections == 1


async def test_a_question_that_hangs_leaves_a_connection_to_refresh_and_withdrawal(
    tmp_path: Path, acme: Tenant
) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.proxy.hanging = True
        hanging = [
            asyncio.create_task(transport.presence(proxy)),
            asyncio.create_task(transport.send(proxy, ["a"])),
        ]
        await until(lambda: server.connections == 2)
        server.proxy.hanging = False
        async with asyncio.timeout(5):
            await transport.send(proxy, ["b"])
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_connection_that_the_proxy_closed_is_replaced(tmp_path: Path, acme: Tenant) -> None:
    files = write_credential(issue_server(AUTHORITY), tmp_path, "server")
    tls = write_credential(acme.agent_tls("hq"), tmp_path, "tls")
    server = FakeProxyServer(FakeProxy(id="p1", clock=SystemClock(), signers={}))
    async with HttpsTransport(agent_id="hq", certificate_file=tls[0], key_file=tls[1]) as transport:
        context = server_context(*files, client_roots=[acme.root.certificate])
        async with server.serving(context):
            proxy = Proxy(id="p1", url=server.url, ca_pem=pem(AUTHORITY.certificate))
            await transport.open_session(proxy)
        with pytest.raises(PushError) as caught:
            await transport.open_session(proxy)
        assert caught.value.code == "unreachable"
        async with server.serving(context, port=server.port):
            await transport.open_session(proxy)


async def test_a_proxy_of_another_name_is_refused(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (_, transport, proxy):
        with pytest.raises(PushError) as caught:
            await transport.open_session(replace(proxy, id="p2"))
        assert caught.value.code == "wrong-proxy"


async def test_another_authority_or_host_name_is_refused(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme, name="proxy.example") as (_, transport, proxy):
        with pytest.raises(PushError) as caught:
            await transport.open_session(proxy)
        assert caught.value.code == "tls"
    (tmp_path / "other").mkdir()
    async with served(tmp_path / "other", acme) as (server, transport, proxy):
        with pytest.raises(PushError) as caught:
            await transport.open_session(replace(proxy, ca_pem=pem(make_server_ca().certificate)))
        assert caught.value.code == "tls"
        assert server.proxy.sessions == 0


async def test_tls_1_2_is_refused(tmp_path: Path, acme: Tenant) -> None:
    def old(context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    async with served(tmp_path, acme, change=old) as (server, transport, proxy):
        with pytest.raises(PushError):
            await transport.open_session(proxy)
        assert server.connections == 0


async def test_without_our_certificate_there_is_no_session(
    tmp_path: Path, acme: Tenant, globex: Tenant
) -> None:
    async with served(tmp_path, acme) as (server, _, proxy):
        foreign = write_credential(globex.agent_tls("hq"), tmp_path, "foreign")
        async with HttpsTransport(
            agent_id="hq", certificate_file=foreign[0], key_file=foreign[1]
        ) as transport:
            with pytest.raises(PushError):
                await transport.open_session(proxy)
        assert server.proxy.sessions == 0


async def test_unusable_files_are_a_push_error_that_names_no_secret(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (_, _, proxy):
        gone = tmp_path / "gone.pem"
        async with HttpsTransport(agent_id="hq", certificate_file=gone, key_file=gone) as transport:
            with pytest.raises(PushError) as caught:
                await transport.open_session(proxy)
        assert caught.value.code == "tls"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (session_answer(challenge="AAAA"), "bad-answer"),
        (session_answer(challenge="!" * 22), "bad-answer"),
        (session_answer(time_ms="soon"), "bad-answer"),
        (session_answer(services=[{"service": "no slash", "certificate_sha256": "00"}]), "bad-answer"),
        ({"challenge": "x"}, "bad-answer"),
        (["p1"], "bad-answer"),
    ],
)
async def test_sessions_that_are_none(tmp_path: Path, acme: Tenant, answer: Any, code: str) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = web.json_response(answer)
        with pytest.raises(PushError) as caught:
            await transport.open_session(proxy)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (lambda: web.json_response({"receipts": []}), "bad-answer"),
        (lambda: web.json_response({"receipts": [{"status": "perhaps"}]}), "bad-answer"),
        (lambda: web.Response(text="<html>"), "bad-answer"),
        (lambda: web.Response(status=302, headers={"Location": "https://evil.example/"}), "http-302"),
        (lambda: web.Response(status=500, text="oops"), "http-500"),
        (
            lambda: web.json_response(
                {"code": "unknown-agent", "detail": "no"}, status=403, content_type="application/problem+json"
            ),
            "unknown-agent",
        ),
        (lambda: web.Response(body=bytes(17 << 20)), "bad-answer"),
    ],
)
async def test_receipts_that_are_none(
    tmp_path: Path, acme: Tenant, response: Callable[[], web.Response], code: str
) -> None:
    async with served(tmp_path, acme) as (server, transport, proxy):
        server.fault = response()
        with pytest.raises(PushError) as caught:
            await transport.send(proxy, ["a.b.c.d.e"])
        assert caught.value.code == code


async def test_nobody_listens(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (_, transport, proxy):
        nowhere = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = nowhere.sockets[0].getsockname()[1]
        nowhere.close()
        await nowhere.wait_closed()
        with pytest.raises(PushError) as caught:
            await transport.open_session(replace(proxy, url=f"https://localhost:{port}"))
        assert caught.value.code == "unreachable"


async def test_a_changed_address_is_used_from_the_next_request_on(tmp_path: Path, acme: Tenant) -> None:
    (tmp_path / "two").mkdir()
    async with (
        served(tmp_path, acme) as (one, transport, proxy),
        served(tmp_path / "two", acme) as (two, _, moved),
    ):
        await transport.open_session(proxy)
        await transport.open_session(moved)
        assert (one.proxy.sessions, two.proxy.sessions) == (1, 1)


async def test_a_request_whose_connection_is_let_go_under_it_has_failed_and_ends_no_task(
    tmp_path: Path, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a withdrawal that waits for a name while the own certificate is renewed is never tried again."""
    asked = silent_name_servers(monkeypatch)
    async with served(tmp_path, acme) as (_, transport, proxy):
        far = replace(proxy, id="p2", url="https://far.example:1")
        waiting = [asyncio.create_task(transport.open_session(far)) for _ in range(2)]
        await asked.wait()
        waiting[0].cancel()  # one that is to end does
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        for name in ("tls.pem", "tls.key"):
            (tmp_path / name).unlink()
        write_credential(acme.agent_tls("hq"), tmp_path, "tls")
        renewed = asyncio.create_task(transport.open_session(proxy))
        done, _pending = await asyncio.wait([waiting[1]], timeout=30)
        renewed.cancel()  # it waits for the name of its own
        assert done, "it still waits"
        assert not waiting[1].cancelled()
        assert isinstance(error := waiting[1].exception(), PushError)
        assert error.code == "unreachable"


async def test_a_kept_connection_that_is_reset_under_a_request_is_replaced(
    tmp_path: Path, acme: Tenant
) -> None:
    """A load balancer that has forgotten the connection answers the first packet with RST."""
    context = server_context(
        *write_credential(issue_server(AUTHORITY), tmp_path, "server"), client_roots=[acme.root.certificate]
    )
    tls = write_credential(acme.agent_tls("hq"), tmp_path, "tls")
    body = json.dumps(session_answer()).encode()
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        requests = 0
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                requests += 1
                if requests == 2:
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    break
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server, HttpsTransport(agent_id="hq", certificate_file=tls[0], key_file=tls[1]) as transport:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        proxy = Proxy(id="p1", url=url, ca_pem=pem(AUTHORITY.certificate))
        await transport.open_session(proxy)
        await transport.open_session(proxy)
        assert connections == 2


async def test_a_kept_connection_is_probed_while_it_is_silent(tmp_path: Path, acme: Tenant) -> None:
    async with served(tmp_path, acme) as (_, transport, proxy):
        await transport.open_session(proxy)
        [client] = transport._clients.values()
        assert client.connector is not None
        [pool] = client.connector._conns.values()
        assert pool[0][0].transport is not None
        raw = pool[0][0].transport.get_extra_info("socket")
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
