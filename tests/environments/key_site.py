"""Several environments' agents with keys, in one process: real TLS, databases and shared rows, an HSM each
(the fake one, or SoftHSM), and proxies that acknowledge what is reserved for them.

    async with key_site(tmp_path, acme, "abc") as site:
        await site.unite()
        await site["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await site.keys_active()
        site["b"].proxies.pushed[FILES]     # key id -> state, as b's proxies have it
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast, override

from sqlalchemy import text

from envelope.keys import KeyId, KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.environments.keys.key_parts import KeyParts
from key_agent.environments.keys.manager import Manager
from key_agent.environments.keys.wrapping import Wraps
from key_agent.environments.shared.documents import DekBody
from key_agent.environments.shared.shared_view import Shared
from key_agent.push.targets import Targets
from key_agent.registry.model import Proxy, Receipt
from key_agent.rotation import unopenable
from key_agent.sources.source import Kek, KekReference, KekType, KeySource
from tests.environments.members import Member, MembersSite
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.conftest import until
from tests.pki import Tenant

FILES: Final = NetworkService("acme", "files")
MAIL: Final = NetworkService("acme", "mail")
INTERVAL_S: Final = 2
"""Between two refreshes, of which two pass before a proxy that is silent is not waited for any more."""

type MakeSource = Callable[[str], KeySource]


class AcknowledgingProxies:
    """In place of the agent's refresh: what would be pushed is reserved, and acknowledged at once."""

    def __init__(self, member: "KeyMember") -> None:
        self._member = member
        self._wake = asyncio.Event()
        self.deaf: set[str] = set()
        """Proxies that acknowledge nothing."""
        self.pushed: dict[NetworkService, dict[str, KeyState]] = {}
        """By service: the keys of the newest push, and in which state."""

    def at_once(self, _names: Iterable[str] | None = None) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            member = self._member
            if member.peering.verdict.state not in ("active", "draining"):
                continue
            owners = {link.owner for link in member.targets.links if not link.withdrawn}
            fed = [name for name in member.targets.fed() if name not in self.deaf]
            now_ms = member.now_ms()
            _, made = await member.registry.reserve(owners, fed, now_ms=now_ms, until_ms=now_ms + 60_000)
            receipts = [
                Receipt(
                    owner=one.owner,
                    proxy_id=link.proxy_id,
                    sequence=one.sequence,
                    accepted=True,
                    keys=len(one.keys),
                    at_ms=now_ms,
                    valid_until_ms=now_ms + 60_000,
                    error=None,
                )
                for one in made
                for link in one.links
            ]
            await member.registry.record_receipts(receipts)
            for one in made:
                self.pushed[one.owner] = {str(key.key_id): state for key, state in one.keys}
            member.targets.load(await member.registry.book())
            if member.site_parts is not None:
                member.manager.wake()


class KeyMember(Member):
    def __init__(self, site: "KeySite", name: str) -> None:
        super().__init__(site, name)
        self.key_source = site.make_source(name)
        self.proxies = AcknowledgingProxies(self)
        self.refresh = self.proxies
        self.targets: Targets
        self.rhythm = SimpleNamespace(interval_s=INTERVAL_S, rotate_after_days=90)
        self.site_parts: KeyParts | None = None
        self.views: list[Shared] = []
        """Every epoch that this member has had, in order."""
        self.kek_type = site.kek_types.get(name)

    @property
    @override
    def source(self) -> Any:
        """An HSM of its own."""
        return self.key_source

    @property
    def fake(self) -> FakeKeySource:
        assert isinstance(self.key_source, FakeKeySource)
        return self.key_source

    @property
    def manager(self) -> Manager:
        assert self.site_parts is not None
        return self.site_parts.manager

    @property
    def wraps(self) -> Wraps:
        assert self.site_parts is not None
        return self.site_parts.wraps

    @property
    def deks(self) -> Mapping[str, DekBody]:
        view: Shared = self.peering.view
        return view.deks

    def prepare(self) -> None:
        """Before it answers anybody, in each life."""
        self.site_parts = KeyParts(cast("Agent", self), self.environments)
        self.peering.listen(self._seen)
        self.environments.tasks.append(("proxies", self.proxies.run))

    def _seen(self, view: Shared) -> None:
        if not self.views or self.views[-1].epoch != view.epoch:
            self.views.append(view)
        self.proxies.at_once()

    async def host(self, owner: NetworkService, proxy: str) -> None:
        """A proxy of this environment serves *owner*, whose row is here."""
        await self.registry.add_proxy(
            Proxy(id=proxy, url="https://proxy:1", ca_pem="-"), now_ms=self.now_ms()
        )
        await self.registry.add_service(
            owner, proxy_id=proxy, certificate_pem="-", key=None, now_ms=self.now_ms()
        )
        self.targets.load(await self.registry.book())
        self.proxies.at_once()

    async def kek(self) -> Kek:
        row = await self.registry.current_kek()
        assert row is not None
        assert row.kek is not None
        return row.kek

    async def wrapped(self) -> dict[str, bytes]:
        """By key id: what stands under this environment's KEK."""
        found = await self.registry.wrapped_keys((await self.kek()).reference.kek_id)
        return {str(key.key_id): key.wrapped for key in found}

    async def opens(self, key_ids: Iterable[str]) -> bool:
        """Whether its HSM opens every one of them, with the check value of the rows."""
        kek = await self.kek()
        wanted = {KeyId.parse(key_id) for key_id in key_ids}
        held = [key for key in await self.registry.wrapped_keys(kek.reference.kek_id) if key.key_id in wanted]
        return len(held) == len(wanted) and not await unopenable(self.source, kek, held)

    async def sql(self, statement: str, **values: object) -> list[Any]:
        """Somebody's hand in this environment's database."""

        def work(c: Any) -> list[Any]:
            found = c.execute(text(statement), values)
            return list(found) if found.returns_rows else []

        return await self.registry.transact(work)

    @override
    async def _have_a_kek(self) -> None:
        self.targets = Targets(await self.registry.book())
        if await self.registry.current_kek() is not None:
            return
        reference = KekReference(
            kek_id=f"kek-{self.name}",
            label=f"kek-{self.name}",
            object_id=b"kek-" + self.name.encode(),
            environment_id=self.name,
        )
        await self.registry.begin_kek(reference, now_ms=self.now_ms())
        kek = await self.source.create_kek(reference, kek_type=self.kek_type)
        await self.registry.complete_kek(kek, [], now_ms=self.now_ms())


