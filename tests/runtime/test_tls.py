import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from certs.pki import Credential, key_pem
from runtime.tls import (
    ServerTls,
    TlsError,
    client_context,
    has_common_name,
    load_certificates,
    peer_certificate,
    server_context,
)
from tests.pki import (
    Tenant,
    issue_server,
    make_server_ca,
    make_tenant,
    new_key,
    of_unknown_version,
    with_unknown_string,
    write_certificate,
    write_credential,
)

DEADLINE_S = 60


class Site:
    """A server's files and a client's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = make_server_ca()
        self.ca_file = write_certificate(self.ca.certificate, directory / "ca.pem")
        self.certificate_file, self.key_file = write_credential(issue_server(self.ca), directory, "server")

    def client(self, credential: Credential | None = None, stem: str = "client") -> ssl.SSLContext:
        if credential is None:
            return client_context(self.ca_file)
        return client_context(self.ca_file, *write_credential(credential, self.directory, stem))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@asynccontextmanager
async def echo(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server that answers with the subject of the client's certificate, or "nobody"."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            certificate = peer_certificate(writer.transport)
            await reader.readexactly(1)
            writer.write(certificate.subject.rfc4514_string().encode() if certificate else b"nobody")
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def ask(port: int, context: ssl.SSLContext, name: str = "localhost") -> str:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        try:
            writer.write(b"?")
            answer = await reader.read()
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError
        return answer.decode()


async def test_one_sided(site: Site) -> None:
    async with echo(server_context(site.certificate_file, site.key_file)) as port:
        assert await ask(port, site.client()) == "nobody"


async def test_mutual(site: Site, acme: Tenant, globex: Tenant) -> None:
    roots = [acme.root.certificate, globex.root.certificate]
    async with echo(server_context(site.certificate_file, site.key_file, client_roots=roots)) as port:
        assert await ask(port, site.client(acme.agent_tls("hq"), "a")) == "O=acme,CN=hq agent-tls"
        assert await ask(port, site.client(globex.agent_tls("dr"), "b")) == "O=globex,CN=dr agent-tls"


async def refused(port: int, context: ssl.SSLContext, name: str = "localhost") -> bool:
    """In TLS 1.3 a client learns of its refusal with the first read."""
    try:
        await ask(port, context, name)
    except (ssl.SSLError, ConnectionError):
        return True
    return False


async def test_no_client_certificate(site: Site, acme: Tenant) -> None:
    context = server_context(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    async with echo(context) as port:
        assert await refused(port, site.client())


async def test_a_client_below_another_root(site: Site, acme: Tenant, globex: Tenant) -> None:
    context = server_context(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    async with echo(context) as port:
        assert await refused(port, site.client(globex.agent_tls(), "b"))
        assert await refused(port, site.client(make_tenant("acme").agent_tls(), "c"))
        assert not await refused(port, site.client(acme.agent_tls(), "a"))


async def test_no_roots_admit_nobody(site: Site, acme: Tenant) -> None:
    """A fresh proxy has no tenant yet: that must not open the door."""
    async with echo(server_context(site.certificate_file, site.key_file, client_roots=[])) as port:
        assert await refused(port, site.client())
        assert await refused(port, site.client(acme.agent_tls(), "a"))


async def test_a_server_the_client_does_not_know(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    async with echo(server_context(site.certificate_file, site.key_file)) as port:
        assert await refused(port, other.client())


async def test_a_server_of_another_name(site: Site) -> None:
    async with echo(server_context(site.certificate_file, site.key_file)) as port:
        assert await refused(port, site.client(), "proxy.example")
        assert not await refused(port, site.client(), "127.0.0.1")


async def test_tls_1_2_is_refused_by_both_sides(site: Site) -> None:
    old_client = site.client()
    old_client.minimum_version = ssl.TLSVersion.TLSv1_2
    old_client.maximum_version = ssl.TLSVersion.TLSv1_2
    async with echo(server_context(site.certificate_file, site.key_file)) as port:
        assert await refused(port, old_client)
    old_server = server_context(site.certificate_file, site.key_file)
    old_server.minimum_version = ssl.TLSVersion.TLSv1_2
    old_server.maximum_version = ssl.TLSVersion.TLSv1_2
    async with echo(old_server) as port:
        assert await refused(port, site.client())


async def test_mutual_sessions_are_not_resumed(site: Site, acme: Tenant) -> None:
    context = server_context(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    client = site.client(acme.agent_tls(), "a")
    async with echo(context) as port:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client, server_hostname="localhost"
        )
        writer.write(b"?")
        await reader.read()
        session = writer.get_extra_info("ssl_object").session
        assert session is None or not session.has_ticket
        writer.close()


# --- renewal


async def test_roots_come_and_go_while_serving(site: Site, acme: Tenant, globex: Tenant) -> None:
    tls = ServerTls(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    clients = [site.client(acme.agent_tls(), "a"), site.client(globex.agent_tls(), "b"), site.client()]
    async with echo(tls.context) as port:
        assert [await refused(port, client) for client in clients] == [False, True, True]
        tls.renew(client_roots=[globex.root.certificate])
        assert [await refused(port, client) for client in clients] == [True, False, True]
        tls.renew(client_roots=[])
        assert [await refused(port, client) for client in clients] == [True, True, True]


async def test_roots_hold_without_a_server_name_too(site: Site, acme: Tenant, globex: Tenant) -> None:
    """A client that connects to an address sends no server name; the same rule holds."""
    tls = ServerTls(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    ours, theirs = site.client(acme.agent_tls(), "a"), site.client(globex.agent_tls(), "b")
    async with echo(tls.context) as port:
        assert not await refused(port, ours, "127.0.0.1")
        assert await refused(port, theirs, "127.0.0.1")
        tls.renew(client_roots=[globex.root.certificate])
        assert await refused(port, ours, "127.0.0.1")
        assert not await refused(port, theirs, "127.0.0.1")


async def test_a_new_certificate_while_serving(site: Site) -> None:
    tls = ServerTls(site.certificate_file, site.key_file)
    async with echo(tls.context) as port:
        assert not await refused(port, site.client())
        for file in (site.certificate_file, site.key_file):
            file.unlink()
        renewed = issue_server(site.ca, ["renewed.example"])
        write_credential(renewed, site.directory, "server")
        assert await refused(port, site.client(), "renewed.example")
        tls.renew()
        assert not await refused(port, site.client(), "renewed.example")


async def test_a_failed_renewal_changes_nothing(site: Site, acme: Tenant) -> None:
    tls = ServerTls(site.certificate_file, site.key_file, client_roots=[acme.root.certificate])
    site.key_file.write_text("junk")
    with pytest.raises(TlsError):
        tls.renew(client_roots=[])
    with pytest.raises(TlsError, match="cannot change"):
        tls.renew()
    async with echo(tls.context) as port:
        assert not await refused(port, site.client(acme.agent_tls(), "a"))


# --- files


def test_files_that_cannot_be_used(site: Site, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    other = tmp_path / "other.key"
    other.write_bytes(key_pem(new_key()))
    for certificate_file, key_file, reason in (
        (missing, site.key_file, "missing.pem: no such file"),
        (site.certificate_file, missing, "missing.pem: no such file"),
        (junk, site.key_file, "not a certificate with its key"),
        (site.certificate_file, junk, "not a certificate with its key"),
        (site.certificate_file, other, "not a certificate with its key .*mismatch"),
    ):
        with pytest.raises(TlsError, match=reason) as caught:
            server_context(certificate_file, key_file)
        assert caught.value.next_step
        with pytest.raises(TlsError, match=reason):
            client_context(site.ca_file, certificate_file, key_file)
    for ca_file in (missing, junk, site.key_file):
        with pytest.raises(TlsError, match="no usable root certificate"):
            client_context(ca_file)
    with pytest.raises(TlsError, match="without its key"):
        client_context(site.ca_file, site.certificate_file)
    with pytest.raises(TlsError, match="without its key"):
        client_context(site.ca_file, None, site.key_file)


def test_a_protected_key_is_refused_and_nobody_is_asked(site: Site) -> None:
    key = serialization.load_pem_private_key(site.key_file.read_bytes(), None)
    site.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(TlsError, match="protected by a password"):
        server_context(site.certificate_file, site.key_file)


def test_certificates_in_a_file(site: Site, acme: Tenant, globex: Tenant) -> None:
    bundle = site.directory / "roots.pem"
    write_certificate(acme.root.certificate, bundle)
    with bundle.open("ab") as file:
        file.write(globex.root.certificate.public_bytes(serialization.Encoding.PEM))
    assert load_certificates(bundle) == [acme.root.certificate, globex.root.certificate]
    for path in (site.key_file, site.directory / "missing"):
        with pytest.raises(TlsError, match="no certificate"):
            load_certificates(path)


def test_a_client_is_known_by_its_one_common_name() -> None:
    authority = make_server_ca()
    certificate = issue_server(authority, ["here"]).certificate
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert has_common_name(der, "here")
    assert not has_common_name(der, "her")
    assert not has_common_name(der, "here, there")
    nameless = make_tenant("acme").service("drive").certificate.public_bytes(serialization.Encoding.DER)
    for none in (
        None,
        b"",
        b"no certificate",
        der[:-1],
        nameless,
        of_unknown_version(certificate, authority),
    ):
        assert not has_common_name(none, "here")
    odd = with_unknown_string(certificate, authority).public_bytes(serialization.Encoding.DER)
    assert not has_common_name(odd, "here")


def test_no_transport_no_certificate() -> None:
    assert peer_certificate(None) is None
    assert peer_certificate(asyncio.Transport()) is None
