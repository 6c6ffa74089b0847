"""Several environments' agents in one process: real TLS, databases and shared rows; no HSM, no proxies.

    async with members(tmp_path, acme, "abc") as site:
        await site.unite()
        site["b"].cut_off()            # b reaches nobody, nobody reaches b
        site["b"].clock.skip(301)      # its clocks go on by that
        site["b"].reconnect()

What acts on the standing (pushes, withdrawals) is the agent's and tested there; here it can be read.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast, override

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.base64url import b64u_encode
from key_agent.agent import Agent
from key_agent.config import EnvironmentsSettings
from key_agent.consent import Consent
from key_agent.environments.assembly import Environments
from key_agent.environments.commands.membership_commands import MembershipCommands
from key_agent.environments.commands.promotion_commands import PromotionCommands
from key_agent.environments.peers.etcd import EtcdSettings
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError, PeerTransport
from key_agent.environments.peers.peer_trust import PeerTrust
from key_agent.environments.peers.peers import Introduction
from key_agent.environments.shared import approvals
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.registry_key import public_text, read_or_make_registry_key
from key_agent.environments.shared.registry_key_exchange import finish_exchange
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.store import Registry
from key_agent.sources.source import KekReference
from runtime.audit import AuditLog
from runtime.clock import SystemClock
from tests.fakes.key_source import FakeKeySource
from tests.pki import Tenant, write_credential

HEARTBEAT_S: Final = 0.2


class SkippingClock(SystemClock):
    """The real one, which a test can have go on by minutes at once."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self._ahead_s

    @override
    def wall_s(self) -> float:
        return super().wall_s() + self._ahead_s

    def skip(self, seconds: float) -> None:
        self._ahead_s += seconds


class CuttableTransport(PeerTransport):
    """The network that a member speaks through: some agents cannot be reached by it."""

    def __init__(self, *, trust: PeerTrust, certificate_file: Path, key_file: Path) -> None:
        super().__init__(trust=trust, certificate_file=certificate_file, key_file=key_file)
        self.unreachable: set[str] = set()
        self.silent: set[str] = set()
        """Agents that take every request and never answer, but within the time that is waited for them."""
        self.hanging: set[str] = set()
        """Agents of which nothing comes back, neither an answer nor the end of the wait for it."""
        self.calls: list[tuple[str, str, str]] = []
        """Agent, method, path of every request."""

    @override
    async def request(
        self, peer: PeerAddress, method: str, path: str, body: bytes | None = None, **more: Any
    ) -> bytes:
        self.calls.append((peer.agent_id, method, path))
        if peer.agent_id in self.hanging:
            await asyncio.Event().wait()
        if peer.agent_id in self.silent:
            await asyncio.sleep(more["timeout_s"])
            raise PeerError("timeout", f"{peer.agent_id}: silent by the test")
        if peer.agent_id in self.unreachable:
            raise PeerError("unreachable", f"{peer.agent_id}: cut off by the test")
        return await super().request(peer, method, path, body, **more)


class _Commands(MembershipCommands, PromotionCommands):
    """The commands, on as much of an agent as they touch."""

    def __init__(self, member: "Member") -> None:
        super().__init__(cast("Agent", member))


