"""Members (members.py) that can be breached: keys in their registries, incidents, healing, load balancers.

    async with breached_members(tmp_path, acme, "abc") as site:
        site.commands("a").incident_open(...)
        site.balance()                     # one load balancer confirms what every member has
        site.keys.fail["b"] = {...}        # what `prove` says of b

The keys are real, of one fake HSM for all; `KeyCourier` stands for the part of the manager that makes and
spreads them, and carries wraps from registry to registry.
"""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.agent import Agent, Signing
from key_agent.environments.commands.incident_commands import IncidentCommands
from key_agent.environments.incidents.acknowledgements import LbAck
from key_agent.environments.incidents.incident_parts import IncidentParts
from key_agent.environments.incidents.incidents import Successor
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import DekBody, Kind, RingBody, ServiceBody
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.push.targets import Targets
from key_agent.registry.access import insert_wrap
from key_agent.registry.model import Book, KekRow
from key_agent.registry.states import KekState
from key_agent.sources.source import NewKey, WrappedKey
from tests.environments.members import Member, MembersSite, members
from tests.key_agent.conftest import until
from tests.pki import Tenant

RING = "5a" * 16
SERVICE = "acme/s3"


class StandIn:
    """The parts of `Agent` that incidents touch, on a member."""

    def __init__(self, member: Member, targets: Targets) -> None:
        self.member = member
        self.environments = member.environments
        self.agent_id = member.agent_id
        self.tenant = member.tenant
        self.environment_id = member.name
        self.registry = member.registry
        self.journal = member.journal
        self.source = member.source
        self.clock = member.clock
        self.consent = member.consent
        self.one_at_a_time = member.one_at_a_time
        self.targets = targets
        self.at_once_calls = 0
        self.withdrawals = self
        self.refresh = self
        credential = member.site.tenant.agent_signing(member.agent_id)
        self.signing = Signing(key=credential.key, certificate=credential.certificate)
        member.site.source.signing_key = credential.key
        member.site.source.signing_certificate = credential.certificate

    def now_ms(self) -> int:
        return self.member.now_ms()

    def at_once(self) -> None:
        self.at_once_calls += 1

    async def reload(self, *, kek_changed: bool = False) -> None:
        if kek_changed:
            self.consent.adopt(await self.registry.current_kek())


class KeyCourier:
    """Implements `incidents.KeyMaker`, for the member that leads."""

    def __init__(self, site: "BreachedSite", member: Member) -> None:
        self._site = site
        self._member = member

    async def make_successors(self, wanted: Collection[Successor], *, generator: str | None) -> list[str]:
        made = []
        view = self._member.peering.view
        for ring, owner, predecessor in wanted:
            for key_id, dek in view.deks.items():
                place = (dek.ring, dek.owner_environment)
                if place == (ring, owner) and dek.state is KeyState.PRE_ACTIVE:
                    await self._give_up(key_id)  # of a life that ended while it was on its way
            made.append(await self._site.make_key(self._member, owner, generator, predecessor))
        return made

    async def _give_up(self, key_id: str) -> None:
        def change(draft: Draft) -> None:
            body = draft.shared.deks[key_id]
            draft.put(Kind.DEK, key_id, msgspec.structs.replace(body, state=KeyState.DESTROYED))

        await self._member.change(change)

    async def prove(self, environment: str) -> Mapping[str, str]:
        self._site.proven.append(environment)
        failed = dict(self._site.failing.get(environment, {}))
        if not failed:
            await self._site.carry(environment)
        return failed


