"""Requests of several users on one connection, as a proxy in front that pools its connections sends them.

Nobody's content is ever sealed under another tenant's key: each request is judged by what it shows, and a
connection stays one tenant's. By raw sockets, in the clear and over TLS, and through a HAProxy that reuses.
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.tenants.model import ServiceEntry
from proxy.users.model import Proof, UserAccess, parse_networks
from tests import pki
from tests.fakes.origin import RecordingOrigin
from tests.integration.attack_rig import Stream
from tests.integration.proxy_rig import Rig, curl, proxy
from tests.ports import free_port
from tests.proxy.users.test_identification import Authority
from tests.referees.tls_front import HAPROXY, ended, listening

PLAIN = b"whose content is it " * 20
KNOWN = UserAccess(requires=frozenset({Proof.CREDENTIALS}))


@dataclass
class Shared:
    """acme and globex, who keep their files at one service, share a listener."""

    rig: Rig
    origin: RecordingOrigin
    acme: ServiceEntry
    globex: ServiceEntry
    own_ca: Path
    passwords: dict[str, str]

    @property
    def port(self) -> int:
        listen = self.rig.tenants["acme"].forward_listen
        assert listen is not None
        return listen.port

    @property
    def target(self) -> str:
        return f"localhost:{self.origin.port}"

    def shown(self, user: str) -> str:
        """The field that shows who *user* (`tenant/name`) is; nobody shows nothing."""
        if not user:
            return ""
        pair = base64.b64encode(f"{user}:{self.passwords[user]}".encode()).decode()
        return f"Proxy-Authorization: Basic {pair}\r\n"

    def upload(self, user: str) -> bytes:
        head = f"PUT http://{self.target}/file HTTP/1.1\r\nHost: {self.target}\r\n{self.shown(user)}"
        return f"{head}Content-Length: {len(PLAIN)}\r\n\r\n".encode() + PLAIN

    def connect(self, user: str, target: str | None = None) -> bytes:
        where = target or self.target
        return f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{self.shown(user)}\r\n".encode()

    @contextlib.asynccontextmanager
    async def connected(self, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Stream]:
        name = "localhost" if tls is not None else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def opens(self, service: ServiceEntry, index: int) -> bool:
        return self.rig.open_independently(service.owner, bytes(self.origin.exchanges[index].body)) == PLAIN

    def sealers(self) -> list[str | None]:
        lines = [json.loads(line) for line in self.rig.audit_lines()]
        return [line.get("user") for line in lines if line["action"] == "object-seal"]


async def answer(stream: Stream) -> tuple[int, str | None]:
    """Status and error code of the next answer; its body is read."""
    reader, _ = stream
    async with asyncio.timeout(30):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        await reader.readexactly(int(fields.get("content-length", "0")))
    return int(lines[0].split(" ")[1]), fields.get("sealgate-error")


async def is_closed(stream: Stream) -> bool:
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionError):
            return await stream[0].read() == b""
    return True


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[Shared]:
    server_ca = pki.make_server_ca()
    own = pki.write_credential(pki.issue_server(server_ca), tmp_path, "proxy")
    ca_file = pki.write_certificate(server_ca.certificate, tmp_path / "server-ca.pem")
    async with (
        RecordingOrigin().listening() as origin,
        proxy(tmp_path, ca_file, proxy_certificate=own) as rig,
    ):
        passwords = {}
        for name, user in (("acme", "alice"), ("acme", "anna"), ("globex", "bob")):
            if name not in rig.tenants:
                rig.tenant(name)
            passwords[f"{name}/{user}"] = rig.user(name, user)
        acme, globex = (
            rig.service(f"{name}/files", f"http://localhost:{origin.port}") for name in ("acme", "globex")
        )
        for service in (acme, globex):
            rig.push(service.owner)
        yield Shared(rig, origin, acme, globex, ca_file, passwords)


async def start(shared: Shared, access: dict[str, UserAccess]) -> None:
    tenants = shared.rig.tenants
    listen = tenants["acme"].forward_listen
    for name, rules in access.items():
        tenants[name] = dataclasses.replace(tenants[name], access=rules, forward_listen=listen)
    await shared.rig.engine.prepare()
    await shared.rig.engine.start(shared.rig.picture())
    assert shared.rig.engine.problems == []


@pytest.mark.parametrize("way", ["clear", "tls"])
async def test_each_request_is_judged_by_what_it_shows(shared: Shared, way: str) -> None:
    await start(shared, {"acme": KNOWN, "globex": KNOWN})
    tls = ssl.create_default_context(cafile=shared.own_ca) if way == "tls" else None
    async with shared.connected(tls=tls) as stream:
        for user in ("acme/alice", "acme/anna", "acme/alice"):
            stream[1].write(shared.upload(user))
            assert (await answer(stream))[0] == 200
        stream[1].write(shared.upload("globex/bob"))
        assert await answer(stream) == (403, "user-mismatch")
        assert await is_closed(stream), "the pool shall open another one for that tenant"
    async with shared.connected(tls=tls) as stream:
        stream[1].write(shared.upload("globex/bob"))
        assert (await answer(stream))[0] == 200
        stream[1].write(shared.upload(""))
        assert await answer(stream) == (407, "proxy-authentication-required")
    assert [shared.opens(shared.acme, index) for index in range(3)] == [True] * 3
    assert shared.opens(shared.globex, 3)
    assert len(shared.origin.exchanges) == 4
    assert shared.sealers() == ["alice", "anna", "alice", "bob"]


async def test_the_tenant_is_not_changed_by_connect_nor_by_showing_nothing(shared: Shared) -> None:
    """globex is known by its network, so a request that shows nothing is globex's."""
    await start(shared, {"acme": KNOWN, "globex": UserAccess(networks=parse_networks(["127.0.0.0/8"]))})
    for first, second in (
        (shared.upload("acme/alice"), shared.upload("")),
        (shared.upload(""), shared.upload("acme/alice")),
        (shared.upload("acme/alice"), shared.connect("")),
        (shared.upload(""), shared.connect("acme/alice")),
    ):
        async with shared.connected() as stream:
            stream[1].write(first)
            assert (await answer(stream))[0] == 200
            stream[1].write(second)
            assert await answer(stream) == (403, "user-mismatch")
            assert await is_closed(stream)
    assert len(shared.origin.exchanges) == 4, "of each pair the first alone went on"
    for index, service in enumerate((shared.acme, shared.globex) * 2):
        assert shared.opens(service, index)