class Member:
    """One environment's agent; has the names of `Agent` that the commands use."""

    def __init__(self, site: "MembersSite", name: str) -> None:
        self.site = site
        self.name = name
        self.agent_id = f"agent-{name}"
        self.tenant = site.tenant.name
        self.directory = site.directory / name
        self.directory.mkdir(mode=0o700)
        credential = site.tenant.agent_tls(self.agent_id, hostnames=["localhost"])
        self.files = write_credential(credential, self.directory, "tls")
        self.clock = SkippingClock()
        self.consent = Consent(self.clock)
        self.one_at_a_time = asyncio.Lock()
        self.database_url = site.database_url(self)
        self.registry: Registry
        self.journal: Journal
        self.transport: CuttableTransport
        self.environments: Environments
        self.commands = _Commands(self)
        self._stack = contextlib.AsyncExitStack()
        self.port = 0

    @property
    def source(self) -> FakeKeySource:
        """One for all: what is wrapped for one environment can be wrapped for another."""
        return self.site.source

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def peering(self) -> Any:
        return self.environments.peering

    def now_ms(self) -> int:
        return int(self.clock.wall_s() * 1000)

    async def start(self, *, etcd: EtcdSettings | None = None) -> None:
        """Begin a life of its agent."""
        stack = self._stack
        self.journal = Journal(AuditLog.open(self.directory / "audit.jsonl", self.clock))
        stack.push_async_callback(self.journal.close)
        self.registry = await Registry.open(
            self.database_url,
            tenant_id=self.tenant,
            environment_id=self.name,
            agent_id=self.agent_id,
            now_ms=self.now_ms(),
        )
        stack.push_async_callback(self.registry.close)
        await self._have_a_kek()
        await finish_exchange(self.registry, self.directory)
        key = read_or_make_registry_key(self.directory)
        root = self.site.tenant.root.certificate
        trust = PeerTrust(tenant=self.tenant, root=root, revocations=None, clock=self.clock)
        self.transport = CuttableTransport(
            trust=trust, certificate_file=self.files[0], key_file=self.files[1]
        )
        self.environments = Environments(
            settings=EnvironmentsSettings(
                host="127.0.0.1",
                port=self.port,
                heartbeat_s=self.site.heartbeat_s,
                request_timeout_s=3,
                etcd=etcd,
            ),
            registry=self.registry,
            shared=await SharedRegistry.open(self.registry, key=key, state_dir=self.directory),
            transport=self.transport,
            trust=trust,
            tls_files=self.files,
            root=root,
            introduction=Introduction(
                tenant=self.tenant,
                environment=self.name,
                agent=self.agent_id,
                registry_key=public_text(key),
            ),
            state_dir=self.directory,
            consent=self.consent,
            journal=self.journal,
            clock=self.clock,
        )
        stack.push_async_callback(self.environments.close)
        await self.environments.peering.load()
        self.site.prepare(self)
        await stack.enter_async_context(self.environments.working())
        self.port = self.environments.port or 0

    async def stop(self) -> None:
        await self._stack.aclose()
        self._stack = contextlib.AsyncExitStack()

    async def _have_a_kek(self) -> None:
        if await self.registry.current_kek() is not None:
            return
        reference = KekReference(
            kek_id=f"kek-{self.name}", label=f"kek-{self.name}", object_id=b"1", environment_id=self.name
        )
        await self.registry.begin_kek(reference, now_ms=self.now_ms())
        kek = await self.source.create_kek(reference)
        await self.registry.complete_kek(kek, [], now_ms=self.now_ms())

    def cut_off(self, *others: str) -> None:
        """From these members, or from all, in both directions."""
        for other in [self.site[name] for name in others] or list(self.site.members.values()):
            if other is not self:
                self.transport.unreachable.add(other.agent_id)
                other.transport.unreachable.add(self.agent_id)

    def reconnect(self) -> None:
        """To everybody."""
        self.transport.unreachable.clear()
        for other in self.site.members.values():
            other.transport.unreachable.discard(self.agent_id)

    async def change(self, change: Callable[[Draft], None]) -> None:
        """Write shared rows as the manager."""
        term = self.peering.leadership.term
        assert term is not None, f"{self.name} is not the manager"
        await self.environments.shared.write(change, term=term, now_ms=self.now_ms())
        await self.peering.changed()


def _activated(name: str) -> Callable[[Draft], None]:
    """There are no keys here whose proof could be waited for."""

    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        assert body.state is EnvironmentState.JOINING
        active = msgspec.structs.replace(body, state=EnvironmentState.ACTIVE, since_ms=draft.now_ms)
        draft.put(Kind.ENVIRONMENT, name, active)

    return change


