"""The listeners: places, TLS as AWS KMS asks for it, client certificates, renewal, and how they stop."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.pki import Credential, certify, name
from envelope.certificates import key_usage
from proxy.encryption_service.http_connection import HttpConnection
from proxy.encryption_service.http_server import TICK_S, ServiceServer
from proxy.encryption_service.kept_bodies import KeptBodies
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.settings import EncryptionServiceSettings, HttpLimits, ListenSettings
from runtime.clock import Clock, SystemClock
from runtime.tls import TlsError
from tests.fakes.clock import ManualClock
from tests.pki import (
    issue_server,
    make_server_ca,
    with_unknown_string,
    write_certificate,
    write_credential,
)
from tests.proxy.encryption_service.echo import Client, Echo, request

SUBJECT = "cks.kms.eu-central-1.amazonaws.com"


@asynccontextmanager
async def serve(
    *listen: ListenSettings,
    clock: Clock | None = None,
    limits: HttpLimits | None = None,
    echo: Echo | None = None,
) -> AsyncIterator[ServiceServer]:
    echo = echo or Echo()
    server = ServiceServer(
        EncryptionServiceSettings(listen=listen, limits=limits or HttpLimits()),
        {echo.name: echo},
        metrics=ServiceMetrics(),
        clock=clock or SystemClock(),
    )
    async with server.serving(grace_s=0):
        try:
            yield server
        finally:
            Client.close_all()


def plain(port: int = 0) -> ListenSettings:
    return ListenSettings(host="127.0.0.1", port=port, plain=True, dialects=(DialectName.TRANSIT,))


class Pki:
    """A server's files, and clients of a CA."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = make_server_ca("servers")
        self.clients = make_server_ca("clients")
        self.certificate, self.key = write_credential(issue_server(self.ca), directory, "server")
        self.ca_file = write_certificate(self.ca.certificate, directory / "ca.pem")
        self.roots = write_certificate(self.clients.certificate, directory / "clients.pem")

    def listen(self, *, roots: bool = False, subject: str | None = None) -> ListenSettings:
        return ListenSettings(
            host="127.0.0.1",
            port=0,
            dialects=(DialectName.TRANSIT,),
            certificate_file=self.certificate,
            key_file=self.key,
            client_roots_file=self.roots if roots else None,
            client_subject=subject,
        )

    def context(self, client: Credential | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file)
        if client is not None:
            stem = os.urandom(4).hex()
            context.load_cert_chain(*write_credential(client, self.directory, stem))
        return context


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def issue_client(ca: Credential, subject: str) -> Credential:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        key.public_key(),
        subject=name(subject),
        issuer=ca,
        validity=timedelta(days=1),
        extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (key_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
            (x509.SubjectAlternativeName([x509.DNSName(subject)]), False),
        ],
    )
    return Credential(key, certificate)


async def secure(server: ServiceServer, context: ssl.SSLContext) -> Client:
    return await Client.connect(server.listeners[0].port, ssl=context, server_hostname="localhost")


def served_certificate(client: Client) -> bytes:
    certificate: bytes = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - whatever is waited for, it has no event
            await asyncio.sleep(0.001)


# ---- TLS


