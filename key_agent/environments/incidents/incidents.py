"""Incidents as the manager runs them: one transaction, then everybody is told, all at once.

1. Opening waits for nothing but the registry: no lock of other commands, no audit log, no HSM, no peer. What
   comes after the transaction is telling; whoever cannot be told reads it in the rows when they can.
2. An agent that is not the manager can still say that its own environment is not to be trusted: everybody
   acts on that at once, and the manager makes an incident of it (`ratify`).
3. What an agent has to do itself (reaction.py) follows from the rows, not from having been told.
4. Acknowledgements are asked for again at each look; an incident is `contained` when nobody is missing.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog

from envelope.errors import MisuseError
from envelope.keys import KeyId
from key_agent import metrics
from key_agent.environments.breaches import Declaration, IncidentEvent, IncidentKind, IncidentState
from key_agent.environments.changes import incident_changes as changes
from key_agent.environments.changes.incident_changes import Opening
from key_agent.environments.incidents.acknowledgements import (
    CONTAINMENT_PATH,
    LoadBalancers,
    Place,
    Places,
)
from key_agent.environments.peers.own_word import Notice
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.registry_lease import Position
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import RECEIPT_SLACK_MS
from runtime.clock import Clock

log = structlog.get_logger(__name__)

SPREAD_PATIENCE_S: Final = 2.0
ASK_PATIENCE_S: Final = 2.0

type Successor = tuple[str, str, str]
"""Ring, owner environment, and the key whose place it takes."""


class KeyMaker(Protocol):
    """What incidents ask of the manager's part that makes and spreads keys."""

    async def make_successors(self, wanted: Collection[Successor], *, generator: str | None) -> list[str]:
        """New keys, on their way to become active; none where one is on its way already."""

    async def prove(self, environment: str) -> Mapping[str, str]:
        """Have every key that is not destroyed stored and verified there; what failed, by key, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentAck:
    """How far one environment is with an incident."""

    environment: str
    has_it: bool
    """Its registry holds the epoch, or a newer one."""
    places: tuple[Place, ...]
    """Its proxies; empty if its agent does not answer."""
    error: str | None = None

    @property
    def is_clear(self) -> bool:
        return self.has_it and self.error is None and all(place.is_clear for place in self.places)


def check_none_seals(
    shared: Shared, key_ids: Collection[str], acks: Collection[EnvironmentAck], *, now_ms: int
) -> None:
    """RefusedChangeError: where nobody has heard that these keys were taken away, they may still seal.

    What is uploaded there behind the last pass of a re-encryption would be lost with its key.
    """
    silent = [place for ack in acks for place in ack.places if not place.is_clear]
    unheard = [ack.environment for ack in acks if not ack.has_it]
    until_ms = max((place.holds_until_ms or 0 for place in silent), default=0)
    if unheard:  # it serves for one lease at most, and its proxies hold nothing for longer
        taken_ms = max(shared.deks[key_id].since_ms for key_id in key_ids)
        until_ms = max(until_ms, taken_ms + lease_s_of(shared) * 1000 + RECEIPT_SLACK_MS)
    if silent or now_ms < until_ms:
        where = [f"{place.service} at {place.proxy}" for place in silent] + unheard
        left_s = max(1, (until_ms - now_ms) // 1000)
        raise RefusedChangeError(
            f"these keys may still seal, for {left_s} s: {', '.join(where)[:500]}",
            "repeat it then, or when `key-agent incident status` says that all of them have heard of it",
        )


class Incidents:
    def __init__(
        self,
        *,
        peering: Peering,
        keys: KeyMaker,
        load_balancers: LoadBalancers,
        own_places: Callable[[int], Places],
        journal: Journal,
        clock: Clock,
    ) -> None:
        """*own_places*: what this agent's own proxies have acknowledged since an epoch."""
        self._peering = peering
        self._keys = keys
        self._load_balancers = load_balancers
        self._own_places = own_places
        self._journal = journal
        self._clock = clock
        peering.ratify = self.ratify

    # Opening.

    async def open(self, opening: Opening) -> tuple[str, bool, dict[str, bool]]:
        """The incident's id, whether this call opened it, and which environments have it already.

        RefusedChangeError: it does not fit, or this agent is not the manager. RegistryError.
        """
        self.term()
        declared = opening.declared
        self._journal.note(
            "incident-open",
            outcome="begun",
            environment=declared.environment,
            kind=declared.kind,
            reason=opening.reason,
            by=opening.opened_by,
        )
        found: tuple[str, bool] = ("", False)

        def change(draft: Draft) -> None:
            nonlocal found
            # Every key has a wrap in every environment; what a breached one says it holds is worth nothing.
            exposed = frozenset(draft.shared.deks)
            found = changes.open_incident(draft, opening, exposed=exposed, now_ms=self._now_ms())

        await self.write(change)
        incident_id, is_new = found
        told = await self.tell()
        self._journal.note(
            "incident-open",
            incident=incident_id,
            new=str(is_new).lower(),
            epoch=self._peering.view.epoch,
            told=",".join(sorted(name for name, has in told.items() if has)) or None,
        )
        return incident_id, is_new, told

    async def ratify(self, notice: Notice) -> None:
        """An environment's own word becomes an incident. What fails is repeated by the next notice."""
        body = self._peering.view.environments.get(notice.environment)
        if body is None or not body.state.counts:
            return
        opening = Opening(
            declared=Declaration(kind=IncidentKind.SUSPECTED, environment=notice.environment),
            reason=notice.reason,
            since_ms=notice.at_ms,
            opened_by=f"agent {body.agent_id}",
            idempotency_key=f"notice {notice.environment} {notice.at_ms}",
        )
        try:
            await self.open(opening)
        except RefusedChangeError as error:
            log.warning("a notice is not ratified", environment=notice.environment, cause=str(error))

    async def write(self, change: Callable[[Draft], object]) -> None:
        """One transaction of the shared rows, as the manager. RefusedChangeError, ApprovalError."""

        def apply(draft: Draft) -> None:
            try:
                change(draft)
            except MisuseError as error:
                raise RefusedChangeError(
                    str(error), "`key-agent incident status` shows what is next"
                ) from None

        await self._peering.shared.write(apply, term=self.term(), now_ms=self._now_ms())
        await self._peering.changed()

    def term(self) -> int:
        """The term to write with. RefusedChangeError unless this agent is the manager."""
        leadership = self._peering.leadership
        term = None if leadership is None else leadership.term
        if term is None:
            raise RefusedChangeError(
                "this agent is not the manager",
                "`key-agent env list` says who is; `key-agent env promote` here if it is lost; "
                "`key-agent env declare` withdraws this environment without any manager",
            )
        return term

    async def tell(self) -> dict[str, bool]:
        """Bring the newest rows to every environment; which of them have acknowledged."""
        return await self._peering.spread(self._peering.others(), timeout_s=SPREAD_PATIENCE_S)

    # Looking.

    async def acknowledgements(self, incident_id: str) -> list[EnvironmentAck]:
        """How far every environment is; each is asked now."""
        body = self._peering.view.incidents[incident_id]
        names = [
            name
            for name, environment in sorted(self._peering.view.environments.items())
            if environment.state not in (EnvironmentState.PROVISIONING, EnvironmentState.RETIRED)
        ]
        return list(await asyncio.gather(*(self._ask(name, body.opened_epoch) for name in names)))

    async def _ask(self, name: str, epoch: int) -> EnvironmentAck:
        try:
            if name == self._peering.environment:
                found = self._own_places(epoch)
            else:
                content = await self._peering.peers.post(
                    name, f"{CONTAINMENT_PATH}?epoch={epoch}", b"", method="GET", timeout_s=ASK_PATIENCE_S
                )
                found = msgspec.json.decode(content, type=Places)
        except (PeerError, msgspec.MsgspecError, UnicodeError) as error:
            return EnvironmentAck(environment=name, has_it=False, places=(), error=str(error))
        return EnvironmentAck(environment=name, has_it=found.epoch >= epoch, places=found.places)

    def unconfirmed_load_balancers(self, incident_id: str) -> list[str]:
        """Live ones that have not acted on the incident yet."""
        view = self._peering.view
        position = Position(view.term, view.incidents[incident_id].opened_epoch)
        _, missing = self._load_balancers.confirmed(position, now_boot_s=self._clock.boot_s())
        return missing

    async def note_contained(self, incident_id: str, acks: Collection[EnvironmentAck]) -> bool:
        """If nobody is missing any more that is written, by the manager; whether it is contained."""
        body = self._peering.view.incidents[incident_id]
        if body.state is not IncidentState.OPEN:
            return True
        if self.unconfirmed_load_balancers(incident_id) or not all(ack.is_clear for ack in acks):
            return False
        if self._peering.leads:

            def change(draft: Draft) -> None:
                if draft.shared.incidents[incident_id].state is IncidentState.OPEN:
                    changes.advance(draft, incident_id, IncidentEvent.ACKNOWLEDGED, now_ms=self._now_ms())

            await self.write(change)
            self._journal.note("incident-contained", incident=incident_id)
            passed_s = max(0.0, self._clock.wall_s() - body.opened_at_ms / 1000)
            metrics.REVOCATION_PROPAGATION.observe(passed_s)
        return True

    # Keys.

    async def rekey(self, incident_id: str, *, generator: str | None) -> tuple[list[str], bool]:
        """Successors for what was taken away; the new keys, and whether all of them are active.

        RefusedChangeError: something is undecided, the generator heals, or the incident is over.
        KeySourceError, RegistryError, PeerError: to be repeated.
        """
        self.term()
        view = self._peering.view
        incident_id, body = changes.find(view, incident_id)
        if body.state.is_over:
            raise RefusedChangeError(f"{incident_id} is {body.state}", "`key-agent incident list`")
        if waiting := changes.undecided(view, incident_id):
            raise RefusedChangeError(
                f"{len(waiting)} keys of {incident_id} are suspended: nobody has decided about them",
                f"`key-agent incident compromise {incident_id}` or `key-agent incident cancel {incident_id}`",
            )
        self._check_generator(generator)
        missing = changes.without_successor(view, incident_id)
        made: list[str] = []
        if missing:
            await self._journal.record(
                "incident-rekey",
                outcome="begun",
                incident=incident_id,
                keys=len(missing),
                generator=generator,
            )
            wanted = [
                (view.deks[key_id].ring, view.deks[key_id].owner_environment, key_id) for key_id in missing
            ]
            made = await self._keys.make_successors(wanted, generator=generator)
            await self.write(
                lambda draft: changes.note_step(draft, incident_id, "rekey", now_ms=self._now_ms())
            )
        return made, await self.note_succeeded(incident_id, generator=generator)

    def _check_generator(self, generator: str | None) -> None:
        if generator is None:
            return
        environment = self._peering.view.environments.get(generator)
        if environment is None:
            raise RefusedChangeError(f"there is no environment {generator}", "`key-agent env list`")
        if not environment.state.counts:
            raise RefusedChangeError(
                f"{generator} is {environment.state}: it makes no keys",
                "leave --generator out: a healthy environment makes them",
            )

    async def note_succeeded(self, incident_id: str, *, generator: str | None = None) -> bool:
        """If every successor is active, that is written; whether they are."""
        view = self._peering.view
        if changes.without_successor(view, incident_id) or changes.undecided(view, incident_id):
            return False
        if view.incidents[incident_id].state not in (IncidentState.OPEN, IncidentState.CONTAINED):
            return True
        await self._journal.record("incident-rekey", incident=incident_id, generator=generator)

        def change(draft: Draft) -> None:
            changes.succeed(draft, incident_id, now_ms=self._now_ms())

        await self.write(change)
        return True

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)


def parse_keys(texts: Collection[str]) -> frozenset[str]:
    """Key ids in hex, as people give them. FormatError."""
    return frozenset(str(KeyId.parse(text.strip())) for text in texts)
