"""The parts of an agent that deal with incidents, wired: what peers may ask of them, and their loop.

1. An environment's agent speaks for its own environment alone: its KEK, its proxies.
2. A load balancer needs a TLS identity of the tenant, and is no member.
"""

from typing import TYPE_CHECKING

import msgspec

from envelope.certificates import Role
from envelope.errors import FormatError, IntegrityError
from key_agent.environments.changes.healing_changes import KekAnnouncement
from key_agent.environments.incidents.acknowledgements import (
    CONTAINMENT_PATH,
    LB_ACK_PATH,
    Containment,
    LbAck,
    LoadBalancers,
    Places,
)
from key_agent.environments.incidents.healing import CANARY_PATH, KEK_PATH, Healing
from key_agent.environments.incidents.incidents import Incidents, KeyMaker
from key_agent.environments.incidents.reaction import Reaction
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.shared.shared_view import Shared, newest_term
from key_agent.environments.workplace import Workplace

if TYPE_CHECKING:
    from key_agent.agent import Agent

_SMALL_BYTES = 64 << 10


class IncidentParts:
    def __init__(self, agent: "Agent", environments: Workplace, keys: KeyMaker) -> None:
        """To be made once, before the workplace opens."""
        self._agent = agent
        self._peering = environments.peering
        self._seen = self._peering.view
        self.keys = keys
        self.load_balancers = LoadBalancers()
        self.containment = Containment(agent.targets.links, self._peering.view)
        self.incidents = Incidents(
            peering=self._peering,
            keys=keys,
            load_balancers=self.load_balancers,
            own_places=self.own_places,
            journal=agent.journal,
            clock=agent.clock,
        )
        self.healing = Healing(
            peering=self._peering,
            incidents=self.incidents,
            keys=keys,
            load_balancers=self.load_balancers,
            journal=agent.journal,
            clock=agent.clock,
        )
        self.reaction = Reaction(agent, self._peering, environments.proofs, self._tell_kek)
        self._peering.listen(self._changed)
        environments.routes += [
            PeerRoute(
                "POST",
                LB_ACK_PATH,
                self._lb_ack,
                members_only=False,
                # Not an agent: a breached one would confirm its own return.
                roles=frozenset({Role.BALANCER}),
                limit_bytes=_SMALL_BYTES,
            ),
            PeerRoute("GET", CONTAINMENT_PATH, self._places, limit_bytes=0),
            PeerRoute("POST", CANARY_PATH, self._canary, limit_bytes=_SMALL_BYTES),
            PeerRoute("POST", KEK_PATH, self._kek, limit_bytes=_SMALL_BYTES),
        ]
        environments.tasks.append(("reaction", self.reaction.run))

    def own_places(self, epoch: int) -> Places:
        """What this environment's proxies have acknowledged of what was taken away at *epoch*."""
        view, clock = self._peering.view, self._agent.clock
        places = self.containment.places(
            epoch,
            self._agent.targets.links,
            now_ms=self._agent.now_ms(),
            now_boot_s=clock.boot_s(),
        )
        return Places(
            environment=self._peering.environment, term=view.term, epoch=view.epoch, places=tuple(places)
        )

    def _changed(self, view: Shared) -> None:
        before, self._seen = self._seen, view
        self.containment.changed(before, view, self._peering.environment, self._agent.targets.links)

    async def _lb_ack(self, call: PeerCall) -> bytes:
        self.load_balancers.acknowledged(
            call.agent_id, _read(call, LbAck), now_boot_s=self._agent.clock.boot_s()
        )
        return b"{}"

    async def _places(self, call: PeerCall) -> bytes:
        text = call.query.get("epoch", "0")
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise FormatError("epoch: not a number")
        return msgspec.json.encode(self.own_places(int(text)))

    async def _canary(self, _call: PeerCall) -> bytes:
        return msgspec.json.encode(await self.reaction.canary())

    async def _kek(self, call: PeerCall) -> bytes:
        told = _read(call, KekAnnouncement)
        if self._peering.environment_of(call.agent_id) != told.environment:
            raise IntegrityError(f"{call.agent_id} is not the agent of {told.environment}")
        await self.healing.take_kek(told)
        return b"{}"

    async def _tell_kek(self, told: KekAnnouncement) -> None:
        if self._peering.leads:
            await self.healing.take_kek(told)
            return
        manager = newest_term(self._peering.view)
        if manager is None:
            raise PeerError("unknown", "there is no manager to announce the KEK to")
        await self._peering.peers.post(manager[1].environment, KEK_PATH, msgspec.json.encode(told))


def _read[T](call: PeerCall, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(call.body, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(str(error)[:200]) from None