class MembersSite:
    def __init__(self, directory: Path, tenant: Tenant, urls: Callable[[str], str] | None) -> None:
        self.directory = directory
        self.tenant = tenant
        self._urls = urls
        self.source = FakeKeySource()
        self.members: dict[str, Member] = {}
        self.heartbeat_s = HEARTBEAT_S
        self.prepare: Callable[[Member], None] = lambda member: None
        """Called in each life of a member before it answers anybody."""
        self.admins: dict[str, Ed25519PrivateKey] = {
            name: Ed25519PrivateKey.generate() for name in ("ann", "bob")
        }

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def database_url(self, member: Member) -> str:
        if self._urls is not None:
            return self._urls(member.name)
        return f"sqlite:///{member.directory / 'registry.db'}"

    async def unite(self) -> None:
        """The first begins, the others join; all are active in the end, and in step. Two administrators are
        known to all of them: who is cut off from now on can be promoted.
        """
        first, *others = self.members.values()
        await first.commands.env_init(url=first.url)
        for other in others:
            await self.join(first, other)
        await first.change(self._add_admins)
        await self.in_step()

    async def join(self, first: Member, other: Member) -> None:
        fingerprint = str((await first.commands.env_identity())["fingerprint"])
        asked = await other.commands.env_join(
            url=other.url, manager_url=first.url, manager_agent=first.agent_id, fingerprint=fingerprint
        )
        await first.commands.env_add(environment=other.name, fingerprint=str(asked["fingerprint"]))
        await first.change(_activated(other.name))

    def _add_admins(self, draft: Draft) -> None:
        for name, key in self.admins.items():
            public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            body = AdminBody(
                name=name,
                public_key=b64u_encode(public),
                state=AdminState.ACTIVE,
                added_at_ms=1,
                added_by="test",
            )
            draft.put(Kind.ADMIN, name, body)

    def sign(self, promotion: dict[str, Any], *names: str) -> dict[str, Any]:
        """The promotion as these administrators, or all, have signed it."""
        asked = msgspec.convert(promotion["asked"], ApprovalBody)
        signed = approvals.statement(promotion["tenant"], promotion["approval"], asked)
        signatures = {
            name: approvals.sign_statement(self.admins[name], signed) for name in names or self.admins
        }
        return {
            "approval": promotion["approval"],
            "asked": msgspec.to_builtins(msgspec.structs.replace(asked, signatures=signatures)),
        }

    async def promote(self, member: Member) -> dict[str, Any]:
        promotion = await member.commands.env_promotion()
        return dict(await member.commands.env_promote(**self.sign(promotion)))

    async def in_step(self, *names: str, timeout_s: float = 30) -> float:
        """Seconds until these, or all, have the same rows, and each believes so of itself."""
        chosen = [self[name] for name in names] or list(self.members.values())
        began_s = time.monotonic()
        while len({(m.peering.position, m.peering.view.digest) for m in chosen}) > 1:
            if time.monotonic() - began_s > timeout_s:
                raise TimeoutError([(m.name, m.peering.position) for m in chosen])
            await asyncio.sleep(0.005)
        return time.monotonic() - began_s


@asynccontextmanager
async def members(
    directory: Path,
    tenant: Tenant,
    names: str,
    *,
    urls: Callable[[str], str] | None = None,
    prepare: Callable[[Member], None] | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[MembersSite]:
    """Agents of the environments *names* (a letter each), started; each the only one until `unite`.

    *urls*: the database of each; default SQLite.
    """
    site = MembersSite(directory, tenant, urls)
    site.heartbeat_s = heartbeat_s
    site.prepare = prepare or site.prepare
    try:
        for name in names:
            site.members[name] = Member(site, name)
        for member in site.members.values():
            await member.start()
        yield site
    finally:
        for member in site.members.values():
            await member.stop()
