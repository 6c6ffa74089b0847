"""The road back of an environment, walked by the manager: each step can be taken again after a crash.

1. The order is system B's: the operator says it has healed; every live load balancer, one at least, confirms
   that it knows; only then wraps are stored there, by way of its own API, opened there and compared; its
   agent proves itself; and it is active, in one epoch. Before the confirmation nothing is stored.
2. Whatever fails on the way makes it heal again, with the reason in its row. Who gave up waiting for the load
   balancers has changed nothing.
3. Where it stands is in the rows: a command that was killed is given again, and goes on.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import structlog

from envelope.errors import SealgateError
from key_agent.environments.changes import healing_changes as changes
from key_agent.environments.changes.healing_changes import KekAnnouncement
from key_agent.environments.incidents.acknowledgements import LoadBalancers
from key_agent.environments.incidents.incidents import Incidents, KeyMaker
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.registry_lease import Position
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from runtime.clock import Clock

log = structlog.get_logger(__name__)

CANARY_PATH: Final = "/v1/env/canary"
KEK_PATH: Final = "/v1/env/kek"
CANARY_TIMEOUT_S: Final = 60.0
CONFIRMATION_PATIENCE_S: Final = 30.0
_LOOK_S: Final = 0.1
_CATCH_UP_S: Final = 5.0

_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an environment's agent finds when it proves itself: its KEK, and every wrap under it, now."""

    environment: _Text
    term: int
    epoch: int
    kek_id: _Text
    keys: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=200_000)]
    """Ids of those that opened, with the right check value."""
    problems: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=1000)]