async def test_a_tunnel_is_that_tenants_whatever_is_shown_inside(shared: Shared) -> None:
    await start(shared, {"acme": KNOWN, "globex": KNOWN})
    async with shared.connected() as stream:
        # A CONNECT that is refused fixes nothing but the tenant.
        stream[1].write(shared.connect("acme/alice", "nobody.invalid:443"))
        assert await answer(stream) == (403, "unmanaged-host")
    async with shared.connected() as stream:
        stream[1].write(shared.connect("acme/alice"))
        assert (await answer(stream))[0] == 200
        head = f"PUT /file HTTP/1.1\r\nHost: {shared.target}\r\n{shared.shown('globex/bob')}"
        stream[1].write(f"{head}Content-Length: {len(PLAIN)}\r\n\r\n".encode() + PLAIN)
        assert (await answer(stream))[0] == 200
        assert shared.opens(shared.acme, 0)
        assert shared.origin.exchanges[0].header("proxy-authorization") is None
        stream[1].write(shared.connect("globex/bob"))
        assert (await answer(stream))[0] == 400
    assert len(shared.origin.exchanges) == 1


async def test_no_http2_outside_of_a_tunnel(shared: Shared) -> None:
    """Its streams would be several users' at the same time; neither ALPN nor prior knowledge leads to it."""
    await start(shared, {"acme": KNOWN, "globex": KNOWN})
    tls = ssl.create_default_context(cafile=shared.own_ca)
    tls.set_alpn_protocols(["h2", "http/1.1"])
    async with shared.connected(tls=tls) as stream:
        assert stream[1].get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    for context in (None, tls):
        async with shared.connected(tls=context) as stream:
            stream[1].write(preface)
            assert (await answer(stream))[0] == 400
            assert await is_closed(stream)


async def test_a_certificate_binds_the_connection_and_not_the_user(shared: Shared, tmp_path: Path) -> None:
    ours = Authority()
    certificate_file, key_file = ours.write_client(tmp_path, "front")
    await start(
        shared,
        {
            "acme": UserAccess(client_roots=(ours.certificate,), requires=frozenset(Proof)),
            "globex": KNOWN,
        },
    )
    tls = ssl.create_default_context(cafile=shared.own_ca)
    tls.load_cert_chain(certificate_file, key_file)
    async with shared.connected(tls=tls) as stream:
        for user in ("acme/alice", "acme/anna"):
            stream[1].write(shared.upload(user))
            assert (await answer(stream))[0] == 200
        stream[1].write(shared.upload("globex/bob"))
        assert await answer(stream) == (403, "user-mismatch")
    assert shared.sealers() == ["alice", "anna"]


async def test_through_a_proxy_that_reuses_its_connections(shared: Shared, tmp_path: Path) -> None:
    """One connection at a time behind it, which it gives to whoever asks next."""
    await start(shared, {"acme": KNOWN, "globex": KNOWN})
    port = free_port()
    settings = tmp_path / "pool.cfg"
    settings.write_text(f"""
global
    tune.idle-pool.shared on
defaults
    mode http
    timeout connect 30s
    timeout client 60s
    timeout server 60s
    http-reuse always
listen pool
    bind 127.0.0.1:{port}
    server sealgate 127.0.0.1:{shared.port} maxconn 1 pool-max-conn 1 pool-purge-delay 1h
""")
    process = await asyncio.create_subprocess_exec(
        HAPROXY, "-db", "-q", "-f", str(settings), stderr=asyncio.subprocess.DEVNULL
    )
    users = ["acme/alice", "acme/anna", "globex/bob", "globex/bob", "acme/alice", "globex/bob", "acme/anna"]
    statuses = []
    try:
        await listening(port, process)
        for user in users:
            way = ("-x", f"http://127.0.0.1:{port}", "--proxy-user", f"{user}:{shared.passwords[user]}")
            got = await curl(*way, "-T", "-", f"http://{shared.target}/file", body=PLAIN)
            statuses.append((got.status, got.code))
    finally:
        await ended(process)
    assert set(statuses) <= {(200, None), (403, "user-mismatch")}
    assert (403, "user-mismatch") in statuses, "it has reused a connection for another tenant"
    passed = [user for user, (status, _) in zip(users, statuses, strict=True) if status == 200]
    assert passed[:2] == users[:2], "users of one tenant share a connection"
    assert len(shared.origin.exchanges) == len(passed)
    for index, user in enumerate(passed):
        assert shared.opens(shared.acme if user.startswith("acme") else shared.globex, index)
    assert shared.sealers() == [user.partition("/")[2] for user in passed]