class KeySite(MembersSite):
    def __init__(
        self,
        directory: Path,
        tenant: Tenant,
        urls: Callable[[str], str] | None,
        make_source: MakeSource,
        kek_types: Mapping[str, KekType],
    ) -> None:
        super().__init__(directory, tenant, urls)
        self.make_source = make_source
        self.kek_types = kek_types
        self.prepare = lambda member: cast("KeyMember", member).prepare()

    @override
    def __getitem__(self, name: str) -> KeyMember:
        return cast("KeyMember", self.members[name])

    @property
    def manager(self) -> KeyMember:
        """Of those that run, the one that leads."""
        (found,) = (cast("KeyMember", one) for one in self.members.values() if one.peering.leads)
        return found

    @override
    async def join(self, first: Member, other: Member) -> None:
        """Asked, added, and active by the manager's own doing."""
        fingerprint = str((await first.commands.env_identity())["fingerprint"])
        asked = await other.commands.env_join(
            url=other.url, manager_url=first.url, manager_agent=first.agent_id, fingerprint=fingerprint
        )
        await first.commands.env_add(environment=other.name, fingerprint=str(asked["fingerprint"]))
        await until(lambda: self.state_of(other.name) == "active", timeout_s=40)

    def state_of(self, name: str) -> str:
        """As the first member that is not it sees it."""
        seen_by = next(one for one in self.members.values() if one.name != name or len(self.members) == 1)
        body = seen_by.peering.view.environments.get(name)
        return "unknown" if body is None else str(body.state)

    async def keys_active(
        self, owner: NetworkService = FILES, *, owners: str | None = None, timeout_s: float = 40
    ) -> dict[str, str]:
        """By environment: its active key of *owner*, once all have one and every member knows."""
        names = owners or "".join(self.members)

        def found() -> dict[str, str]:
            return {
                body.owner_environment: key_id
                for key_id, body in self.manager.deks.items()
                if body.service == str(owner) and body.state is KeyState.ACTIVE
            }

        def pending() -> bool:
            return any(
                body.service == str(owner) and body.state is KeyState.PRE_ACTIVE
                for body in self.manager.deks.values()
            )

        await until(lambda: set(names) <= found().keys() and not pending(), timeout_s=timeout_s)
        return found()


def states(member: KeyMember, owner: NetworkService = FILES) -> dict[str, KeyState]:
    return {key_id: body.state for key_id, body in member.deks.items() if body.service == str(owner)}


@asynccontextmanager
async def key_site(
    directory: Path,
    tenant: Tenant,
    names: str,
    *,
    urls: Callable[[str], str] | None = None,
    make_source: MakeSource = lambda _: FakeKeySource(),
    kek_types: Mapping[str, KekType] | None = None,
    make_member: Callable[[KeySite, str], KeyMember] = KeyMember,
) -> AsyncIterator[KeySite]:
    """Environments *names* (a letter each), each the only one until `unite`."""
    site = KeySite(directory, tenant, urls, make_source, kek_types or {})
    try:
        for name in names:
            site.members[name] = make_member(site, name)
        for member in site.members.values():
            await member.start()
        yield site
    finally:
        began_s = time.monotonic()
        for member in site.members.values():
            await member.stop()
            await cast("KeyMember", member).key_source.close()
        assert time.monotonic() - began_s < 60