@pytest.mark.parametrize(
    ("version", "ciphers", "works"),
    [
        (ssl.TLSVersion.TLSv1_3, None, True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-GCM-SHA384", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305", False),
        (ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384", False),
        (ssl.TLSVersion.TLSv1_1, "DEFAULT:@SECLEVEL=0", False),
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_the_suites_of_tls_are_those_aws_kms_asks_for(
    pki: Pki, version: ssl.TLSVersion, ciphers: str | None, works: bool
) -> None:
    context = pki.context()
    context.minimum_version = context.maximum_version = version
    if ciphers:
        context.set_ciphers(ciphers)
    async with serve(pki.listen()) as server:
        if works:
            client = await secure(server, context)
            reply = await client.ask("/e/echo", b"over TLS" * 10_000)
            assert reply.body == b"over TLS" * 10_000
            assert client.writer.get_extra_info("ssl_object").version() == version.name.replace("_", ".")
        else:
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                await secure(server, context)
            await until(lambda: server._metrics.refused_connections == 1)


async def test_a_client_certificate_is_demanded_verified_and_of_the_right_subject(pki: Pki) -> None:
    echo = Echo()
    right = issue_client(pki.clients, SUBJECT)
    odd = issue_client(pki.clients, SUBJECT)
    # One by one what must not come in: none, another CA's, another subject's, an unreadable, a server's.
    for client in [
        None,
        issue_client(pki.ca, SUBJECT),
        issue_client(pki.clients, "cks.kms.us-east-1.amazonaws.com"),
        Credential(odd.key, with_unknown_string(odd.certificate, pki.clients)),
        issue_server(pki.clients, [SUBJECT]),
    ]:
        async with serve(pki.listen(roots=True, subject=SUBJECT), echo=echo) as server:
            heard = b""
            with contextlib.suppress(ssl.SSLError, ConnectionResetError, BrokenPipeError):
                connection = await secure(server, pki.context(client))
                await connection.send(request("/e/echo", b"x"))
                heard = await connection.ended()
            assert heard in {b"", b"<reset>"}  # no HTTP answer
            metrics = server._metrics
            await until(lambda: metrics.refused_connections == 1)  # noqa: B023 - awaited here
    assert echo.calls == []
    async with serve(pki.listen(roots=True, subject=SUBJECT), echo=echo) as server:
        connection = await secure(server, pki.context(right))
        assert (await connection.ask("/e/echo", b"x")).body == b"x"
        der = echo.calls[0].peer.certificate_der
        assert der is not None
        assert x509.load_der_x509_certificate(der) == right.certificate
        assert echo.calls[0].scheme == "https"


async def test_a_changed_certificate_is_served_and_a_broken_one_is_told(pki: Pki) -> None:
    clock = ManualClock()
    async with serve(pki.listen(), clock=clock) as server:
        before = await secure(server, pki.context())
        fresh = issue_server(pki.ca)
        for file in (pki.certificate, pki.key):
            file.unlink()
        write_credential(fresh, pki.directory, "server")
        await clock.advance(2 * TICK_S)
        after = await secure(server, pki.context())
        assert served_certificate(before) != served_certificate(after)
        assert x509.load_der_x509_certificate(served_certificate(after)) == fresh.certificate
        assert (await before.ask("/e/echo")).status == 200  # who is here stays
        assert server.problems == []

        pki.certificate.write_bytes(b"not a certificate")
        await clock.advance(2 * TICK_S)
        (problem,) = server.problems
        assert str(pki.certificate) in problem
        still = await secure(server, pki.context())
        assert served_certificate(still) == served_certificate(after)


async def test_a_removed_client_root_lets_nobody_in_not_even_by_resumption(pki: Pki) -> None:
    clock = ManualClock()
    context = pki.context(issue_client(pki.clients, SUBJECT))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serve(pki.listen(roots=True), clock=clock) as server:
        client = await secure(server, context)
        await client.ask("/e/echo")
        session = client.writer.get_extra_info("ssl_object").session
        pki.roots.write_bytes(pki.ca_file.read_bytes())
        await clock.advance(2 * TICK_S)

        def resumed() -> bytes:
            with (
                socket.create_connection(("127.0.0.1", server.listeners[0].port)) as connection,
                context.wrap_socket(connection, server_hostname="localhost", session=session) as tls,
            ):
                tls.sendall(request("/e/echo"))
                return tls.recv(1)

        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.to_thread(resumed)


async def test_files_that_cannot_be_used_open_nothing(pki: Pki) -> None:
    pki.key.write_bytes(b"not a key")
    with pytest.raises(TlsError, match="not a certificate with its key"):
        async with serve(plain(), pki.listen()):
            pass


# ---- places


async def test_places_are_counted_before_a_word_is_said(pki: Pki) -> None:
    limits = HttpLimits(connections=5, connections_per_peer=3)
    async with serve(pki.listen(), limits=limits) as server:
        silent = [await Client.connect(server.listeners[0].port) for _ in range(3)]  # no handshake even
        await until(lambda: len(server.listeners[0]._places) == 3)
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            await secure(server, pki.context())
        silent.pop().close()
        await until(lambda: len(server.listeners[0]._places) == 2)
        assert (await (await secure(server, pki.context())).ask("/e/echo")).status == 200
    async with serve(plain(), limits=limits) as server:  # a terminator: five, all from one address
        clients = [await Client.connect(server.listeners[0].port) for _ in range(5)]
        assert [(await client.ask("/e/echo")).status for client in clients] == [200] * 5
        late = await Client.connect(server.listeners[0].port)
        assert await late.ended() in {b"", b"<reset>"}


async def test_a_burst_from_one_peer_gets_no_more_places_than_its_own(pki: Pki) -> None:
    """All are accepted in one go, before the task of the first has run."""
    async with serve(pki.listen(), limits=HttpLimits(connections_per_peer=2)) as server:
        listener = server.listeners[0]
        address = ("127.0.0.1", listener.port)
        burst = [socket.create_connection(address) for _ in range(9)]  # blocking: the loop stands still
        try:
            await until(lambda: len(listener._places) + server._metrics.refused_connections == 9)
            assert len(listener._places) == sum(listener._per_peer.values()) == 2
        finally:
            for one in burst:
                one.close()
        await until(lambda: not listener._places and not listener._per_peer)


async def test_bodies_of_strangers_are_bounded_all_together() -> None:
    async with serve(plain()) as server:
        site = server.listeners[0].site
        site.kept = KeptBodies(max_strangers_bytes=100_000)
        half = b"POST /e/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + bytes(60_000)
        first, second = [await Client.connect(server.listeners[0].port) for _ in range(2)]
        await first.send(half)
        await until(lambda: site.kept.total_bytes == 60_000)
        await second.send(half)
        assert (await second.reply()).status == 503
        assert (await (await Client.connect(server.listeners[0].port)).ask("/e/echo")).status == 200
        await first.send(bytes(30_000))
        assert (await first.reply()).status == 200
        second.close()
        await until(lambda: site.kept.total_bytes == 0)


def test_on_the_loop_of_the_program_an_open_connection_keeps_its_place(pki: Pki) -> None:
    """uvloop returns its TLS layer where asyncio returns our protocol; the place must last all the same."""

    async def places_end_with_connections() -> None:
        async with serve(pki.listen(), limits=HttpLimits(connections_per_peer=2)) as server:
            listener = server.listeners[0]
            open_ones = [await secure(server, pki.context()) for _ in range(2)]
            assert [(await client.ask("/e/echo")).status for client in open_ones] == [200, 200]
            assert len(listener._places) == sum(listener._per_peer.values()) == 2
            with pytest.raises((ConnectionResetError, ssl.SSLError)):
                await secure(server, pki.context())
            assert server._metrics.refused_connections == 1
            open_ones.pop().close()
            await until(lambda: len(listener._places) == 1)
            assert (await (await secure(server, pki.context())).ask("/e/echo")).status == 200

    uvloop.run(places_end_with_connections())


async def test_a_handshake_that_stands_still_gives_its_place_back(pki: Pki) -> None:
    async with serve(pki.listen(), limits=HttpLimits(handshake_s=0.1)) as server:
        silent = await Client.connect(server.listeners[0].port)
        assert await silent.ended() in {b"", b"<reset>"}
        await until(lambda: not server.listeners[0]._places)
        assert server._metrics.refused_connections == 1


async def test_two_processes_may_share_a_port_only_if_both_say_so() -> None:
    echo = Echo()

    def sharing(port: int, *, reuse: bool) -> ServiceServer:
        settings = EncryptionServiceSettings(listen=(plain(port),))
        return ServiceServer(
            settings, {echo.name: echo}, metrics=ServiceMetrics(), clock=SystemClock(), reuse_port=reuse
        )

    async with sharing(0, reuse=True).serving() as (port,):
        async with sharing(port, reuse=True).serving() as (same,):
            assert same == port
        with pytest.raises(OSError, match="Address already in use") as caught:
            sharing(port, reuse=False).open()
        assert caught.value.filename == f"127.0.0.1:{port}"


# ---- stopping


async def test_stopping_ends_what_is_idle_at_once_and_what_is_under_way_in_time() -> None:
    echo = Echo()
    async with serve(plain(), echo=echo) as server:
        port = server.listeners[0].port
        idle, busy, stuck = [await Client.connect(port) for _ in range(3)]
        await idle.ask("/e/echo")
        await busy.send(request("/e/wait", b"under way"))
        await stuck.send(b"POST /e/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        await until(lambda: len(echo.calls) == 2)
        await until(
            lambda: all(
                isinstance(one, HttpConnection) and not one._reader.buffered_bytes
                for one in server.listeners[0].site.connections
            )
        )
        stopping = asyncio.create_task(server.stop(grace_s=1))
        assert await idle.ended() == b""
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(port)
        echo.go_on.set()
        last = await busy.reply()
        assert (last.body, last.headers["connection"]) == (b"under way", "close")
        assert await busy.ended() == b""
        assert await stuck.ended() in {b"", b"<reset>"}
        await stopping