class Healing:
    def __init__(
        self,
        *,
        peering: Peering,
        incidents: Incidents,
        keys: KeyMaker,
        load_balancers: LoadBalancers,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._peering = peering
        self._incidents = incidents
        self._keys = keys
        self._load_balancers = load_balancers
        self._journal = journal
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()

    async def heal_complete(
        self, environment: str, *, attestation: str, new_certificates: bool, fingerprint: str | None
    ) -> bool:
        """The operator's statement; False if it was made. Nothing is stored there by it.

        RefusedChangeError: what its incidents demand is missing.
        """
        self._incidents.term()
        await self._journal.record(
            "heal-complete",
            outcome="begun",
            environment=environment,
            attestation=attestation,
            new_certificates=str(new_certificates).lower(),
        )
        changed = False

        def change(draft: Draft) -> None:
            nonlocal changed
            changed = changes.heal_complete(
                draft,
                environment,
                attestation=attestation,
                new_certificates=new_certificates,
                fingerprint=fingerprint,
                now_ms=self._now_ms(),
            )

        await self._incidents.write(change)
        await self._incidents.tell()
        await self._journal.record("heal-complete", environment=environment)
        return changed

    async def take_kek(self, told: KekAnnouncement) -> None:
        """An environment has a new KEK: its agent says so. RefusedChangeError."""
        self._journal.note(
            "kek-announced",
            environment=told.environment,
            kek=told.kek_id,
            fingerprint=changes.kek_fingerprint(told.kek_id, told.kek),
        )

        def change(draft: Draft) -> None:
            changes.take_kek(draft, told, tenant=self._peering.tenant, now_ms=self._now_ms())

        await self._incidents.write(change)

    async def rejoin(
        self, environment: str, *, patience_s: float = CONFIRMATION_PATIENCE_S
    ) -> Mapping[str, str]:
        """The environment is active again when this returns empty; else what could not be proven, by name.

        RefusedChangeError: it has not healed, or no load balancer confirms that within *patience_s*.
        """
        async with self._one_at_a_time:
            self._incidents.term()
            body = self._peering.view.environments.get(environment)
            if body is not None and body.state is EnvironmentState.ACTIVE:
                return {}
            changes.may_rejoin(self._peering.view, environment)
            await self._journal.record("env-rejoin", outcome="begun", environment=environment)
            await self._admit(environment, patience_s)
            problems = await self._prove(environment)
            if problems:
                await self._refuse(environment, problems)
            else:
                await self._readmit(environment)
            return problems

    async def _admit(self, environment: str, patience_s: float) -> None:
        confirmed = await self._confirmed(environment, patience_s)

        def change(draft: Draft) -> None:
            changes.admit(draft, environment, load_balancers=confirmed, now_ms=self._now_ms())

        await self._incidents.write(change)
        await self._incidents.tell()
        await self._journal.record(
            "env-rejoin", outcome="admitted", environment=environment, confirmed_by=",".join(confirmed)
        )

    async def _confirmed(self, environment: str, patience_s: float) -> list[str]:
        """Every live load balancer, once all of them know that *environment* has healed."""
        view = self._peering.view
        if view.environments[environment].state is EnvironmentState.REJOINING:
            return ["before"]  # a command that was killed had their word; admit() changes nothing
        position = Position(view.term, view.epoch)
        ends_s = self._clock.boot_s() + patience_s
        while True:
            have, missing = self._load_balancers.confirmed(position, now_boot_s=self._clock.boot_s())
            if have and not missing:
                return have
            if self._clock.boot_s() >= ends_s:
                break
            await self._clock.sleep(_LOOK_S)
        raise RefusedChangeError(
            f"{', '.join(missing)} has not confirmed that {environment} has healed"
            if missing
            else f"no live load balancer has confirmed that {environment} has healed",
            "see that every `key-agent lb-agent` runs and reaches this agent, then repeat the command",
        )

    async def _prove(self, environment: str) -> dict[str, str]:
        """Everything that is wrong there, by key or part."""
        problems: dict[str, str] = {}
        try:
            problems |= await self._keys.prove(environment)
        except SealgateError as error:  # HSM, registry, peer: whatever it is, it is not proven
            problems["wraps"] = str(error)
        if not problems:
            problems |= await self._canary(environment)
        return problems

    async def _canary(self, environment: str) -> dict[str, str]:
        await self._peering.spread([environment], timeout_s=_CATCH_UP_S)
        view = self._peering.view
        try:
            content = await self._peering.peers.post(
                environment, CANARY_PATH, b"{}", timeout_s=CANARY_TIMEOUT_S
            )
            found = msgspec.json.decode(content, type=Canary)
        except (PeerError, msgspec.MsgspecError, UnicodeError) as error:
            return {"canary": str(error)}
        wrong = {f"canary {number}": text for number, text in enumerate(found.problems, start=1)}
        if found.environment != environment or found.kek_id != view.environments[environment].kek_id:
            wrong["canary"] = f"it answers for {found.environment} with KEK {found.kek_id}"
        if Position(found.term, found.epoch) < Position(view.term, view.epoch):
            wrong["registry"] = f"it stands at epoch {found.epoch}, the newest is {view.epoch}"
        opened = frozenset(found.keys)
        wrong |= {
            key_id: "does not open there"
            for key_id, dek in view.deks.items()
            if dek.state in changes.LIVE and key_id not in opened
        }
        return wrong

    async def _refuse(self, environment: str, problems: Mapping[str, str]) -> None:
        name, why = next(iter(problems.items()))
        reason = f"rejoining failed: {len(problems)} problems, the first is {name}: {why}"
        log.error("an environment does not return", environment=environment, reason=reason)
        self._journal.note("env-rejoin", outcome="failed", environment=environment, reason=reason[:1000])

        def change(draft: Draft) -> None:
            changes.refuse(draft, environment, reason=reason, now_ms=self._now_ms())

        await self._incidents.write(change)
        await self._incidents.tell()

    async def _readmit(self, environment: str) -> None:
        await self._journal.record("env-rejoin", outcome="proven", environment=environment)

        def change(draft: Draft) -> None:
            changes.readmit(draft, environment, now_ms=self._now_ms())

        await self._incidents.write(change)
        await self._incidents.tell()
        await self._journal.record("env-rejoin", environment=environment)

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)
