"""Two agents over real TLS: who is let in, who is spoken to, and what a bad peer can do (nothing)."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from certs.pki import Credential
from envelope.certificates import Role
from envelope.errors import SealgateError
from key_agent.environments.peers import peer_transport
from key_agent.environments.peers.peer_api import (
    AT_ONCE_PER_AGENT,
    LOOK_AT_FILES_S,
    PeerCall,
    PeerRoute,
    Refusal,
    keep_current,
    listening,
    make_api,
)
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError, PeerTransport, allowed_s
from key_agent.environments.peers.peer_trust import PeerTrust
from key_agent.environments.peers.peers import Peers
from key_agent.environments.shared.documents import Delta, Kind, SharedRow, encode_delta
from key_agent.push.revocations import Revocations
from runtime.tls import ServerTls, server_context
from tests.environments.fault_proxy import Fault, FaultProxy
from tests.fakes.clock import ManualClock
from tests.fakes.resolver import silent_name_servers
from tests.key_agent.conftest import until
from tests.pki import Tenant, write_certificate, write_credential


class Echoed(msgspec.Struct):
    caller: str
    size: int


class StaleError(SealgateError):
    """One that the server turns into an answer."""


REFUSALS: dict[type[SealgateError], Refusal] = {StaleError: (409, "stale_term", "Ask for the rest.")}


class Side:
    """One agent's files and what it can do with them."""

    def __init__(self, directory: Path, tenant: Tenant, agent_id: str, *, serves: bool = True) -> None:
        self.agent_id = agent_id
        self.tenant = tenant
        self.directory = directory / f"{tenant.name}-{agent_id}"
        self.directory.mkdir()
        self.credential = tenant.agent_tls(agent_id, hostnames=["localhost"] if serves else ())
        self.files = write_credential(self.credential, self.directory, "tls")
        self.clock = ManualClock()
        self.revocations: Revocations | None = None

    @property
    def trust(self) -> PeerTrust:
        return PeerTrust(
            tenant=self.tenant.name,
            root=self.tenant.root.certificate,
            revocations=self.revocations,
            clock=self.clock,
        )

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[PeerTransport]:
        made = PeerTransport(trust=self.trust, certificate_file=self.files[0], key_file=self.files[1])
        try:
            yield made
        finally:
            await made.close()

    @asynccontextmanager
    async def serving(
        self, *more: PeerRoute, members: tuple[str, ...] = ("a",), body_timeout_s: float = 30
    ) -> AsyncIterator[PeerAddress]:
        async def echo(call: PeerCall) -> bytes:
            return msgspec.json.encode(Echoed(call.agent_id, len(call.body)))

        async def stale(call: PeerCall) -> bytes:
            raise StaleError("term 1 is over")

        routes = [
            PeerRoute("POST", "/v1/env/echo", echo, limit_bytes=1 << 20),
            PeerRoute("POST", "/v1/env/stale", stale),
            PeerRoute("GET", "/v1/env/anyone", echo, members_only=False),
            *more,
        ]
        api = make_api(
            routes,
            trust=self.trust,
            is_member=members.__contains__,
            refusals=REFUSALS,
            body_timeout_s=body_timeout_s,
        )
        context = server_context(*self.files, client_roots=[self.tenant.root.certificate])
        async with listening(api, host="127.0.0.1", port=0, ssl_context=context) as port:
            yield PeerAddress(f"https://127.0.0.1:{port}", self.agent_id)


@pytest.fixture
def make_side(tmp_path: Path) -> Callable[..., Side]:
    def make(tenant: Tenant, agent_id: str, *, serves: bool = True) -> Side:
        return Side(tmp_path, tenant, agent_id, serves=serves)

    return make