@dataclasses.dataclass
class BreachedSite:
    members: MembersSite
    parts: dict[str, IncidentParts] = dataclasses.field(default_factory=dict)
    agents: dict[str, StandIn] = dataclasses.field(default_factory=dict)
    failing: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    """By environment: what cannot be proven there."""
    proven: list[str] = dataclasses.field(default_factory=list)
    """Environments whose wraps were stored and proven, in order."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """By owner: its first key."""
    balancers: set[str] = dataclasses.field(default_factory=set)

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def commands(self, name: str) -> Any:
        return IncidentCommands(cast("Agent", self.agents[name]))

    def prepare(self, member: Member) -> None:
        known = self.agents.get(member.name)
        nothing = Book(kek=None, services=(), proxies={}, links=(), sequences={})
        agent = StandIn(member, Targets(nothing) if known is None else known.targets)
        self.agents[member.name] = agent
        self.parts[member.name] = member.environments.incident_parts = IncidentParts(
            cast("Agent", agent), member.environments, KeyCourier(self, member)
        )

    async def activate(self, *names: str) -> None:
        """Those that have joined are active: what the manager does once every key is proven there."""

        def change(draft: Draft) -> None:
            for name in names:
                body = draft.shared.environments[name]
                if body.state is EnvironmentState.JOINING:
                    state = follow_environment(body.state, EnvironmentEvent.KEYS_PROVEN)
                    draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=state))

        await self.leader.change(change)

    @property
    def leader(self) -> Member:
        return next(member for member in self.members.members.values() if member.peering.leads)

    async def kek(self, name: str) -> KekRow:
        row = await self[name].registry.current_kek()
        assert row is not None
        return row

    async def make_key(
        self, by: Member, owner: str, generator: str | None = None, predecessor: str | None = None
    ) -> str:
        """A key that every environment that counts has, active."""
        kek = (await self.kek(generator or by.name)).kek
        assert kek is not None
        [made] = await by.source.generate(kek, [NewKey(owner=NetworkService.parse(SERVICE))])
        key_id = str(made.key_id)
        now_ms = by.now_ms()
        versions = [dek.version for dek in by.peering.view.deks.values()]

        def create(draft: Draft) -> None:
            body = DekBody(
                ring=RING,
                service=SERVICE,
                owner_environment=owner,
                generator_environment=generator or by.name,
                use=KeyUse.DATA,
                version=1 + max(versions, default=0),
                kcv=made.kcv.hex(),
                state=KeyState.PRE_ACTIVE,
                since_ms=now_ms,
                created_at_ms=now_ms,
                predecessor=predecessor,
            )
            draft.put(Kind.DEK, key_id, body)

        await by.change(create)
        made = dataclasses.replace(made, version=1 + max(versions, default=0))
        counting = [n for n, body in by.peering.view.environments.items() if body.state.counts]
        for name in counting:
            await until(functools.partial(self._knows, name, key_id))
            await self._wrap(name, made)

        def activate(draft: Draft) -> None:
            body = draft.shared.deks[key_id]
            draft.put(
                Kind.DEK, key_id, msgspec.structs.replace(body, state=KeyState.ACTIVE, activated_at_ms=now_ms)
            )

        await by.change(activate)
        return key_id

    def _knows(self, name: str, key_id: str) -> bool:
        return key_id in self[name].peering.view.deks

    async def _wrap(self, name: str, key: WrappedKey) -> None:
        target = (await self.kek(name)).kek
        assert target is not None
        rows = {row.reference.kek_id: row for row in await self._all_keks()}
        origin = rows[key.kek_id].kek
        assert origin is not None
        moved = key
        if target.reference.kek_id != key.kek_id:
            [moved] = (await self[name].source.rewrap(origin, target, [key])).keys
        held = {str(row.key_id) for row in await self[name].registry.wrapped_keys(target.reference.kek_id)}
        if str(key.key_id) not in held:
            now_ms = self[name].now_ms()
            await self[name].registry.transact(lambda c: insert_wrap(c, moved, now_ms))

    async def _all_keks(self) -> list[KekRow]:
        found: list[KekRow] = []
        for member in self.members.members.values():
            found += await member.registry.keks()
        return found

    async def carry(self, environment: str) -> None:
        """Every key that is not destroyed has a wrap there, from wherever one opens."""
        for member in self.members.members.values():
            row = await member.registry.current_kek()
            if member.name == environment or row is None or row.state is not KekState.ACTIVE:
                continue
            for key in await member.registry.wrapped_keys(row.reference.kek_id):
                await self._wrap(environment, key)

    async def stock(self) -> None:
        """One service, an active key of each environment."""

        def change(draft: Draft) -> None:
            draft.put(Kind.SERVICE, SERVICE, ServiceBody())
            draft.put(Kind.RING, RING, RingBody(service=SERVICE, use=KeyUse.DATA))

        await self.leader.change(change)
        for name in self.members.members:
            self.keys[name] = await self.make_key(self.leader, name)

    def states(self, seen_by: str) -> dict[str, KeyState]:
        """Of the first keys, by owner."""
        deks = self[seen_by].peering.view.deks
        return {owner: deks[key_id].state for owner, key_id in self.keys.items()}

    def environment(self, name: str, *, seen_by: str = "") -> EnvironmentState:
        member = self[seen_by] if seen_by else self.leader
        state: EnvironmentState = member.peering.view.environments[name].state
        return state

    async def balance(self, name: str = "lb-1") -> None:
        """A load balancer that confirms, until cancelled, what each member has."""
        while True:
            for member in self.members.members.values():
                view = member.peering.view
                ack = LbAck(load_balancer=name, term=view.term, epoch=view.epoch)
                balancers = self.parts[member.name].load_balancers
                balancers.acknowledged(name, ack, now_boot_s=member.clock.boot_s())
            await asyncio.sleep(0.02)

    async def approve(
        self, action: Action, subject: str, payload: dict[str, Any], *, by: str = "ann bob"
    ) -> str:
        """An approval as two administrators get to one; at the leader."""
        commands = self.commands(self.leader.name)
        asked = await commands.approval_request(action=action, subject=subject, payload=payload)
        for name in by.split():
            signature = approvals.sign_statement(
                self.members.admins[name], asked["statement"].encode("ascii")
            )
            await commands.approval_sign(approval=asked["approval"], admin=name, signature=signature)
        return str(asked["approval"])

    async def opens(self, name: str) -> frozenset[str]:
        """Keys that open at an environment, now."""
        return frozenset((await self.parts[name].reaction.canary()).keys)


@asynccontextmanager
async def breached_members(
    directory: Path, tenant: Tenant, names: str, **more: Any
) -> AsyncIterator[BreachedSite]:
    """United, active, with a key of each environment in each."""
    site: BreachedSite | None = None

    def prepare(member: Member) -> None:
        nonlocal site
        site = site or BreachedSite(member.site)
        site.prepare(member)

    async with members(directory, tenant, names, prepare=prepare, **more) as made:
        assert site is not None
        await made.unite()
        await site.activate(*names)
        await made.in_step()
        for member in made.members.values():
            member.consent.adopt(await member.registry.current_kek())
        await site.stock()
        await made.in_step()
        yield site
