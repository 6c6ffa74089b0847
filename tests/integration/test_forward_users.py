"""Who uses the forward proxy: real curl, real TLS, a real WebDAV server behind it."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.tenants.model import ANY_NAME, ServiceEntry
from proxy.users.model import Proof, UserAccess, parse_networks
from tests import pki
from tests.integration.proxy_rig import Answer, Origin, Rig, curl, proxy, webdav
from tests.proxy.users.test_identification import Authority

PLAIN = b"what only the tenant's users may read " * 100
KNOWN = UserAccess(requires=frozenset({Proof.CREDENTIALS}))


@dataclasses.dataclass
class World:
    rig: Rig
    origin: Origin
    acme: ServiceEntry
    globex: ServiceEntry
    own_ca: Path

    def access(self, tenant: str, access: UserAccess) -> None:
        self.rig.tenants[tenant] = dataclasses.replace(self.rig.tenants[tenant], access=access)

    def share(self) -> None:
        """Both tenants at one listener."""
        listen = self.rig.tenants["acme"].forward_listen
        self.rig.tenants["globex"] = dataclasses.replace(self.rig.tenants["globex"], forward_listen=listen)

    async def start(self) -> None:
        await self.rig.engine.prepare()
        await self.rig.engine.start(self.rig.picture())
        assert self.rig.engine.problems == []

    async def put(self, service: ServiceEntry, *arguments: str) -> Answer:
        return await self.rig.ask(service, "/file", *arguments, "-T", "-", mode="forward", body=PLAIN)

    async def by_tls(self, service: ServiceEntry, *arguments: str) -> Answer:
        """Through TLS to the proxy itself, as its own certificate is known."""
        tenant = self.rig.tenants[service.owner.tenant]
        return await curl(
            "-x", f"https://{tenant.forward_listen}", "--proxy-cacert", str(self.own_ca),
            "--cacert", str(tenant.interception_ca.certificate_file), *arguments,
            "-T", "-", self.rig.forward_url(service, "/file"), body=PLAIN,
        )  # fmt: skip


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    server_ca = pki.make_server_ca()
    certificate_file, key_file = pki.write_credential(pki.issue_server(server_ca), tmp_path, "origin")
    own = pki.write_credential(pki.issue_server(server_ca), tmp_path, "proxy")
    ca_file = pki.write_certificate(server_ca.certificate, tmp_path / "server-ca.pem")
    async with (
        webdav(tmp_path, certificate_file, key_file) as origin,
        proxy(tmp_path, ca_file, proxy_certificate=own) as rig,
    ):
        rig.tenant("acme")
        rig.tenant("globex")
        acme, globex = rig.service("acme/drive", origin.url), rig.service("globex/drive", origin.url)
        rig.push(acme.owner)
        rig.push(globex.owner)
        yield World(rig, origin, acme, globex, ca_file)


async def test_credentials(world: World) -> None:
    world.access("acme", KNOWN)
    password = world.rig.user("acme", "alice")
    await world.start()
    refused = await world.put(world.acme)
    assert b"407" in refused.error.encode() or refused.status == 407
    assert refused.exit_code != 0
    wrong = await world.put(world.acme, "--proxy-user", "alice:wrong")
    assert wrong.exit_code != 0
    foreign = await world.put(world.globex, "--proxy-user", f"alice:{password}")
    assert foreign.exit_code != 0, "credentials that are nobody's are refused where none are asked for"
    assert world.origin.names() == []
    assert (await world.put(world.acme, "--proxy-user", f"alice:{password}")).status == 201
    stored = world.origin.stored("file")
    assert PLAIN[:16] not in stored
    assert world.rig.open_independently(world.acme.owner, stored) == PLAIN
    assert (await world.put(world.globex)).status in {201, 204}, "the other tenant asks for nothing"
    lines = [json.loads(line) for line in world.rig.audit_lines()]
    sealed = [line for line in lines if line["action"] == "object-seal"]
    assert [line.get("user") for line in sealed] == ["alice", None]
    outcomes = {line["outcome"] for line in lines if line["action"] == "request-refused"}
    assert {"proxy-authentication-required", "proxy-credentials-refused"} <= outcomes
    assert password not in "".join(world.rig.audit_lines())


async def test_the_challenge_is_what_clients_know(world: World) -> None:
    world.access("acme", KNOWN)
    password = world.rig.user("acme", "alice")
    await world.start()
    # Asked first without credentials, then answered: what a browser does.
    answer = await world.put(world.acme, "--proxy-anyauth", "--proxy-user", f"alice:{password}")
    assert answer.status == 201


async def test_a_removed_user_is_cut(world: World) -> None:
    world.access("acme", KNOWN)
    password = world.rig.user("acme", "alice")
    await world.start()
    user = ("--proxy-user", f"alice:{password}")
    assert (await world.put(world.acme, *user)).status == 201
    world.rig.users.clear()
    await world.rig.engine.apply(world.rig.picture())
    assert (await world.put(world.acme, *user)).exit_code != 0


async def test_source_networks(world: World) -> None:
    world.access("acme", UserAccess(networks=parse_networks(["192.0.2.0/24"])))
    world.access("globex", UserAccess(networks=parse_networks(["127.0.0.0/8"])))
    await world.start()
    assert (await world.put(world.acme)).exit_code != 0
    assert world.origin.names() == []
    assert (await world.put(world.globex)).status == 201


async def test_a_shared_listener(world: World) -> None:
    world.access("acme", KNOWN)
    world.access("globex", UserAccess(networks=parse_networks(["127.0.0.0/8"])))
    world.share()
    password = world.rig.user("acme", "alice")
    await world.start()
    assert (await world.put(world.globex)).status == 201
    assert world.rig.open_independently(world.globex.owner, world.origin.stored("file")) == PLAIN
    answer = await world.put(world.acme, "--proxy-user", f"acme/alice:{password}")
    assert answer.status in {201, 204}
    assert world.rig.open_independently(world.acme.owner, world.origin.stored("file")) == PLAIN
    # The certificate shown is of the tenant's own authority: globex's CA does not vouch for acme's traffic.
    crossed = await curl(
        "-x", f"http://{world.rig.tenants['globex'].forward_listen}",
        "--cacert", str(world.rig.tenants["globex"].interception_ca.certificate_file),
        "--proxy-user", f"acme/alice:{password}", world.rig.forward_url(world.acme, "/file"),
    )  # fmt: skip
    assert crossed.exit_code == 60


async def test_nobody_is_taken_for_a_user_at_a_shared_listener(world: World) -> None:
    world.access("acme", KNOWN)
    world.access("globex", KNOWN)
    world.share()
    await world.start()
    for service in (world.acme, world.globex):
        assert (await world.put(service)).exit_code != 0
    assert world.origin.names() == []


async def test_client_certificates(world: World, tmp_path: Path) -> None:
    ours, theirs = Authority(), Authority()
    world.access(
        "acme", UserAccess(client_roots=(ours.certificate,), requires=frozenset({Proof.CERTIFICATE}))
    )
    world.access("globex", UserAccess(client_roots=(theirs.certificate,), requires=frozenset(Proof)))
    world.share()
    await world.start()

    def shown(authority: Authority, name: str) -> list[str]:
        certificate_file, key_file = authority.write_client(tmp_path, name)
        return ["--proxy-cert", str(certificate_file), "--proxy-key", str(key_file)]

    assert (await world.by_tls(world.acme)).exit_code != 0, "no certificate"
    assert (await world.put(world.acme)).exit_code != 0, "nor TLS"
    assert (await world.by_tls(world.acme, *shown(Authority(), "stranger"))).exit_code != 0
    assert (await world.by_tls(world.acme, *shown(theirs, "bob"))).exit_code != 0, "the other tenant's"
    assert world.origin.names() == []
    assert (await world.by_tls(world.acme, *shown(ours, "alice"))).status == 201
    assert world.rig.open_independently(world.acme.owner, world.origin.stored("file")) == PLAIN
    # globex wants both.
    password = world.rig.user("globex", "bob")
    await world.rig.engine.apply(world.rig.picture())
    bob = shown(theirs, "bob2")
    assert (await world.by_tls(world.globex, *bob)).exit_code != 0
    both = await world.by_tls(world.globex, *bob, "--proxy-user", f"globex/bob:{password}")
    assert both.status in {201, 204}
    crossed = await world.by_tls(world.globex, *shown(ours, "eve"), "--proxy-user", f"globex/bob:{password}")
    assert crossed.exit_code != 0, "two tenants in one request"


UNRECOGNIZED = "unrecognized name"
"""As OpenSSL calls the alert 112."""


async def put_to(world: World, entry: ServiceEntry, name: str) -> Answer:
    assert entry.reverse_listen is not None
    port, ca_file = entry.reverse_listen.port, world.rig.tenants["acme"].interception_ca.certificate_file
    return await curl(
        "--cacert", str(ca_file), "--resolve", f"{name}:{port}:127.0.0.1",
        "-T", "-", f"https://{name}:{port}/file", body=PLAIN,
    )  # fmt: skip


async def test_a_reverse_listener_answers_to_the_names_that_are_listed(world: World) -> None:
    entry = dataclasses.replace(world.acme, reverse_names=frozenset({"files.acme.example"}))
    world.rig.services[entry.owner] = entry
    await world.start()
    for name in ("other.example", "localhost"):
        refused = await put_to(world, entry, name)
        assert (refused.exit_code, UNRECOGNIZED in refused.error) == (35, True), (
            "no certificate is made for it"
        )
    assert (await world.rig.ask(entry, "/file")).exit_code == 35, "nor without a name"
    assert world.origin.names() == []
    assert (await put_to(world, entry, "files.acme.example")).status == 201


async def test_a_reverse_listener_answers_to_its_own_names_at_first(world: World) -> None:
    await world.start()
    refused = await put_to(world, world.acme, "bank.example")
    assert (refused.exit_code, UNRECOGNIZED in refused.error) == (35, True)
    assert world.origin.names() == []
    assert (await world.rig.ask(world.acme, "/file", "-T", "-", body=PLAIN)).status == 201
    assert (await put_to(world, world.acme, "localhost")).status in {201, 204}
    named = dataclasses.replace(world.acme, reverse_names=frozenset({ANY_NAME}))
    world.rig.services[named.owner] = named
    await world.rig.engine.apply(world.rig.picture())
    assert (await put_to(world, named, "bank.example")).status in {201, 204}