async def test_a_member_is_answered_and_known_by_its_certificate(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving() as peer, a.transport() as transport:
        body = b"x" * 300_000
        answer = await transport.request(peer, "POST", "/v1/env/echo", body, timeout_s=10)
        assert msgspec.json.decode(answer, type=Echoed) == Echoed("a", 300_000)
        found = await transport.call(peer, "GET", "/v1/env/anyone", None, Echoed, timeout_s=10)
        assert found.caller == "a"


async def test_an_agent_that_is_no_member_may_only_ask_what_anyone_may(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    c, b = make_side(acme, "c", serves=False), make_side(acme, "b")
    async with b.serving() as peer, c.transport() as transport:
        found = await transport.call(peer, "GET", "/v1/env/anyone", None, Echoed, timeout_s=10)
        assert found.caller == "c"
        with pytest.raises(PeerError, match="not-a-member") as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "not-a-member"
        assert not refused.value.is_silence


async def test_a_load_balancers_companion_is_no_member_though_it_has_a_members_name(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    """And an agent is no companion: a breached one would confirm its own return."""

    async def whose(call: PeerCall) -> bytes:
        return msgspec.json.encode(Echoed(call.agent_id, 0))

    both = frozenset({Role.AGENT_TLS, Role.BALANCER})
    routes = (
        PeerRoute("GET", "/v1/env/rows", whose, members_only=False, roles=both),
        PeerRoute("POST", "/v1/env/confirm", whose, members_only=False, roles=frozenset({Role.BALANCER})),
    )
    agent, companion, b = make_side(acme, "a"), make_side(acme, "a-2"), make_side(acme, "b")
    companion.files = write_credential(acme.balancer("a"), companion.directory, "balancer")
    async with b.serving(*routes) as peer, agent.transport() as one, companion.transport() as other:
        for allowed, transport, method, path in (
            (True, one, "POST", "/v1/env/echo"),
            (True, one, "GET", "/v1/env/anyone"),
            (True, one, "GET", "/v1/env/rows"),
            (False, one, "POST", "/v1/env/confirm"),
            (False, other, "POST", "/v1/env/echo"),
            (False, other, "GET", "/v1/env/anyone"),
            (True, other, "GET", "/v1/env/rows"),
            (True, other, "POST", "/v1/env/confirm"),
        ):
            body = b"" if method == "POST" else None
            if allowed:
                content = await transport.request(peer, method, path, body, timeout_s=10)
                assert msgspec.json.decode(content, type=Echoed).caller == "a"
            else:
                with pytest.raises(PeerError) as refused:
                    await transport.request(peer, method, path, body, timeout_s=10)
                assert refused.value.code == "identity", path


async def test_nothing_is_sent_to_another_agent_than_meant(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    """An agent of the tenant at the address of another one: its certificate is good, its name is not."""
    a, b, heard = make_side(acme, "a"), make_side(acme, "b"), list[str]()

    async def listen(call: PeerCall) -> bytes:
        heard.append(call.agent_id)
        return b"{}"

    async with b.serving(PeerRoute("POST", "/v1/env/heard", listen)) as peer, a.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(
                PeerAddress(peer.url, "c"), "POST", "/v1/env/heard", b"secret", timeout_s=10
            )
        assert refused.value.code == "tls"
        assert "not agent c" in refused.value.detail
        assert heard == []
        await transport.request(peer, "POST", "/v1/env/heard", b"secret", timeout_s=10)
        assert heard == ["a"]


def test_the_same_on_the_loop_that_agents_run_on(acme: Tenant, make_side: Callable[..., Side]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_nothing_is_sent_to_another_agent_than_meant(acme, make_side))


async def test_another_tenants_agents_are_strangers(
    acme: Tenant, globex: Tenant, make_side: Callable[..., Side]
) -> None:
    a, other = make_side(acme, "a"), make_side(globex, "a")
    async with make_side(acme, "b").serving() as peer, other.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "tls"
    async with make_side(globex, "b").serving() as peer, a.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "tls"


@pytest.mark.parametrize("role", ["service", "signing"])
async def test_only_a_tls_identity_counts(
    acme: Tenant, make_side: Callable[..., Side], tmp_path: Path, role: str
) -> None:
    """A signing or service certificate of the same tenant opens no connection, or no request."""
    a, b = make_side(acme, "a"), make_side(acme, "b")
    credential = acme.agent_signing("a") if role == "signing" else acme.service("s3")
    a.files = write_credential(credential, a.directory, role)
    async with b.serving() as peer, a.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code in ("identity", "tls")


async def test_a_client_without_a_certificate_gets_no_answer(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    async with make_side(acme, "b").serving() as peer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        port = int(peer.url.rpartition(":")[2])
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(b"GET /v1/env/anyone HTTP/1.1\r\nHost: b\r\n\r\n")
            assert await reader.read() == b""
            writer.close()


def _revocation_list(root: Credential, clock: ManualClock, *revoked: x509.Certificate) -> bytes:
    now = datetime.fromtimestamp(clock.wall_s(), UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(now)
        .next_update(now + timedelta(hours=1))
    )
    for certificate in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(now)
            .build()
        )
    from cryptography.hazmat.primitives.serialization import Encoding

    return builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _revoking(side: Side, root: Credential, *revoked: x509.Certificate) -> Callable[[x509.Certificate], None]:
    """Give *side* a list of what is taken back; what takes back one more, a second later."""
    file = side.directory / "crl.pem"
    file.write_bytes(_revocation_list(root, side.clock, *revoked))
    side.revocations = revocations = Revocations(file, root.certificate)

    def take_back(certificate: x509.Certificate) -> None:
        side.clock.shift(1)
        file.write_bytes(_revocation_list(root, side.clock, *revoked, certificate))
        assert revocations.refresh()

    return take_back


async def test_a_certificate_taken_back_counts_on_an_open_connection(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    take_back = _revoking(b, acme.root)
    async with b.serving() as peer, a.transport() as transport:
        await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        take_back(a.credential.certificate)
        with pytest.raises(PeerError, match="revoked") as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "identity"


async def test_a_revoked_server_is_not_spoken_to(acme: Tenant, make_side: Callable[..., Side]) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    _revoking(a, acme.root, b.credential.certificate)
    async with b.serving() as peer, a.transport() as transport:
        with pytest.raises(PeerError, match="revoked") as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "tls"


async def test_a_server_that_is_taken_back_is_not_spoken_to_on_an_open_connection(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    take_back = _revoking(a, acme.root)
    async with b.serving() as peer, a.transport() as transport:
        await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        take_back(b.credential.certificate)
        for _ in range(2):
            with pytest.raises(PeerError, match="revoked") as refused:
                await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
            assert refused.value.code == "tls"


async def test_when_the_revocation_list_has_ended_nobody_is_spoken_to(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    _revoking(a, acme.root)
    async with b.serving() as peer, a.transport() as transport:
        await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        a.clock.shift(3601)
        with pytest.raises(PeerError, match="ended") as refused:
            await transport.request(peer, "POST", "/v1/env/echo", b"", timeout_s=10)
        assert refused.value.code == "tls"


async def test_refusals_keep_their_code(acme: Tenant, make_side: Callable[..., Side]) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving() as peer, a.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/stale", b"", timeout_s=10)
        assert (refused.value.code, refused.value.detail) == ("stale_term", "term 1 is over")
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/echo", bytes((1 << 20) + 1), timeout_s=10)
        assert refused.value.code == "too-large"
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "POST", "/v1/env/nowhere", b"", timeout_s=10)
        assert refused.value.code == "not-found"


async def test_answers_are_bounded_and_parsed_strictly(acme: Tenant, make_side: Callable[..., Side]) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")

    async def large(call: PeerCall) -> bytes:
        return bytes(100_000)

    async def odd(call: PeerCall) -> bytes:
        return b'{"caller": 7}'

    routes = PeerRoute("GET", "/v1/env/large", large), PeerRoute("GET", "/v1/env/odd", odd)
    async with b.serving(*routes) as peer, a.transport() as transport:
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "GET", "/v1/env/large", timeout_s=10, limit_bytes=99_999)
        assert refused.value.code == "bad-answer"
        with pytest.raises(PeerError) as refused:
            await transport.call(peer, "GET", "/v1/env/odd", None, Echoed, timeout_s=10)
        assert refused.value.code == "bad-answer"


async def test_a_flood_of_one_agent_leaves_places_for_the_others(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    b, release, begun = make_side(acme, "b"), asyncio.Event(), asyncio.Semaphore(0)

    async def hang(call: PeerCall) -> bytes:
        begun.release()
        await release.wait()
        return b"{}"

    sides = [make_side(acme, "a"), make_side(acme, "c")]
    async with (
        b.serving(PeerRoute("GET", "/v1/env/hang", hang), members=("a", "c")) as peer,
        contextlib.AsyncExitStack() as stack,
        asyncio.TaskGroup() as group,
    ):
        # Several transports: each has a bound of its own too.
        loud = [await stack.enter_async_context(sides[0].transport()) for _ in range(AT_ONCE_PER_AGENT)]
        for one in loud:
            group.create_task(one.request(peer, "GET", "/v1/env/hang", timeout_s=60), name="flood")
            await begun.acquire()
        with pytest.raises(PeerError) as refused:
            await loud[0].request(peer, "GET", "/v1/env/anyone", timeout_s=10)
        assert refused.value.code == "busy"
        other = await stack.enter_async_context(sides[1].transport())
        await other.request(peer, "GET", "/v1/env/anyone", timeout_s=10)
        release.set()


async def test_a_body_that_does_not_come_is_not_waited_for(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving(body_timeout_s=0.05) as peer:
        context = b.trust.client_context(*a.files, agent_id="b")
        port = int(peer.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="b")
        writer.write(b"POST /v1/env/echo HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\nfive")
        head = await asyncio.wait_for(reader.readline(), 30)
        assert b" 408 " in head
        writer.close()


@pytest.mark.parametrize("fault", [Fault.BLACK_HOLE, Fault.HALF_OPEN])
async def test_a_silent_network_costs_the_deadline_and_no_more(
    acme: Tenant, make_side: Callable[..., Side], fault: Fault
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving() as peer, FaultProxy(int(peer.url.rpartition(":")[2])) as network:
        through = PeerAddress(f"https://127.0.0.1:{network.port}", "b")
        async with a.transport() as transport:
            await transport.request(through, "POST", "/v1/env/echo", b"", timeout_s=10)
            network.inject(fault)
            with pytest.raises(PeerError) as refused:
                await transport.request(through, "POST", "/v1/env/echo", b"", timeout_s=0.2)
            assert refused.value.code == "timeout"
            assert refused.value.is_silence
            network.inject(Fault.NONE)
            await transport.request(through, "POST", "/v1/env/echo", b"", timeout_s=10)


async def test_a_connection_that_was_reset_is_replaced_at_once(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving() as peer, FaultProxy(int(peer.url.rpartition(":")[2])) as network:
        through = PeerAddress(f"https://127.0.0.1:{network.port}", "b")
        async with a.transport() as transport:
            for _ in range(3):
                await transport.request(through, "POST", "/v1/env/echo", b"", timeout_s=10)
                await network.reset_connections()
        assert network.connections == 3


async def test_nobody_there_is_told_at_once(acme: Tenant, make_side: Callable[..., Side]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        peer = PeerAddress(f"https://127.0.0.1:{unused.getsockname()[1]}", "b")
        async with make_side(acme, "a").transport() as transport:
            with pytest.raises(PeerError) as refused:
                await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=10)
            assert refused.value.code == "unreachable"
            assert refused.value.is_silence


async def test_a_renewed_certificate_is_used_without_a_restart(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving(members=("z",)) as peer, a.transport() as transport:
        found = await transport.call(peer, "GET", "/v1/env/anyone", None, Echoed, timeout_s=10)
        assert found.caller == "a"
        for file in a.files:
            file.unlink()
        write_credential(acme.agent_tls("z"), a.directory, "tls")
        found = await transport.call(peer, "GET", "/v1/env/anyone", None, Echoed, timeout_s=10)
        assert found.caller == "z"
        write_certificate(acme.root.certificate, a.files[0])  # not the key's
        with pytest.raises(PeerError, match="own certificate"):
            await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=10)


async def test_a_request_whose_connection_is_let_go_under_it_has_failed_and_ends_no_task(
    acme: Tenant, make_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one finds the renewed certificate while this one waits for a name that no server resolves."""
    asked = silent_name_servers(monkeypatch)
    a, b = make_side(acme, "a"), make_side(acme, "b")
    async with b.serving() as peer, a.transport() as transport:
        far = PeerAddress("https://b.example:1", "b")
        waiting = [
            asyncio.create_task(transport.request(far, "GET", "/", timeout_s=30)),
            asyncio.create_task(transport.request(far, "GET", "/", timeout_s=30)),
        ]
        await asked.wait()
        waiting[0].cancel()  # one that is to end does
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        for file in a.files:
            file.unlink()
        write_credential(acme.agent_tls("a"), a.directory, "tls")
        await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=10)
        done, _ = await asyncio.wait([waiting[1]], timeout=10)
        assert done, "it still waits"
        assert not waiting[1].cancelled()
        assert isinstance(error := waiting[1].exception(), PeerError)
        assert error.code == "unreachable"


async def test_peers_are_shown_a_renewed_certificate_without_a_restart(
    acme: Tenant, make_side: Callable[..., Side]
) -> None:
    a, b = (
        make_side(acme, "a"),
        make_side(acme, "b", serves=False),
    )  # cannot be a TLS server: no purpose of one
    roots = [acme.root.certificate]
    tls = ServerTls(*b.files, client_roots=roots)
    api = make_api([], trust=b.trust, is_member="a".__eq__, refusals={})

    async def refusal() -> PeerError:
        async with a.transport() as transport:
            with pytest.raises(PeerError) as refused:
                await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=30)
        return refused.value

    async with listening(api, host="127.0.0.1", port=0, ssl_context=tls.context) as port:
        peer = PeerAddress(f"https://127.0.0.1:{port}", "b")
        following = asyncio.create_task(keep_current(tls, *b.files, client_roots=roots, clock=b.clock))
        try:
            await b.clock.wait_for_sleepers(1)
            assert (await refusal()).code == "tls"
            for file in b.files:
                file.unlink()
            write_credential(acme.agent_tls("b", hostnames=["localhost"]), b.directory, "tls")
            await b.clock.advance(LOOK_AT_FILES_S)
            assert (await refusal()).code == "not-found"
            write_certificate(acme.root.certificate, b.files[0])  # not the key's: the old goes on
            await b.clock.advance(LOOK_AT_FILES_S)
            assert (await refusal()).code == "not-found"
        finally:
            following.cancel()
            await asyncio.wait([following])


class Skipping:
    """The event loop's time, which a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real, self._ahead_s = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead_s)

    def skip(self, seconds: float) -> None:
        self._ahead_s += seconds


@asynccontextmanager
async def slow_server(
    side: Side, content: bytes, steps: "asyncio.Queue[int]", *, status: int = 200
) -> AsyncIterator[PeerAddress]:
    """Answers with as much more of *content* as *steps* says, again and again."""

    open_ones: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {status} -\r\nContent-Length: {len(content)}\r\n\r\n".encode())
            sent = 0
            while sent < len(content):
                more = await steps.get()
                writer.write(content[sent : sent + more])
                await writer.drain()
                sent += more
            await reader.read()
        writer.close()

    context = server_context(*side.files, client_roots=[side.tenant.root.certificate])
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield PeerAddress(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", side.agent_id)
    finally:
        server.close()
        for writer in open_ones:
            writer.transport.abort()
        await server.wait_closed()


async def test_an_answer_without_a_bottom_is_a_bad_one(acme: Tenant, make_side: Callable[..., Side]) -> None:
    """A breached agent's: it must not end the tasks of whoever asks it."""
    a, b = make_side(acme, "a"), make_side(acme, "b")
    deep = b'{"x":' + b"[" * 60_000
    for status, code in ((200, "bad-answer"), (500, "http-500")):
        steps: asyncio.Queue[int] = asyncio.Queue()
        steps.put_nowait(len(deep))
        async with slow_server(b, deep, steps, status=status) as peer, a.transport() as transport:
            with pytest.raises(PeerError) as refused:
                await transport.call(peer, "GET", "/v1/env/anyone", None, Echoed, timeout_s=20)
            assert refused.value.code == code


def many_rows() -> bytes:
    """A delta of 20,000 rows, as an agent answers it."""
    rows = tuple(
        SharedRow(
            kind=Kind.DEK,
            id=f"{number:032x}",
            term=1,
            epoch=1,
            signer="b",
            body="x" * 400,
            signature="ab" * 64,
        )
        for number in range(20_000)
    )
    return encode_delta(
        Delta(tenant="acme", term=1, epoch_from=0, epoch_to=1, rows=rows, digest="00", signer="b")
    )


async def test_many_rows_may_take_as_long_as_they_come(
    acme: Tenant, make_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 rows over a connection that needs a minute, with 20 s for what is small."""
    a, b = make_side(acme, "a"), make_side(acme, "b")
    content, steps = many_rows(), asyncio.Queue[int]()
    half = len(content) // 2
    received = [0]

    def noting(here: int, **times: float) -> float:
        received.append(here)
        return allowed_s(here, **times)

    monkeypatch.setattr(peer_transport, "allowed_s", noting)
    async with slow_server(b, content, steps) as peer, a.transport() as transport:
        clock = Skipping(monkeypatch)
        peers = Peers(transport, address=lambda _name: peer, timeout_s=20)
        asking = asyncio.create_task(peers.since("b", 0, at_most_s=150))
        steps.put_nowait(half)
        await until(lambda: received[-1] >= half)
        clock.skip(40)
        await until(lambda: not asking.done())
        steps.put_nowait(len(content))
        delta = await asking
        assert len(delta.rows) == 20_000


@pytest.mark.parametrize(
    ("step", "skipped_s"),
    [pytest.param(1000, 25, id="dribbles"), pytest.param(8_000_000, 160, id="takes-more-than-all-may")],
)
async def test_who_dribbles_is_cut_off(
    acme: Tenant,
    make_side: Callable[..., Side],
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: int,
    skipped_s: float,
) -> None:
    a, b = make_side(acme, "a"), make_side(acme, "b")
    content, steps = many_rows(), asyncio.Queue[int]()
    received = [0]

    def noting(here: int, **times: float) -> float:
        received.append(here)
        return allowed_s(here, **times)

    monkeypatch.setattr(peer_transport, "allowed_s", noting)
    async with slow_server(b, content, steps) as peer, a.transport() as transport:
        clock = Skipping(monkeypatch)
        peers = Peers(transport, address=lambda _name: peer, timeout_s=20)
        asking = asyncio.create_task(peers.since("b", 0, at_most_s=150))
        steps.put_nowait(step)
        await until(lambda: received[-1] >= step)
        clock.skip(skipped_s)
        with pytest.raises(PeerError) as refused:
            await asking
        assert refused.value.code == "timeout"


async def test_an_answer_that_is_not_taken_keeps_its_place_and_ends(
    acme: Tenant, make_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for much and reads nothing has its own places only, and no more memory than those."""
    a, b = make_side(acme, "a"), make_side(acme, "b")

    async def much(_call: PeerCall) -> bytes:
        return bytes(32 << 20)

    async with (
        b.serving(PeerRoute("GET", "/v1/env/much", much)) as peer,
        a.transport() as transport,
        contextlib.AsyncExitStack() as open_ones,
    ):
        context = a.trust.client_context(*a.files, agent_id="b")
        port = int(peer.url.rpartition(":")[2])
        readers: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        for _ in range(AT_ONCE_PER_AGENT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1024)
            open_ones.callback(writer.transport.abort)
            writer.write(b"GET /v1/env/much HTTP/1.1\r\nHost: b\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            readers.append((reader, writer))
        with pytest.raises(PeerError) as refused:
            await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=30)
        assert refused.value.code == "busy"
        Skipping(monkeypatch).skip(200)
        for reader, _ in readers:
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 20):
                    pass
        answer = await transport.request(peer, "GET", "/v1/env/anyone", timeout_s=30)
        assert msgspec.json.decode(answer, type=Echoed).caller == "a"
