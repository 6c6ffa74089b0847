"""Connections to a real push listener: too many are left alone, and nobody uses up another's."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import override

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.pki import Credential, certify
from proxy.api.connections import (
    CONNECTIONS_PER_AGENT,
    CONNECTIONS_PER_TENANT,
    HELD_AT_MOST,
    AgentConnections,
)
from proxy.tenants.model import Directory
from runtime.clock import SystemClock
from runtime.serve import make_application, serving
from runtime.tls import ServerTls, client_context
from tests.environments.site import until
from tests.pki import (
    issue_server,
    make_server_ca,
    of_unknown_version,
    with_unknown_string,
    write_certificate,
    write_credential,
)
from tests.proxy.keys.hosting import HostedTenant, agent_certified_by, directory_of, host_tenant


@dataclass
class Door:
    """The listener, and clients that come to it."""

    port: int
    path: Path
    ca_file: Path
    open: list[asyncio.StreamWriter] = field(default_factory=list)
    _known: dict[int, tuple[Credential, ssl.SSLContext]] = field(default_factory=dict)

    async def come(self, who: Credential, *, leaves_alone: bool = False) -> asyncio.StreamWriter | None:
        """A connection that stays; None if it is not answered while another one is."""
        _, context = self._known.get(id(who), (who, None))
        if context is None:
            files = write_credential(who, self.path, f"client-{len(self._known)}")
            context = client_context(self.ca_file, *files)
            self._known[id(who)] = who, context
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=context, server_hostname="localhost"
        )
        self.open.append(writer)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answered = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        # Who comes later and is let in shows that this one had its turn.
        if not leaves_alone:
            await answered
            return writer
        ended = asyncio.create_task(asyncio.sleep(0.5))
        await asyncio.wait([answered, ended], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if answered.done():
            return writer
        answered.cancel()
        return None


@asynccontextmanager
async def _door(path: Path, directory: Directory) -> AsyncIterator[Door]:
    ca = make_server_ca()
    files = write_credential(issue_server(ca), path, "push")
    roots = [tenant.root_certificate for tenant in directory.tenants.values()]
    tls = ServerTls(*files, client_roots=roots)
    admit = AgentConnections(lambda: directory, SystemClock()).admit
    async with serving(
        make_application(), host="127.0.0.1", port=0, ssl_context=tls.context, grace_s=0.1, admit=admit
    ) as port:
        door = Door(port, path, write_certificate(ca.certificate, path / "ca.pem"))
        try:
            yield door
        finally:
            for writer in door.open:
                writer.transport.abort()
            await asyncio.gather(*map(_closed, door.open))


async def _closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
def rival(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path, "rival")


async def test_one_agent_has_its_number_and_others_of_its_tenant_have_theirs(
    tmp_path: Path, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with _door(tmp_path, directory_of(acme, rival)) as door:
        greedy = acme.pki.agent_tls("greedy")
        for _ in range(CONNECTIONS_PER_AGENT):
            assert await door.come(greedy)
        assert await door.come(greedy, leaves_alone=True) is None
        assert await door.come(acme.pki.agent_tls("hq"))
        assert await door.come(rival.pki.agent_tls("greedy"))
        ended = door.open[0]
        ended.close()
        await _closed(ended)

        async def let_in() -> bool:
            return await door.come(greedy, leaves_alone=True) is not None

        await until(let_in, timeout_s=30)
        assert await door.come(greedy, leaves_alone=True) is None, "one place was free"


async def test_no_tenant_has_more_by_certifying_more_agents(
    tmp_path: Path, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with _door(tmp_path, directory_of(acme, rival)) as door:
        agents = CONNECTIONS_PER_TENANT // CONNECTIONS_PER_AGENT
        for number in range(agents):
            agent = rival.pki.agent_tls(f"agent-{number}")
            for _ in range(CONNECTIONS_PER_AGENT):
                assert await door.come(agent)
        assert await door.come(rival.pki.agent_tls("one-more"), leaves_alone=True) is None
        assert await door.come(acme.pki.agent_tls("hq"))


async def test_nobody_uses_up_the_connections_of_a_name_that_another_root_certified(
    tmp_path: Path, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with _door(tmp_path, directory_of(acme, rival)) as door:
        impostor = agent_certified_by(rival, "acme")
        for _ in range(CONNECTIONS_PER_TENANT):
            assert await door.come(impostor), "it is told at its request that it may not"
        assert await door.come(impostor, leaves_alone=True) is None
        assert await door.come(acme.pki.agent_tls("hq"))


async def test_a_certificate_that_only_openssl_reads_is_a_strangers(acme: HostedTenant) -> None:
    """A tenant's root can sign such: an error here would have its connections reset at once (rule 3)."""
    connections = AgentConnections(lambda: directory_of(acme), SystemClock())
    der = acme.tls.certificate.public_bytes(Encoding.DER)
    kinds = [der[:-1], of_unknown_version(acme.tls.certificate, acme.pki.root), _odd_and_refused(acme)]
    unreadable = [_Transport(kinds[number % len(kinds)]) for number in range(CONNECTIONS_PER_TENANT + 1)]
    ends = [connections.admit(transport) for transport in unreadable]
    assert [transport.is_paused for transport in unreadable] == [False] * CONNECTIONS_PER_TENANT + [True]
    last = _Transport(der)
    ends.append(connections.admit(last))
    assert not last.is_paused, "the agent's own are another matter"
    for end in ends:
        end()


def _odd_and_refused(acme: HostedTenant) -> bytes:
    """Of a subject that cannot be read, and with an extension that is critical and unknown."""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"")
    extensions = [
        (one.value, one.critical)
        for one in acme.tls.certificate.extensions
        if not isinstance(one.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier)
    ]
    certificate = certify(
        acme.tls.key.public_key(),
        subject=acme.tls.certificate.subject,
        issuer=acme.pki.root,
        validity=timedelta(days=1),
        extensions=[*extensions, (unknown, True)],
    )
    return with_unknown_string(certificate, acme.pki.root).public_bytes(Encoding.DER)


async def test_what_is_left_alone_is_bounded_and_ends(acme: HostedTenant) -> None:
    connections = AgentConnections(lambda: directory_of(acme), SystemClock())
    let_in = [_Transport() for _ in range(CONNECTIONS_PER_TENANT)]
    ends = [connections.admit(transport) for transport in let_in]
    assert not any(transport.is_paused or transport.is_reset for transport in let_in)
    held = [_Transport() for _ in range(HELD_AT_MOST)]
    held_ends = [connections.admit(transport) for transport in held]
    assert all(transport.is_paused and not transport.is_reset for transport in held)
    more = _Transport()
    connections.admit(more)()
    assert more.is_reset, "there is no room for more"
    held_ends[0]()
    again = _Transport()
    held_ends[0] = connections.admit(again)
    assert again.is_paused
    assert not again.is_reset
    for end in (*ends, *held_ends):
        end()
    last = _Transport()
    connections.admit(last)()
    assert not last.is_paused, "those that ended are forgotten"


class _Transport(asyncio.Transport):
    """One whose peer has shown *der*; None: no certificate."""

    is_paused = is_reset = False

    def __init__(self, der: bytes | None = None) -> None:
        super().__init__()
        self._der = der

    @override
    def get_extra_info(self, name: str, default: object = None) -> object:
        return self if name == "ssl_object" else default

    def getpeercert(self, *, binary_form: bool) -> bytes | None:
        assert binary_form
        return self._der

    @override
    def pause_reading(self) -> None:
        self.is_paused = True

    @override
    def abort(self) -> None:
        self.is_reset = True
