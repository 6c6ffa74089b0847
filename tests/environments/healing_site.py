"""Environments with keys and an HSM each (key_site.py) that can be breached, heal, and be recovered.

async with healing_site(tmp_path, acme, "abc") as site:
    await site.breach(a="kek", b="runtime", c="runtime")
    recovery = await site["a"].commands.env_recovery()
    await site["a"].commands.env_recover(**site.sign(recovery))
    await site.heal("a", seen_by="a")
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast, override

from envelope.keys import KeyUse
from key_agent.agent import Agent, Signing
from key_agent.environments.changes.incident_changes import without_successor
from key_agent.environments.commands.incident_commands import IncidentCommands
from key_agent.environments.commands.membership_commands import MembershipCommands
from key_agent.environments.commands.promotion_commands import PromotionCommands
from key_agent.environments.commands.recovery_commands import RecoveryCommands
from key_agent.environments.incidents.acknowledgements import LbAck
from key_agent.environments.incidents.incident_parts import IncidentParts
from key_agent.environments.keys.own_wraps import OwnWraps
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from tests.environments.key_site import FILES, KeyMember, KeySite, key_site
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.conftest import until
from tests.pki import Tenant


class _Commands(MembershipCommands, PromotionCommands, RecoveryCommands, IncidentCommands):
    def __init__(self, member: "HealingMember") -> None:
        super().__init__(cast("Agent", member))


class _AtOnce:
    def at_once(self) -> None:
        """Nobody has anything of this agent."""


class HealingMember(KeyMember):
    def __init__(self, site: KeySite, name: str) -> None:
        super().__init__(site, name)
        self.environment_id = name
        self.withdrawals = _AtOnce()
        credential = site.tenant.agent_signing(self.agent_id)
        self.signing = Signing(key=credential.key, certificate=credential.certificate)
        self.fake.signing_key, self.fake.signing_certificate = credential.key, credential.certificate
        self.commands: Any = _Commands(self)
        self.parts: IncidentParts

    @override
    def prepare(self) -> None:
        super().prepare()
        self.parts = IncidentParts(cast("Agent", self), self.environments, self.manager)
        self.environments.incident_parts = self.parts

    @override
    async def start(self, **more: Any) -> None:
        await super().start(**more)
        self.consent.adopt(await self.registry.current_kek())

    async def reload(self, *, kek_changed: bool = False) -> None:
        if kek_changed:
            self.consent.adopt(await self.registry.current_kek())
        self.targets.load(await self.registry.book())

    @property
    def own_wraps(self) -> OwnWraps:
        """What takes keys from its own KEK of before."""
        return self.manager.bringing._own_wraps

    def audit(self) -> str:
        return (self.directory / "audit.jsonl").read_text()


class HealingSite:
    def __init__(self, site: KeySite) -> None:
        self.keys = site

    def __getitem__(self, name: str) -> HealingMember:
        return cast("HealingMember", self.keys[name])

    def sign(self, asked: dict[str, Any], *names: str) -> dict[str, Any]:
        return self.keys.sign(asked, *names)

    async def breach(self, **kinds: str) -> None:
        """In that order; the last one is the manager's."""
        for name, kind in kinds.items():
            manager = cast("HealingMember", self.keys.manager)
            await manager.commands.incident_open(environment=name, kind=kind, reason="IR")
        await self.keys.in_step()

    async def approve(self, at: str, action: Action, subject: str, payload: dict[str, object]) -> str:
        commands = self[at].commands
        asked = await commands.approval_request(action=action, subject=subject, payload=payload)
        for name, key in self.keys.admins.items():
            signature = approvals.sign_statement(key, asked["statement"].encode("ascii"))
            await commands.approval_sign(approval=asked["approval"], admin=name, signature=signature)
        return str(asked["approval"])

    async def recover(self, name: str, **how: Any) -> dict[str, Any]:
        """The environment is appointed; what `env recovery` said."""
        commands = self[name].commands
        recovery: dict[str, Any] = await commands.env_recovery(**how)
        await commands.env_recover(**self.sign(recovery))
        return recovery

    async def renew(self, name: str, *, at: str) -> str:
        """A new KEK, which the manager knows; its fingerprint."""
        told = await self[name].commands.env_new_kek()
        await until(lambda: self[at].peering.view.environments[name].kek_id == told["kek"], timeout_s=60)
        return str(told["fingerprint"])

    async def complete(self, name: str, fingerprint: str, *, at: str) -> None:
        """Its operator's word, at the manager."""
        await self[at].commands.env_heal_complete(
            environment=name, attestation="CHG-1", new_certificates=True, kek=fingerprint
        )

    async def rejoin(self, name: str, *, at: str) -> dict[str, Any]:
        return dict(await self[at].commands.env_rejoin(environment=name, patience_s=60))

    async def rekey(self, *incidents: str, at: str) -> None:
        for incident in incidents:
            await self[at].commands.incident_rekey(incident=incident)
            await until(lambda: self._has_successors(at, incident), timeout_s=60)  # noqa: B023 - awaited here
            await self[at].commands.incident_status(incident=incident)

    def _has_successors(self, at: str, incident: str) -> bool:
        view = self[at].peering.view
        return not without_successor(view, incident)

    async def balance(self) -> None:
        """A load balancer that confirms, until cancelled, what each member has."""
        while True:
            for name in self.keys.members:
                member = self[name]
                view = member.peering.view
                ack = LbAck(load_balancer="lb-1", term=view.term, epoch=view.epoch)
                member.parts.load_balancers.acknowledged("lb-1", ack, now_boot_s=member.clock.boot_s())
            await asyncio.sleep(0.02)


@asynccontextmanager
async def healing_site(
    directory: Path,
    tenant: Tenant,
    names: str,
    *,
    make_source: Callable[[str], FakeKeySource] = lambda _: FakeKeySource(),
) -> AsyncIterator[HealingSite]:
    """United, active, with a key of each environment in each, behind a load balancer."""
    async with key_site(directory, tenant, names, make_source=make_source, make_member=HealingMember) as made:
        site = HealingSite(made)
        await made.unite()
        await site[names[0]].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        balancing = asyncio.create_task(site.balance(), name="lb-1")
        try:
            yield site
        finally:
            balancing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await balancing
